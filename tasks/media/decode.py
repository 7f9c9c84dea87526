"""Decoders: an open `Input` in, a lazy libvips image out, its header checked and none of its pixels read.

libvips reads jpeg, png, webp, gif, tiff and avif (and jxl where it was built with it); Pillow reads bmp and jp2, and
with their plug-ins heic and jxl.
"""

import functools
import os
from importlib import import_module
from typing import Any

from tasks.errors import CorruptMedia, LimitExceeded, UnsupportedMedia
from tasks.media.formats import PILLOW_NAMES
from tasks.media.sniff import Input, Limits

_VIPS_LOADERS = {
    "jpeg": "jpegload_source",
    "png": "pngload_source",
    "webp": "webpload_source",
    "gif": "gifload_source",
    "tiff": "tiffload_source",
    "avif": "heifload_source",
}
_PLUGINS = {  # module, and what to install
    "heic": ("pillow_heif", "media-tasks[heif]"),
    "jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}


@functools.cache
def engine() -> Any:
    """pyvips, set up once per process: one thread, no operation cache, loaders that are unsafe on uploads blocked.

    Call it first in the process that does the work: libvips started before a fork hangs the children.
    """
    os.environ["VIPS_BLOCK_UNTRUSTED"] = "1"
    try:
        import pyvips
    except (ImportError, OSError) as exc:
        raise UnsupportedMedia("images need pyvips, which is not installed here: install media-tasks[image]") from exc
    pyvips.block_untrusted_set(True)
    pyvips.concurrency_set(1)
    pyvips.cache_set_max(0)
    return pyvips


@functools.cache
def pillow_plugin(media_format: str) -> Any:
    """Pillow's reader class for a format that libvips leaves to it; from now on Pillow can also write that."""
    if media_format in _PLUGINS:
        module, package = _PLUGINS[media_format]
        try:
            plugin = import_module(module)
        except ImportError as exc:
            raise UnsupportedMedia(
                f"{media_format} needs {package}, which is not installed here: pip install it"
            ) from exc
        if media_format == "heic":
            plugin.register_heif_opener()
    from PIL import Image

    Image.init()
    return Image.OPEN[PILLOW_NAMES[media_format]][0]


def open_image(source: Input, limits: Limits, *, all_frames: bool = False, shrink: float = 1) -> Any:
    """The image of `source`, sequential and still undecoded; with `all_frames` an animation as one tall roll.

    `shrink` decodes that many times smaller, at a fraction of the cost: 1, 2, 4 or 8 for jpeg, any factor for a still
    webp; other formats can't.

    Raises:
        LimitExceeded: the header announces more pixels than the limit.
        CorruptMedia: there is no valid header.
    """
    if source.format not in _VIPS_LOADERS:
        return _open_with_pillow(source, limits)
    vips = engine()
    options: dict[str, Any] = {"access": "sequential", "fail_on": "error"}
    if source.format == "jpeg":
        options["shrink"] = int(shrink)
    elif source.format == "webp" and shrink > 1:
        options["scale"] = 1 / shrink
    elif all_frames and source.frames > 1:
        options["n"] = -1
    os.lseek(source.fd, 0, os.SEEK_SET)
    try:
        image = getattr(vips.Image, _VIPS_LOADERS[source.format])(vips.Source.new_from_descriptor(source.fd), **options)
    except vips.Error as exc:
        raise corrupt(source, exc) from exc
    check_pixels(source, image.width, image.height, limits)
    return image


def check_pixels(source: Input, width_px: int, height_px: int, limits: Limits) -> None:
    """Refuse what would decode to more pixels than allowed; an animation counts with all its frames."""
    if width_px < 1 or height_px < 1:
        raise CorruptMedia(f"{source.path} announces {width_px} x {height_px} px; upload it again")
    if width_px * height_px > limits.max_pixels:
        raise LimitExceeded(
            f"{source.path} is {width_px:,} x {height_px:,} px ({_pixels(width_px * height_px)}); "
            f"the limit is {_pixels(limits.max_pixels)} (MAX_PIXELS): give a smaller one, or raise it"
        )


def corrupt(source: Input, exc: Exception) -> CorruptMedia:
    """The error for a file whose decoder gave up, with the decoder's own first words."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip() and not line.startswith("unable to c")]
    reason = lines[0] if lines else type(exc).__name__
    return CorruptMedia(f"{source.path} can't be decoded as {source.format}: {reason}; upload it again")


def _open_with_pillow(source: Input, limits: Limits) -> Any:
    """Decode at once, after the check of the header; orientation of heic is applied by its own decoder."""
    reader = pillow_plugin(source.format)
    with os.fdopen(os.dup(source.fd), "rb") as file:
        file.seek(0)
        try:
            picture = reader(file, source.path)
            check_pixels(source, picture.width, picture.height, limits)
            picture.load()
        except (OSError, ValueError, SyntaxError, RuntimeError, EOFError, IndexError, MemoryError) as exc:
            raise corrupt(source, exc) from exc
    check_pixels(source, picture.width, picture.height, limits)
    return _from_pillow(picture)


def _from_pillow(picture: Any) -> Any:
    vips = engine()
    has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    if picture.mode.startswith("I;16"):
        mode, sample, interpretation = "I;16", "ushort", "grey16"
    elif picture.mode in ("1", "L", "LA"):
        mode, sample, interpretation = ("LA" if has_alpha else "L"), "uchar", "b-w"
    elif picture.mode == "CMYK":
        mode, sample, interpretation = "CMYK", "uchar", "cmyk"
    else:
        mode, sample, interpretation = ("RGBA" if has_alpha else "RGB"), "uchar", "srgb"
    converted = picture if picture.mode == mode else picture.convert(mode)
    bands = len(converted.getbands())
    image = vips.Image.new_from_memory(converted.tobytes(), *converted.size, bands, sample)
    image = image.copy(interpretation=interpretation)
    for key, field in (("exif", "exif-data"), ("xmp", "xmp-data"), ("icc_profile", "icc-profile-data")):
        if isinstance(blob := picture.info.get(key), bytes) and blob:
            image.set_type(vips.GValue.blob_type, field, blob)
    return image


def _pixels(count: int) -> str:
    return f"{count / 1e9:.1f} Gpx" if count >= 1e9 else f"{count / 1e6:,.4g} Mpx"
