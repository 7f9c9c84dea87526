"""Resize, convert and make renditions of images: paths and options in, files and a small dict out.

Each function checks everything that can be checked before a pixel is decoded, decodes once in one streaming pass, and
writes its outputs atomically. Running one twice writes the same bytes again.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import LimitExceeded
from tasks.media.decode import corrupt, engine, open_image
from tasks.media.encode import encode
from tasks.media.formats import FORMATS, Format
from tasks.media.frames import each_frame, first_frame_unless, frames_in, upright, upright_size
from tasks.media.geometry import Layout, layout
from tasks.media.options import ConversionOptions, RenditionsOptions, ResizeOptions, parse_colour
from tasks.media.output import Staged, atomic_outputs, raise_for_write_error
from tasks.media.progress import Progress, telling
from tasks.media.release import releasing
from tasks.media.sniff import Input, Limits, check_output, open_input
from tasks.media.srgb import in_srgb

Confirm = Callable[[], None]


@releasing
def resize(
    input: str,  # noqa: A002 - the public name of the argument
    output: str,
    options: ResizeOptions,
    *,
    limits: Limits,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Write `input`, fitted into the options' box, to `output`: upright, in sRGB, 8 bits a sample, without metadata.

    Animations stay animated where the output's format can hold them. `progress` is told percents (those of webp, avif,
    gif, heic and jxl rest at 5 until they are encoded), `confirm` is called before the output appears, `token` names
    the temp file (see `atomic_outputs`).

    Returns:
        output, format, width, height (px), size_bytes, and frames of an animation.

    Raises:
        PermanentError: one of its kinds; bad input or arguments.
        DiskFull: no space left; transient.
    """
    target = options.format_for(output)
    with open_input(input, limits) as source:
        check_output(output, source, limits)
        image = _open_for(source, limits, target)
        plan = layout(*upright_size(image), options)
        _check_target(output, target, plan, frames_in(image), limits)
        image = _shrunk_on_load(source, image, plan, limits)
        with atomic_outputs([output], token=token, confirm=confirm) as (staged,), _decoding(source):
            image = _fitted(image, plan, target, options.background)
            with telling(image, target, progress):
                result = _write(image, staged, source, target, quality=options.quality)
    return result


@releasing
def convert(
    input: str,  # noqa: A002 - the public name of the argument
    output: str,
    options: ConversionOptions,
    *,
    limits: Limits,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Write `input` to `output` in another format, at its own size: upright and in sRGB.

    16-bit samples, alpha and frames stay where the target can hold them. Arguments, result and errors as for `resize`.
    """
    target = options.format_for(output)
    with open_input(input, limits) as source:
        check_output(output, source, limits)
        image = _open_for(source, limits, target)
        width, height = upright_size(image)
        _check_target(output, target, Layout(width, height, width, height), frames_in(image), limits)
        with atomic_outputs([output], token=token, confirm=confirm) as (staged,), _decoding(source):
            image = _flattened(in_srgb(upright(image), target), target, options.background)
            keep = "none" if options.strip_metadata else "all"
            with telling(image, target, progress):
                result = _write(
                    image, staged, source, target, quality=options.quality, lossless=options.lossless, keep=keep
                )
    return result


@releasing
def renditions(
    input: str,  # noqa: A002 - the public name of the argument
    output_dir: str,
    options: RenditionsOptions,
    *,
    limits: Limits,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Write every size in every format to `output_dir/{stem}-{size}.{suffix}`, from one decode; all of them or none.

    The input is decoded to the largest size, from which the others are made. Returns {"outputs": [...]}, each as
    `resize` returns it; errors as for `resize`.
    """
    targets = [FORMATS[name] for name in options.formats]
    wanted = [(size, target) for size in options.sizes for target in targets]
    paths = [str(Path(output_dir) / f"{Path(input).stem}-{size}.{target.suffixes[0]}") for size, target in wanted]
    with open_input(input, limits) as source:
        for path in paths:
            check_output(path, source, limits)
        image = _open_for(source, limits, *targets)
        plans = {size: layout(*upright_size(image), options.resize_options(size)) for size in options.sizes}
        for path, (size, target) in zip(paths, wanted, strict=True):
            _check_target(path, target, plans[size], frames_in(image), limits)
        with atomic_outputs(paths, token=token, confirm=confirm) as outputs, _decoding(source):
            largest = max(plans.values(), key=lambda plan: plan.width_px)
            image = _shrunk_on_load(source, image, largest, limits)
            decoded = each_frame(image, lambda frame: _scaled(frame, largest)).copy_memory()
            results = []
            for staged, (size, target) in zip(outputs, wanted, strict=True):
                rendition = _fitted(first_frame_unless(decoded, target), plans[size], target, options.background)
                results.append(_write(rendition, staged, source, target, quality=options.quality))
                if progress is not None:
                    progress(100.0 * len(results) / len(wanted))
    return {"outputs": results}


def _open_for(source: Input, limits: Limits, *targets: Format) -> Any:
    return open_image(source, limits, all_frames=any(target.has_frames for target in targets))


def _check_target(output: str, target: Format, plan: Layout, frames: int, limits: Limits) -> None:
    """Refuse an output larger than its format or the limits allow."""
    longest = max(plan.width_px, plan.height_px)
    if longest > target.max_side_px:
        raise LimitExceeded(
            f"{output} would be {plan.width_px:,} x {plan.height_px:,} px; {target.name} holds at most "
            f"{target.max_side_px:,} px a side: make it smaller, or write another format"
        )
    for width, height in {(plan.width_px, plan.height_px), (plan.scaled_width_px, plan.scaled_height_px)}:
        if width * height * frames > limits.max_pixels:
            raise LimitExceeded(
                f"{output} would take {width:,} x {height:,} px{f' x {frames:,} frames' if frames > 1 else ''}; "
                f"the limit is {limits.max_pixels:,} px (MAX_PIXELS): give a smaller width or height"
            )


def _shrunk_on_load(source: Input, image: Any, plan: Layout, limits: Limits) -> Any:
    """Decoded smaller, but at least twice as large as wanted, so that the final resize sets the quality.

    For jpeg that is the rule of vips_thumbnail; a whole webp of 24 Mpx would take 200 MB.
    """
    if source.format not in ("jpeg", "webp") or frames_in(image) > 1:
        return image
    width, height = upright_size(image)
    ratio = min(width / plan.scaled_width_px, height / plan.scaled_height_px)
    shrink = ratio / 2 if source.format == "webp" else next((n for n in (8, 4, 2) if ratio >= 2 * n), 1)
    return image if shrink <= 1 else open_image(source, limits, shrink=shrink)


def _fitted(image: Any, plan: Layout, target: Format, background: str) -> Any:
    def fit(frame: Any) -> Any:
        scaled = _flattened(in_srgb(_scaled(frame, plan), target), target, background)
        return _cropped_or_padded(scaled, plan, background)

    return each_frame(image, fit)


def _scaled(frame: Any, plan: Layout) -> Any:
    return frame.thumbnail_image(plan.scaled_width_px, height=plan.scaled_height_px, size="force")


def _flattened(image: Any, target: Format, background: str) -> Any:
    if target.has_alpha or not image.hasalpha():
        return image
    image, colour = _with_colour(image, background)
    return image.flatten(background=colour)


def _cropped_or_padded(image: Any, plan: Layout, background: str) -> Any:
    width, height = plan.width_px, plan.height_px
    if image.width > width or image.height > height:
        return image.crop((image.width - width) // 2, (image.height - height) // 2, width, height)
    if (image.width, image.height) == (width, height):
        return image
    if image.hasalpha():
        colour = [0] * image.bands
    else:
        image, colour = _with_colour(image, background)
    return image.gravity("centre", width, height, extend="background", background=colour)


def _with_colour(image: Any, background: str) -> tuple[Any, list[int]]:
    """The background in the image's bands; a gray image becomes RGB when the colour is not gray."""
    colour = list(parse_colour(background))
    if image.interpretation != "b-w":
        return image, colour
    if len(set(colour)) == 1:
        return image, colour[:1]
    return image.colourspace("srgb"), colour


def _write(
    image: Any,
    staged: Staged,
    source: Input,
    target: Format,
    *,
    quality: int,
    lossless: bool = False,
    keep: str = "none",
) -> dict[str, Any]:
    with _decoding(source, staged):
        encode(image, staged.fd, target, quality=quality, lossless=lossless, keep=keep)
    frames = frames_in(image)
    return {
        "output": str(staged.path),
        "format": target.name,
        "width": image.width,
        "height": image.height // frames,
        **({"frames": frames} if frames > 1 else {}),
        "size_bytes": os.fstat(staged.fd).st_size,
    }


@contextmanager
def _decoding(source: Input, staged: Staged | None = None) -> Iterator[None]:
    """Say whether the input or the disk was at fault: libvips decodes while it writes, and tells only in words."""
    try:
        yield
    except OSError as exc:
        if staged is not None:
            raise_for_write_error(exc, staged.path)
        raise
    except engine().Error as exc:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if staged is not None and os.strerror(code) in str(exc):
                raise_for_write_error(OSError(code, os.strerror(code)), staged.path)
        raise corrupt(source, exc) from exc
