"""The task that most would write: Celery, Redis for messages and results, Pillow, and Celery's own defaults."""

import os

from celery import Celery
from PIL import Image, ImageOps

app = Celery("usual", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BROKER"])


@app.task
def thumbnail(source: str, target: str, size_px: int, *, draft: bool = False) -> None:
    """Make a thumbnail. `draft` lets libjpeg decode smaller, which few know of; an image that was transposed can't."""
    with Image.open(source) as image:
        if draft:
            image.draft("RGB", (size_px, size_px))
        upright = ImageOps.exif_transpose(image)
        upright.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
        upright.save(target, quality=85)
