"""Images that the tests make themselves, and a folder of real photographs where there is one."""

import json
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tasks.media.decode import engine
from tasks.media.engines import try_all
from tasks.media.samples import make_photos
from tasks.media.sniff import Limits
from tests.media.limits import LIMITS

REAL_PHOTOS = Path(__file__).parents[2].parent / "shared" / "samples"


@pytest.fixture(scope="session")
def vips() -> Any:
    return engine()


@pytest.fixture
def limits() -> Limits:
    return LIMITS


@pytest.fixture
def lacks() -> Callable[[], dict[str, str]]:
    """Asks the engines anew, here in this process: {format that can't be read or written here: why}."""

    def ask() -> dict[str, str]:
        answers = StringIO()
        try_all(["pyvips"], answers)
        *formats, pyvips = map(json.loads, answers.getvalue().splitlines())
        assert pyvips == {"module": "pyvips", "reason": None}
        return {found["format"]: found["reason"] for found in formats}

    return ask


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("photos")
    make_photos(directory)
    return directory


@pytest.fixture(scope="session")
def real_photos() -> list[Path]:
    found = sorted(REAL_PHOTOS.glob("*.jpg"))
    if not found:
        pytest.skip("no folder of real photographs (../shared/samples)")
    return found


@pytest.fixture
def plain(vips: Any) -> Callable[..., Any]:
    """An image of one colour."""

    def make(colour: list[int], width: int = 60, height: int = 40) -> Any:
        image = (vips.Image.black(width, height) + colour).cast("uchar")
        return image.copy(interpretation="b-w" if len(colour) < 3 else "srgb")

    return make


@pytest.fixture
def quadrants(plain: Callable[..., Any], vips: Any) -> Any:
    """60 x 40: red and green above, blue and white below; shows every rotation, mirroring and crop."""
    tiles = [plain(c, 30, 20) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255])]
    return vips.Image.arrayjoin(tiles, across=2)


@pytest.fixture
def roll(plain: Callable[..., Any], vips: Any) -> Any:
    """Three frames of 40 x 30: red, green, blue, for 100, 200 and 300 ms, played three times."""
    frames = [plain(c, 40, 30) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255])]
    image = vips.Image.arrayjoin(frames, across=1).copy()
    image.set_type(vips.GValue.gint_type, "page-height", 30)
    image.set_type(vips.GValue.array_int_type, "delay", [100, 200, 300])
    image.set_type(vips.GValue.gint_type, "loop", 3)
    return image


@pytest.fixture
def load(vips: Any) -> Callable[..., Any]:
    """A written file, decoded with all its frames."""

    def read(path: str | Path, **options: Any) -> Any:
        return vips.Image.new_from_file(str(path), **options)

    return read


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def pixel(image: Any, x: int, y: int) -> list[int]:
    return [round(value) for value in image.getpoint(x, y)]


def near(found: list[int], wanted: list[int], tolerance: int = 6) -> bool:
    return len(found) == len(wanted) and all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def png(width: int, height: int, *, chunks: bytes = b"", pixels: bytes = b"", bits: int = 8) -> bytes:
    """A gray PNG of any announced size, around any compressed pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def gif(frames: int, side: int = 4) -> bytes:
    """A GIF with this many tiny frames in two colours."""
    header = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x04\x05\0\0\0" + b"\x2c" + struct.pack("<HHHH", 0, 0, 4, 4) + b"\0\x02\x03\x84\x8f\x51\0"
    return header + frame * frames + b";"


def files_under(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
