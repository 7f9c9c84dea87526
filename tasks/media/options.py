"""What the image tasks can be told, validated where the job is submitted. Standard library only, no I/O.

Raw keyword arguments go in; a frozen object that holds only sensible values comes out, or `InvalidArguments` with
the argument, its limit and the remedy.
"""

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any, TypeGuard

from tasks.errors import InvalidArguments
from tasks.media.formats import Format, format_named, format_of_output, suggestion

MAX_SIDE_PX = 65_500  # the longest side of a JPEG (JPEG_MAX_DIMENSION of libjpeg)
MAX_RENDITIONS = 100
_EXAMPLES = {"sizes": "sizes=[400, '1600x900']", "formats": "formats=['webp', 'jpeg']"}
FITS = ("inside", "cover", "contain", "fill")

# The sixteen basic names of CSS (https://www.w3.org/TR/css-color-4/#named-colors); others are given as #rrggbb.
_COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "silver": (192, 192, 192),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "maroon": (128, 0, 0),
    "yellow": (255, 255, 0),
    "olive": (128, 128, 0),
    "lime": (0, 255, 0),
    "green": (0, 128, 0),
    "aqua": (0, 255, 255),
    "teal": (0, 128, 128),
    "blue": (0, 0, 255),
    "navy": (0, 0, 128),
    "fuchsia": (255, 0, 255),
    "purple": (128, 0, 128),
}


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """How an image is fitted into `width` x `height` (px; at least one; the other follows).

    `fit`: inside (whole image, at most this large), cover (fills the box, cropped at the centre), contain (whole
    image, padded to the box), fill (stretched; a side that is not given stays as it is). `preserve_aspect` is a
    shorthand: true means inside, false means fill. Without `enlarge` no pixel is ever scaled up. `background` fills
    what is transparent, or padded, in formats without alpha.
    """

    width: int | None = None
    height: int | None = None
    fit: str | None = None
    preserve_aspect: InitVar[bool | None] = None
    enlarge: bool = False
    quality: int = 85
    background: str = "white"

    def __post_init__(self, preserve_aspect: bool | None) -> None:
        if self.width is None and self.height is None:
            raise InvalidArguments("neither width nor height is given; give at least one of them, in pixels")
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), MAX_SIDE_PX, "px")
        for name, value in (("enlarge", self.enlarge), ("preserve_aspect", preserve_aspect)):
            if value is not None:
                _check_bool(name, value)
        object.__setattr__(self, "fit", _resolve_fit(self.fit, preserve_aspect))
        _check_int("quality", self.quality, 100)
        parse_colour(self.background)

    def format_for(self, output: str) -> Format:
        """The format of `output`, by its suffix."""
        return format_of_output(output, takes_name=False)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """How an image is rewritten: `format` (default: the output's suffix), `quality` 1-100, or `lossless`.

    `strip_metadata` drops EXIF (with its GPS position), XMP and profiles that sRGB pixels do not need.
    """

    format: str | None = None
    quality: int = 85
    lossless: bool = False
    strip_metadata: bool = True
    background: str = "white"

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", format_named(self.format).name)
        _check_int("quality", self.quality, 100)
        _check_bool("lossless", self.lossless)
        _check_bool("strip_metadata", self.strip_metadata)
        parse_colour(self.background)

    def format_for(self, output: str) -> Format:
        """The format of `output`; refused where it contradicts `format` or `lossless`."""
        target = format_of_output(output, self.format)
        if self.lossless and not target.can_be_lossless:
            raise InvalidArguments(
                f"lossless: {target.name} is always lossy; drop lossless, or write png, webp or tiff"
            )
        return target


@dataclass(frozen=True, kw_only=True)
class RenditionsOptions:
    """Many outputs of one input: each of `sizes` in each of `formats`.

    A size is a width in px (1600) or a box that the image is fitted into ("1600x900"); nothing is enlarged unless
    `enlarge` is set.
    """

    sizes: Sequence[int | str]
    formats: Sequence[str] = ("jpeg",)
    quality: int = 85
    enlarge: bool = False
    background: str = "white"

    def __post_init__(self) -> None:
        for name in ("sizes", "formats"):
            value = getattr(self, name)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
                raise InvalidArguments(
                    f"{name} is {value!r:.80}, a {type(value).__name__}; "
                    f"give a list of 1 to {MAX_RENDITIONS} entries, such as {_EXAMPLES[name]}"
                )
            object.__setattr__(self, name, tuple(value))
        if len(self.sizes) * len(self.formats) > MAX_RENDITIONS:
            raise InvalidArguments(
                f"sizes x formats makes {len(self.sizes) * len(self.formats)} outputs; the limit is {MAX_RENDITIONS}: "
                "submit several jobs"
            )
        object.__setattr__(self, "formats", tuple(format_named(name).name for name in self.formats))
        for size in self.sizes:
            self.resize_options(size)
        for name in ("sizes", "formats"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InvalidArguments(f"{name} names an entry twice: {list(getattr(self, name))}; name each once")

    def resize_options(self, size: int | str) -> ResizeOptions:
        """The resize that makes the rendition of this size."""
        width, height = _parse_size(size)
        return ResizeOptions(
            width=width, height=height, enlarge=self.enlarge, quality=self.quality, background=self.background
        )


def parse_colour(text: object) -> tuple[int, int, int]:
    """Red, green and blue (0-255) of `white`, `#fff` or `#ffffff`."""
    if not isinstance(text, str):
        raise InvalidArguments(f"background is {text!r}; give a colour such as 'white' or '#ffcc00'")
    if re.fullmatch(r"#(?:[0-9a-fA-F]{3}){1,2}", text, re.ASCII):
        digits = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
        return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)
    try:
        return _COLOURS[text.lower()]
    except KeyError:
        raise InvalidArguments(
            f"background {text!r} is no colour: give #rgb, #rrggbb or a basic name; {suggestion(text, _COLOURS)}"
        ) from None


def _resolve_fit(fit: Any, preserve_aspect: bool | None) -> str:
    if fit is None:
        return "fill" if preserve_aspect is False else "inside"
    if not isinstance(fit, str) or fit not in FITS:
        raise InvalidArguments(f"fit {fit!r} is unknown; {suggestion(str(fit), FITS)}")
    if preserve_aspect is not None and preserve_aspect == (fit == "fill"):
        raise InvalidArguments(
            f"preserve_aspect={preserve_aspect} contradicts fit={fit!r}: fill alone stretches; give only one of the two"
        )
    return fit


def _parse_size(size: object) -> tuple[int, int | None]:
    box = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size, re.ASCII) if isinstance(size, str) else None
    width, height = (int(box[1]), int(box[2])) if box is not None else (size, None)
    if not _is_side(width) or not (height is None or _is_side(height)):
        raise InvalidArguments(
            f"sizes holds {size!r:.80}; a width, or a box of width x height, takes whole numbers from 1 to "
            f"{MAX_SIDE_PX:,} px, such as {_EXAMPLES['sizes']}"
        )
    return width, height


def _is_side(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE_PX


def _check_int(name: str, value: object, highest: int, unit: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArguments(
            f"{name} is {value!r}, a {type(value).__name__}; give a whole number from 1 to {highest:,} {unit}".rstrip()
        )
    if not 1 <= value <= highest:
        raise InvalidArguments(f"{name} is {value:,}; give a whole number from 1 to {highest:,} {unit}".rstrip())
    return value


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidArguments(f"{name} is {value!r}, a {type(value).__name__}; give true or false")
