"""What each image format can hold, and which one a name or a suffix means. Standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from tasks.errors import InvalidArguments


@dataclass(frozen=True)
class Format:
    """One writable format. `max_side_px` is the most that its header or its encoder takes."""

    name: str
    suffixes: tuple[str, ...]
    has_alpha: bool
    has_frames: bool
    has_16_bit: bool
    can_be_lossless: bool
    max_side_px: int


FORMATS = {
    f.name: f
    for f in (
        Format("jpeg", ("jpg", "jpeg", "jpe", "jfif"), False, False, False, False, 65_500),  # libjpeg's own limit
        Format("png", ("png",), True, False, True, True, 2**31 - 1),
        Format("webp", ("webp",), True, True, False, True, 16_383),
        Format("avif", ("avif",), True, False, True, True, 16_384),
        Format("tiff", ("tif", "tiff"), True, False, True, True, 2**31 - 1),
        Format("gif", ("gif",), True, True, False, True, 65_535),
        Format("bmp", ("bmp",), False, False, False, True, 32_767),
        Format("heic", ("heic", "heif"), True, False, False, True, 16_384),
        Format("jxl", ("jxl",), True, False, False, True, 2**30 - 1),
    )
}
READ_ONLY = ("jp2",)
PILLOW_NAMES = {"bmp": "BMP", "jp2": "JPEG2000", "heic": "HEIF", "jxl": "JXL"}
"""The formats that libvips leaves to Pillow, and what that calls them."""
_BY_SUFFIX = {suffix: f.name for f in FORMATS.values() for suffix in f.suffixes}


def format_named(name: object) -> Format:
    """The format that a `format` argument names, by its name or one of its suffixes (`jpg` is jpeg)."""
    if not isinstance(name, str):
        raise InvalidArguments(f"format is {name!r}; give one of {', '.join(FORMATS)}")
    found = _BY_SUFFIX.get(name.lower().removeprefix("."))
    if found is None:
        raise InvalidArguments(f"format {name!r} can't be written; {suggestion(name, FORMATS)}")
    return FORMATS[found]


def format_of_output(output: str, name: str | None = None, *, takes_name: bool = True) -> Format:
    """The format of an output path: `name` if given, else what its suffix says; they may not contradict each other.

    `takes_name` is whether the task could have been told a name.
    """
    suffix = PurePath(output).suffix.lower().removeprefix(".")
    by_suffix = _BY_SUFFIX.get(suffix)
    if name is not None:
        wanted = format_named(name)
        if by_suffix is not None and by_suffix != wanted.name:
            raise InvalidArguments(
                f"output {output} has the suffix of {by_suffix}, but format says {wanted.name}; change one of them"
            )
        return wanted
    if not suffix:
        remedy = f"add one of {', '.join(_BY_SUFFIX)}{', or give format' if takes_name else ''}"
        raise InvalidArguments(f"output {output} has no suffix; {remedy}")
    if by_suffix is None:
        raise InvalidArguments(
            f"output {output}: the suffix .{suffix} can't be written; {suggestion(suffix, _BY_SUFFIX)}"
        )
    return FORMATS[by_suffix]


def suggestion(name: str, known: Iterable[str]) -> str:
    """'did you mean webp? Choose from ...': all that is known, and before it what a slip of the hand away is."""
    from difflib import get_close_matches

    names = list(known)
    swapped = [other for other in names if sorted(other) == sorted(name.lower())]
    near = swapped or get_close_matches(name.lower(), names, n=1, cutoff=0.75)
    choice = f"hoose from {', '.join(names)}"
    return f"did you mean {near[0]}? C{choice}" if near else f"c{choice}"
