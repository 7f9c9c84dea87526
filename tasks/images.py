"""The image capabilities, declared: check the arguments, call a pure function of `tasks.media`, return its small dict.

Each writes its output beside the target, asks `confirm()` whether the attempt still owns the job, and renames it into
place; so a second delivery or a crash leaves the old output or the whole new one. Same input and arguments, same bytes.
Time limits need the prefork pool, and a soft one can't interrupt a call into libvips.
"""

from collections.abc import Sequence
from typing import Any

from tasks.arguments import InputPath, OutputPath
from tasks.celery import app
from tasks.errors import PathNotAllowed
from tasks.job import Job
from tasks.media.options import ConversionOptions, RenditionsOptions, ResizeOptions

# The body is one call into libvips, which no soft limit can interrupt. An AVIF of 150 Mpx takes a slow machine minutes;
# what takes half an hour, or as many seconds more as its input has megabytes, hangs.
_IMAGE: dict[str, Any] = {
    "bind": True,
    "requires": ("pyvips",),
    "extra": "image",
    "time_limit": 1800.0,
    "seconds_per_megabyte": 1.0,
}


def _resize_options(input: str, output: str, **arguments: Any) -> ResizeOptions:
    _check_paths(input, output)
    options = ResizeOptions(**arguments)
    options.format_for(output)
    return options


def _conversion_options(input: str, output: str, **arguments: Any) -> ConversionOptions:
    _check_paths(input, output)
    options = ConversionOptions(**arguments)
    options.format_for(output)
    return options


def _renditions_options(input: str, output_dir: str, **arguments: Any) -> RenditionsOptions:
    _check_paths(input, output_dir, is_directory=True)
    return RenditionsOptions(**arguments)


@app.task(**_IMAGE, validate=staticmethod(_resize_options))
def image_resize(
    self: Job,
    input: InputPath,
    output: OutputPath,
    *,
    width: int | None = None,
    height: int | None = None,
    fit: str | None = None,
    preserve_aspect: bool | None = None,
    enlarge: bool = False,
    quality: int = 85,
    background: str = "white",
) -> dict[str, Any]:
    """Resize an image into a box of `width` x `height` px (at least one of them).

    Args:
        input: The image; its magic bytes say what it is, not its suffix.
        output: The file to write; its suffix is its format.
        width: Width of the box, px.
        height: Height of the box, px.
        fit: inside, cover, contain or fill (default inside).
        preserve_aspect: Shorthand: true is fit=inside, false is fit=fill.
        enlarge: Also make small images larger.
        quality: 1-100, for lossy formats.
        background: Colour behind transparent pixels in formats without alpha, and around fit=contain.
    """
    from tasks.media import image

    options = _resize_options(
        input,
        output,
        width=width,
        height=height,
        fit=fit,
        preserve_aspect=preserve_aspect,
        enlarge=enlarge,
        quality=quality,
        background=background,
    )
    return image.resize(input, output, options, **_hooks(self))


@app.task(**_IMAGE, validate=staticmethod(_conversion_options))
def image_conversion(
    self: Job,
    input: InputPath,
    output: OutputPath,
    *,
    format: str | None = None,
    quality: int = 85,
    lossless: bool = False,
    strip_metadata: bool = True,
    background: str = "white",
) -> dict[str, Any]:
    """Convert an image to another format, at its own size.

    Args:
        input: The image; its magic bytes say what it is, not its suffix.
        output: The file to write.
        format: jpeg, png, webp, avif, tiff, gif, bmp, heic or jxl (default: by output's suffix).
        quality: 1-100, for lossy formats.
        lossless: Lose nothing, in formats that can.
        strip_metadata: Drop EXIF, GPS and XMP; colour stays right.
        background: Colour behind transparent pixels in formats without alpha.
    """
    from tasks.media import image

    options = _conversion_options(
        input,
        output,
        format=format,
        quality=quality,
        lossless=lossless,
        strip_metadata=strip_metadata,
        background=background,
    )
    return image.convert(input, output, options, **_hooks(self))


@app.task(**_IMAGE, validate=staticmethod(_renditions_options))
def image_renditions(
    self: Job,
    input: InputPath,
    output_dir: OutputPath,
    *,
    sizes: Sequence[int | str],
    formats: Sequence[str] = ("jpeg",),
    quality: int = 85,
    enlarge: bool = False,
    background: str = "white",
) -> dict[str, Any]:
    """Make many renditions of an image from one decode: every size in every format, all of them or none.

    Args:
        input: The image; its magic bytes say what it is, not its suffix.
        output_dir: Where `{stem}-{size}.{suffix}` are written.
        sizes: Widths in px (1600) or boxes ("1600x900").
        formats: Names of formats.
        quality: 1-100, for lossy formats.
        enlarge: Also make small images larger.
        background: Colour behind transparent pixels in formats without alpha.
    """
    from tasks.media import image

    options = _renditions_options(
        input, output_dir, sizes=sizes, formats=formats, quality=quality, enlarge=enlarge, background=background
    )
    return image.renditions(input, output_dir, options, **_hooks(self))


def _check_paths(input: str, output: str, *, is_directory: bool = False) -> None:
    """What can be seen at the call, where MEDIA_ROOTS may be set as well; the worker looks again, through links."""
    from tasks.media.sniff import resolved_within

    if input == output:
        raise PathNotAllowed(f"output {output} is the input itself; write to another file")
    if roots := app.settings.media_roots:
        resolved_within(input, roots)
        resolved_within(output, roots, parent_only=not is_directory)


def _hooks(job: Job) -> dict[str, Any]:
    """What every image function is given: the limits, and its ties to the job."""
    from tasks.media.sniff import Limits

    settings = app.settings
    return {
        "limits": Limits(
            max_pixels=settings.max_pixels,
            max_frames=settings.max_frames,
            max_input_bytes=settings.max_input_bytes,
            media_roots=settings.media_roots,
        ),
        "progress": job.progress,
        "confirm": job.confirm,
        "token": job.token,
    }
