"""Pixels of any colour space in, pixels in sRGB or gray out; a profile that is sRGB already is left alone."""

from typing import Any

from tasks.media.colour import colour_space, is_srgb
from tasks.media.decode import engine
from tasks.media.formats import Format


def in_srgb(image: Any, target: Format) -> Any:
    """Pixels in sRGB or gray: 16 bits a sample where they have them and the target can hold them, else 8."""
    is_16_bit = image.format == "ushort" and target.has_16_bit
    if image.interpretation == "cmyk":
        return image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=16 if is_16_bit else 8)
    image = _without_profile(image, is_16_bit)
    if image.interpretation in ("srgb", "b-w") and image.format == "uchar":
        return image
    if image.interpretation in ("rgb16", "grey16") and is_16_bit:
        return image
    return image.colourspace("b-w" if image.bands < 3 else "srgb").cast("uchar")


def _without_profile(image: Any, is_16_bit: bool) -> Any:
    """Convert through the embedded profile, unless it is sRGB; one that is broken or of another space is ignored."""
    if not image.get_typeof("icc-profile-data"):
        return image
    profile = image.get("icc-profile-data")
    if is_srgb(profile):
        return image
    is_gray = image.interpretation in ("b-w", "grey16")
    if colour_space(profile) == ("GRAY" if is_gray else "RGB"):
        try:
            converted = image.icc_transform("srgb", embedded=True, depth=16 if is_16_bit else 8)
        except engine().Error:
            pass
        else:
            return _gray(converted) if is_gray else converted
    image = image.copy()
    image.remove("icc-profile-data")
    return image


def _gray(image: Any) -> Any:
    """One band of a neutral RGB image, and its alpha."""
    gray = image.extract_band(0)
    if image.hasalpha():
        gray = gray.bandjoin(image.extract_band(image.bands - 1))
    gray = gray.copy(interpretation="grey16" if image.format == "ushort" else "b-w")
    gray.remove("icc-profile-data")
    return gray
