"""Photos to resize: those of a camera where there are any, else made ones of the same size and texture."""

import os
from pathlib import Path

from benchmarks.measure import Options, Peer
from tests.tooling.worker import REPOSITORY

MEGAPIXELS = range(12, 17)


def photos(options: Options) -> tuple[list[str], str]:
    """Paths of JPEGs of 12 to 16 megapixels, and what they are, for the table."""
    folder = options.photos or Path(os.environ.get("BENCH_PHOTOS") or REPOSITORY.parent / "shared" / "samples")
    with Peer() as peer:
        found = peer.run(_camera_photos, str(folder)) if folder.is_dir() else []
        if found:
            return found, f"{len(found)} camera JPEGs of 12-16 MP"
        return peer.run(make_photos, str(options.folder / "photos")), "4 made, photo-like JPEGs of 12-16 MP"


def make_photos(folder: str) -> list[str]:
    from tasks.media.samples import make_photos as make_samples

    landscape = next(path for path in make_samples(folder) if path.name == "landscape.jpg")
    return [_scaled(landscape, width) for width in (4000, 4272, 4320, 4608)]


def make_large(folder: str) -> dict[str, str]:
    """A JPEG, a JPEG on its side and a PNG, each of 24 megapixels."""
    import pyvips

    from tasks.media.samples import make_photos as make_samples

    landscape = next(path for path in make_samples(folder) if path.name == "landscape.jpg")
    large = pyvips.Image.new_from_file(_scaled(landscape, 6000)).crop(0, 0, 6000, 4000)
    large.copy().write_to_file(f"{folder}/large.jpg", Q=90)
    large.copy().write_to_file(f"{folder}/large.png")
    on_its_side = large.copy()
    on_its_side.set_type(pyvips.GValue.gint_type, "orientation", 6)
    on_its_side.write_to_file(f"{folder}/large-orientation-6.jpg", Q=90)
    return {name: f"{folder}/{name}" for name in ("large.jpg", "large.png", "large-orientation-6.jpg")}


def _scaled(photo: Path, width_px: int) -> str:
    import pyvips

    path = photo.with_name(f"photo-{width_px}.jpg")
    image = pyvips.Image.new_from_file(str(photo))
    image.resize(width_px / image.width).write_to_file(str(path), Q=92)
    return str(path)


def _camera_photos(folder: str) -> list[str]:
    import pyvips

    found = []
    for path in sorted(Path(folder).glob("*.jp*g")):
        image = pyvips.Image.new_from_file(str(path))
        if image.width * image.height // 10**6 in MEGAPIXELS:
            found.append(str(path))
    return found
