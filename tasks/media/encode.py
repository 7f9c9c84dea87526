"""Encoders: a libvips image in, a written file descriptor out. Nothing that depends on time or chance is written."""

import os
from typing import Any

from tasks.media.decode import engine, pillow_plugin
from tasks.media.formats import PILLOW_NAMES, Format

# From effort 3 on libwebp holds all tokens of a picture: 145 MB for a grainy one of 24 Mpx, which at 2 it does without,
# for 13 % more bytes of a smooth one and 3 % fewer of a grainy one.
_WEBP_EFFORT = 4
_WEBP_EFFORT_LARGE = 2
_WEBP_LARGE_PX = 8_000_000
_AVIF_EFFORT = 3  # a fifth of the time of libvips' 4, for 8 % more bytes at the same error


def encode(
    image: Any, fd: int, target: Format, *, quality: int = 85, lossless: bool = False, keep: str = "none"
) -> None:
    """Decode, process and write in one pass; errors of any of the three are those of the engine.

    `keep` is `none` or `all`: what is written of EXIF, XMP and ICC.
    """
    if target.name in PILLOW_NAMES:
        _encode_with_pillow(image, fd, target, quality=quality, lossless=lossless, keep=keep)
        return
    per_format: dict[str, dict[str, Any]] = {
        "jpeg": {"Q": quality},
        "png": {},
        "webp": {"Q": quality, "lossless": lossless, "effort": _webp_effort(image)},
        "avif": {"Q": quality, "lossless": lossless, "compression": "av1", "effort": _AVIF_EFFORT},
        "tiff": {"compression": "deflate", "predictor": "horizontal"},
        "gif": {},
    }
    save = {"avif": "heifsave_target"}.get(target.name, f"{target.name}save_target")
    getattr(image, save)(engine().Target.new_to_descriptor(fd), keep=keep, **per_format[target.name])


def _webp_effort(image: Any) -> int:
    return _WEBP_EFFORT_LARGE if image.width * image.height > _WEBP_LARGE_PX else _WEBP_EFFORT


def _encode_with_pillow(image: Any, fd: int, target: Format, *, quality: int, lossless: bool, keep: str) -> None:
    from PIL import Image

    pillow_plugin(target.name)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[image.bands]
    picture = Image.frombuffer(mode, (image.width, image.height), image.write_to_memory(), "raw", mode, 0, 1)
    options: dict[str, Any] = {}
    if target.name != "bmp":
        options["quality"] = (-1 if target.name == "heic" else 100) if lossless else quality
    if target.name == "jxl":
        options["lossless"] = lossless
    if keep == "all":
        fields = {"exif": "exif-data", "xmp": "xmp-data", "icc_profile": "icc-profile-data"}
        options |= {key: image.get(field) for key, field in fields.items() if image.get_typeof(field)}
    with os.fdopen(os.dup(fd), "wb") as file:
        picture.save(file, format=PILLOW_NAMES[target.name], **options)
