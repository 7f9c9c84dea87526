"""Is an ICC profile plain sRGB? Bytes of a profile in, yes or no out. Standard library only.

Converting pixels that are sRGB already costs more than resizing them, so the profile is measured, not trusted by its
name: primaries and tone curve against IEC 61966-2-1, in the tags of ICC.1:2022.
"""

import struct

_PRIMARIES = {  # adapted to D50
    b"rXYZ": (0.4361, 0.2225, 0.0139),
    b"gXYZ": (0.3851, 0.7169, 0.0971),
    b"bXYZ": (0.1431, 0.0606, 0.7141),
}
_PRIMARY_TOLERANCE = 0.003
_CURVE = {0.1: 0.01002, 0.5: 0.21404, 0.8: 0.60383}
_CURVE_TOLERANCE = 0.002


def is_srgb(profile: bytes) -> bool:
    """True when pixels under this profile look the same without it; false for what can't be read."""
    try:
        if colour_space(profile) != "RGB":
            return False
        tags = _tags(profile)
        return all(_near(_xyz(tags[tag]), wanted) for tag, wanted in _PRIMARIES.items()) and all(
            abs(_curve(tags[tag], x) - y) < _CURVE_TOLERANCE
            for tag in (b"rTRC", b"gTRC", b"bTRC")
            for x, y in _CURVE.items()
        )
    except (struct.error, KeyError, IndexError, ValueError, ArithmeticError, TypeError):  # a complex number: the last
        return False


def colour_space(profile: bytes) -> str:
    """`RGB`, `GRAY`, `CMYK`, ... as the profile's header says."""
    return profile[16:20].decode("latin-1").strip()


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(min(count, 100)))
    return {tag: profile[offset : offset + size] for tag, offset, size in entries}


def _xyz(tag: bytes) -> tuple[float, ...]:
    return tuple(value / 65536 for value in struct.unpack_from(">3i", tag, 8))


def _near(xyz: tuple[float, ...], wanted: tuple[float, ...]) -> bool:
    return all(abs(a - b) < _PRIMARY_TOLERANCE for a, b in zip(xyz, wanted, strict=True))


def _curve(tag: bytes, x: float) -> float:
    """The tone curve of a `curv` or `para` tag at x (0-1)."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return x
        if count == 1:
            return float(x ** (struct.unpack_from(">H", tag, 12)[0] / 256))
        at = x * (count - 1)
        low, high = struct.unpack_from(">2H", tag, 12 + 2 * int(at))
        return float((low + (high - low) * (at - int(at))) / 65535)
    (kind,) = struct.unpack_from(">H", tag, 8)
    size = (1, 3, 4, 5, 7)[kind]
    given = [value / 65536 for value in struct.unpack_from(f">{size}i", tag, 12)]
    g, a, b, c, d, e, f = given + [0.0] * (7 - size)
    if kind == 0:
        return float(x**g)
    if kind in (1, 2):
        return float((a * x + b) ** g + c) if x >= -b / a else c
    return float((a * x + b) ** g + e) if x >= d else c * x + f
