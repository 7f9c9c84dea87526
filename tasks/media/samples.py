"""A photo-like set of images, made on the spot: a directory in, the files in it out. For demonstrations and tests."""

from pathlib import Path
from typing import Any

from tasks.media.decode import engine


def make_photos(directory: str | Path) -> list[Path]:
    """Write landscapes of several megapixels and one image of every difficult kind; always the same bytes.

    The set holds EXIF orientation, alpha, CMYK, a palette, 16 bits a sample, a wide-gamut profile, grayscale, two
    animations, and one broken file, which is named so.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vips = engine()
    large = _landscape(4000, 3000, seed=7).copy_memory()
    small = large.thumbnail_image(1200)
    logo = _with_round_alpha(small.crop(200, 100, 640, 640))
    roll = _animation(small, frames=12)

    upright = large.rot270()  # stored on its side, shown upright by orientation 6
    upright.set_type(vips.GValue.gint_type, "orientation", 6)
    writes: list[tuple[str, Any, dict[str, Any]]] = [
        ("landscape.jpg", large, {"Q": 90, "keep": "none"}),
        ("orientation-6.jpg", upright, {"Q": 90}),
        ("gray.jpg", small.colourspace("b-w"), {"Q": 90, "keep": "none"}),
        ("cmyk.jpg", small.icc_transform("cmyk", input_profile="srgb"), {"Q": 90}),
        ("display-p3.jpg", small.icc_transform("p3", input_profile="srgb"), {"Q": 90}),
        ("alpha.png", logo, {"keep": "none"}),
        ("palette.png", small.crop(0, 0, 640, 480), {"palette": True, "keep": "none"}),
        ("16-bit.png", _deep(small.crop(0, 0, 640, 480)), {"keep": "none"}),
        ("animation.gif", roll, {"effort": 1, "keep": "none"}),
        ("animation.webp", roll, {"Q": 80, "effort": 0, "keep": "none"}),
    ]
    paths = []
    for name, image, options in writes:
        image.write_to_file(str(directory / name), **options)
        paths.append(directory / name)
    broken = directory / "broken-cut-off.jpg"
    whole = (directory / "landscape.jpg").read_bytes()
    broken.write_bytes(whole[: len(whole) // 3])
    return [*paths, broken]


def _landscape(width_px: int, height_px: int, *, seed: int) -> Any:
    """Sky, hills and grain from Perlin noise: smooth areas, edges and texture, as a photograph has them."""
    vips = engine()
    noise = _octaves(width_px, height_px, seed)
    down = vips.Image.xyz(width_px, height_px).extract_band(1) / height_px
    ridge = 0.45 + 0.25 * vips.Image.perlin(width_px, 1, cell_size=width_px // 5, seed=seed + 9)
    is_land = down > ridge.replicate(1, height_px)
    sky = (noise * 60 + 190 - down * 120).bandjoin([noise * 50 + 200 - down * 60, noise * 30 + 235 - down * 20])
    land = (noise * 90 + 110 - down * 40).bandjoin([noise * 110 + 130 - down * 30, noise * 60 + 70 - down * 40])
    grain = vips.Image.gaussnoise(width_px, height_px, sigma=4, mean=0, seed=seed)
    return (is_land.ifthenelse(land, sky) + grain).cast("uchar").copy(interpretation="srgb")


def _octaves(width_px: int, height_px: int, seed: int) -> Any:
    """Four octaves of Perlin noise, about -1 to 1; the coarse ones are made small and enlarged."""
    vips = engine()
    total = vips.Image.black(width_px, height_px)
    for octave, scale in enumerate((8, 4, 2, 1)):
        noise = vips.Image.perlin(width_px // scale, height_px // scale, cell_size=64, seed=seed + octave)
        total = total + noise.resize(scale, kernel="linear") * (scale / 15)
    return total


def _with_round_alpha(image: Any) -> Any:
    """A disc that fades to transparent at its rim."""
    vips = engine()
    radius = image.width / 2
    centred = vips.Image.xyz(image.width, image.height) - [radius, radius]
    distance = (centred[0] ** 2 + centred[1] ** 2) ** 0.5
    return image.bandjoin(((radius - distance) * 8).cast("uchar")).copy(interpretation="srgb")


def _deep(image: Any) -> Any:
    return (image.cast("ushort") * 257).cast("ushort").copy(interpretation="rgb16")


def _animation(image: Any, *, frames: int) -> Any:
    """A slow pan, as a roll; every fourth frame stays longer."""
    vips = engine()
    roll = vips.Image.arrayjoin([image.crop(20 * i, 240, 320, 240) for i in range(frames)], across=1).copy()
    roll.set_type(vips.GValue.gint_type, "page-height", 240)
    roll.set_type(vips.GValue.array_int_type, "delay", [200 if i % 4 == 0 else 80 for i in range(frames)])
    roll.set_type(vips.GValue.gint_type, "loop", 0)
    return roll
