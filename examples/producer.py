"""A producer: it submits jobs and reads their results. It needs the base install only, and opens no image itself.

celery -A tasks worker                     # in another terminal
python examples/producer.py a.jpg b.png    # writes into ./out
"""

import sys
from pathlib import Path
from typing import Any

from celery import chain, group

from tasks import image_conversion, image_resize
from tasks.errors import MediaTasksError


def main(paths: list[str], out: Path = Path("out")) -> None:
    # One job a file. Relative paths are made absolute here, since a worker stands in another directory.
    resized = [image_resize.delay(path, out / f"{Path(path).stem}-800.webp", width=800) for path in paths]

    # One that goes first: 10 is the highest priority, 5 the usual one.
    first = Path(paths[0])
    urgent = image_resize.apply_async((first, out / f"{first.stem}-icon.png"), {"width": 64}, priority=10)

    # A chain: what one job has written is the input of the next.
    steps = chain(
        image_resize.s(first, out / f"{first.stem}-1600.png", width=1600),
        image_conversion.s(out / f"{first.stem}-1600.avif", quality=60),
    ).apply_async()

    # A group: several jobs at once, one result for all of them.
    widths = group(
        image_resize.s(first, out / f"{first.stem}-{width}.jpg", width=width) for width in (200, 400)
    ).apply_async()

    for path, result in zip(paths, resized, strict=True):
        try:
            show(result.get(timeout=60))
        except MediaTasksError as exc:  # the job's own error, as its row has it
            print(f"{path} failed: {type(exc).__name__}: {exc}")
    for made in (urgent.get(timeout=60), steps.get(timeout=60), *widths.get(timeout=60)):
        show(made)


def show(made: dict[str, Any]) -> None:
    print(f"{made['output']}: {made['width']} x {made['height']} px, {made['size_bytes']:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/producer.py IMAGE...")
    main(sys.argv[1:])
