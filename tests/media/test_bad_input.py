"""What can't be done is refused: the right class, a message with file, limit and remedy, and nothing left behind."""

import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import (
    CorruptMedia,
    DiskFull,
    InputMissing,
    InvalidArguments,
    LimitExceeded,
    OutputNotWritable,
    PathNotAllowed,
    PermanentError,
    UnsupportedMedia,
)
from tasks.media.image import convert, renditions, resize
from tasks.media.options import ConversionOptions, RenditionsOptions, ResizeOptions
from tasks.media.sniff import Limits
from tests.media.conftest import files_under, gif, png, png_chunk
from tests.media.limits import LIMITS

ROOT = Path(__file__).parents[2]
WAYS: dict[str, Callable[[str, Path, Limits], Any]] = {
    "resize": lambda path, out, limits: resize(path, str(out / "out.webp"), ResizeOptions(width=100), limits=limits),
    "convert": lambda path, out, limits: convert(path, str(out / "out.png"), ConversionOptions(), limits=limits),
    "renditions": lambda path, out, limits: renditions(
        path, str(out), RenditionsOptions(sizes=[100, 50], formats=["webp", "png"]), limits=limits
    ),
}


@pytest.fixture(params=WAYS)
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """Run one of the functions on a file that it must refuse; returns the message."""

    def run(path: Path, error: type[Exception], *words: str, limits: Limits | None = None) -> str:
        out = tmp_path / "outputs"
        with pytest.raises(error) as caught:
            WAYS[request.param](str(path), out, limits or LIMITS)
        message = str(caught.value)
        assert type(caught.value) is error
        assert str(path) in message
        assert [word for word in words if word not in message] == []
        assert "\n" not in message
        assert files_under(out) == set()
        return message

    return run


def jpeg_of(width: int, height: int, image: Any) -> bytes:
    """A JPEG whose header announces another size."""
    content: bytes = image.jpegsave_buffer()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def test_a_missing_file_is_refused(refused, tmp_path):
    refused(tmp_path / "in.jpg", InputMissing, "does not exist", "check the path")


def test_a_directory_is_refused(refused, tmp_path):
    refused(tmp_path, InputMissing, "is a directory", "give the path of an image")


def test_an_empty_file_is_refused(refused, tmp_path):
    (tmp_path / "in.jpg").touch()
    refused(tmp_path / "in.jpg", InputMissing, "is empty", "upload it again")


def test_text_with_the_suffix_of_an_image_is_refused(refused, tmp_path):
    (tmp_path / "in.jpg").write_text("This is no picture.\n" * 100)
    refused(tmp_path / "in.jpg", UnsupportedMedia, "holds text, not an image", "must be jpeg, png")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused(refused, tmp_path, photos, kept):
    whole = (photos / "gray.jpg").read_bytes()
    (tmp_path / "in.jpg").write_bytes(whole[: int(len(whole) * kept)])
    refused(tmp_path / "in.jpg", CorruptMedia, "can't be decoded as jpeg", "upload it again")


def test_a_truncated_jpeg_on_its_side_is_refused(refused, tmp_path, photos):
    whole = (photos / "orientation-6.jpg").read_bytes()
    (tmp_path / "in.jpg").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "in.jpg", CorruptMedia, "can't be decoded as jpeg", "upload it again")


@pytest.mark.parametrize(
    "name",
    ["alpha.png", "palette.png", "16-bit.png", "animation.gif", "animation.webp", "cmyk.jpg", "in.tif", "in.avif"],
)
def test_half_of_any_image_is_refused(refused, tmp_path, photos, limits, name):
    source = photos / name
    if not source.exists():
        source = tmp_path / f"whole-{name}"
        convert(str(photos / "palette.png"), str(source), ConversionOptions(), limits=limits)
    whole = source.read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / name, CorruptMedia, "upload it again")


@pytest.mark.parametrize("name", ["in.bmp", "in.jp2", "in.heic"])
def test_half_of_an_image_that_pillow_reads_is_refused(refused, tmp_path, photos, name):
    image = pytest.importorskip("PIL.Image")
    if name == "in.heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    with image.open(photos / "palette.png") as picture:
        picture.convert("RGB").save(tmp_path / f"whole-{name}")
    whole = (tmp_path / f"whole-{name}").read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / name, CorruptMedia, "upload it again")


def test_a_png_bomb_is_refused(refused, tmp_path):
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(8193 * 256)) for _ in range(256)) + rows.flush()
    (tmp_path / "in.png").write_bytes(png(65_536, 65_536, bits=1, pixels=pixels))
    assert 500_000 < (tmp_path / "in.png").stat().st_size < 600_000
    refused(
        tmp_path / "in.png", LimitExceeded, "65,536 x 65,536 px (4.3 Gpx)", "150 Mpx (MAX_PIXELS): give a smaller one"
    )


def test_a_gif_of_100_000_frames_is_refused(refused, tmp_path):
    (tmp_path / "in.gif").write_bytes(gif(100_000))
    refused(tmp_path / "in.gif", LimitExceeded, "more than 1,000 frames", "1,000 (MAX_FRAMES): give a shorter one")


@pytest.mark.parametrize("way", ["resize", "convert"])
def test_a_bomb_costs_less_than_a_fifth_of_a_second_of_cpu(tmp_path, way):
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(bytes(8193 * 256)) for _ in range(256)) + rows.flush()
    (tmp_path / "bomb.png").write_bytes(png(65_536, 65_536, bits=1, pixels=pixels))
    (tmp_path / "bomb.gif").write_bytes(gif(100_000))
    code = (
        "import sys, time\n"
        "from tasks.errors import LimitExceeded\n"
        "from tasks.media.decode import engine\n"
        "from tasks.media.image import convert, resize\n"
        "from tasks.media.options import ConversionOptions, ResizeOptions\n"
        "from tests.media.limits import LIMITS\n"
        "options = {'convert': ConversionOptions(), 'resize': ResizeOptions(width=9)}\n"
        "engine()\n"
        "for name in ('bomb.png', 'bomb.gif'):\n"
        "    started = time.process_time()\n"
        "    try:\n"
        "        {'convert': convert, 'resize': resize}[sys.argv[2]](\n"
        "            f'{sys.argv[1]}/{name}', f'{sys.argv[1]}/out.webp', options[sys.argv[2]], limits=LIMITS)\n"
        "    except LimitExceeded:\n"
        "        print(time.process_time() - started)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), way]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = [float(line) for line in found.stdout.split()]
    assert len(seconds) == 2
    assert max(seconds) < 0.2


def test_the_frames_of_an_animation_count_as_pixels_unless_only_the_first_is_wanted(tmp_path):
    (tmp_path / "in.gif").write_bytes(gif(900, side=600))
    limits = replace(LIMITS, max_pixels=100_000_000)
    with pytest.raises(LimitExceeded, match=r"600 x 540,000 px \(324 Mpx\); the limit is 100 Mpx \(MAX_PIXELS\)"):
        resize(str(tmp_path / "in.gif"), str(tmp_path / "o.gif"), ResizeOptions(width=9), limits=limits)
    first = convert(str(tmp_path / "in.gif"), str(tmp_path / "o.png"), ConversionOptions(), limits=limits)
    assert (first["width"], first["height"]) == (600, 600)


def test_an_svg_and_what_it_refers_to_stay_closed(refused, tmp_path):
    (tmp_path / "in.svg").write_text(
        '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/>&x;</svg>'
    )
    refused(tmp_path / "in.svg", UnsupportedMedia, "is an SVG, which may refer to other files")
    (tmp_path / "in.svg").rename(tmp_path / "in.png")
    refused(tmp_path / "in.png", UnsupportedMedia, "is an SVG, which may refer to other files")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_png_with_a_vast_compressed_chunk_is_read_without_unpacking_it(tmp_path, kind):
    packed = zlib.compressobj(9)
    vast = b"".join(packed.compress(bytes(1_000_000)) for _ in range(400)) + packed.flush()
    chunk = png_chunk(kind, b"name\0\0" + vast)
    (tmp_path / "in.png").write_bytes(png(1, 1, chunks=chunk, pixels=zlib.compress(b"\0\7")))
    code = (
        "import re, sys\n"
        "from tasks.media.image import ConversionOptions, convert\n"
        "from tests.media.limits import LIMITS\n"
        "keep = ConversionOptions(strip_metadata=False)\n"
        "convert(sys.argv[1] + '/in.png', sys.argv[1] + '/out.png', keep, limits=LIMITS)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 100_000


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_a_png_without_width_or_height_is_refused(refused, tmp_path, width, height):
    (tmp_path / "in.png").write_bytes(png(width, height, pixels=zlib.compress(b"\0")))
    refused(tmp_path / "in.png", CorruptMedia, "upload it again")


def test_a_jpeg_whose_header_announces_more_than_the_limit_is_refused(refused, tmp_path, quadrants):
    (tmp_path / "in.jpg").write_bytes(jpeg_of(65_500, 65_500, quadrants))
    refused(tmp_path / "in.jpg", LimitExceeded, "65,500 x 65,500 px (4.3 Gpx)", "MAX_PIXELS")


def test_a_bmp_whose_header_announces_more_than_the_limit_is_refused(refused, tmp_path):
    pytest.importorskip("PIL")
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "in.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    refused(tmp_path / "in.bmp", LimitExceeded, "60,000 x 60,000 px (3.6 Gpx)", "MAX_PIXELS")


def test_an_input_with_too_many_bytes_is_refused(refused, tmp_path):
    (tmp_path / "in.gif").write_bytes(gif(1))
    refused(
        tmp_path / "in.gif",
        LimitExceeded,
        "9 (MAX_INPUT_BYTES): give a smaller one",
        limits=replace(LIMITS, max_input_bytes=9),
    )


def test_an_input_outside_of_the_media_roots_is_refused(refused, tmp_path, photos):
    limits = replace(LIMITS, media_roots=(str(tmp_path),))
    refused(photos / "gray.jpg", PathNotAllowed, "lies outside of", "(MEDIA_ROOTS)", limits=limits)


def test_an_output_outside_of_the_media_roots_is_refused(tmp_path, photos):
    limits = replace(LIMITS, media_roots=(str(photos),))
    for way in WAYS.values():
        with pytest.raises(PathNotAllowed, match=r"outside of .*\(MEDIA_ROOTS\)"):
            way(str(photos / "gray.jpg"), tmp_path / "outputs", limits)
    assert files_under(tmp_path) == set()


def test_an_output_that_is_the_input_is_refused(tmp_path, limits, quadrants):
    path = tmp_path / "in.png"
    quadrants.pngsave(str(path))
    before = path.read_bytes()
    (tmp_path / "same.png").symlink_to(path)
    for output in (path, tmp_path / "same.png"):
        with pytest.raises(PathNotAllowed, match=r"is the input .* itself; write to another file"):
            resize(str(path), str(output), ResizeOptions(width=10), limits=limits)
        with pytest.raises(PathNotAllowed, match=r"is the input .* itself; write to another file"):
            convert(str(path), str(output), ConversionOptions(), limits=limits)
    path.rename(tmp_path / "in-10.png")
    path.symlink_to(tmp_path / "in-10.png")
    options = RenditionsOptions(sizes=[10], formats=["png"])
    with pytest.raises(PathNotAllowed, match=r"is the input .* itself; write to another file"):
        renditions(str(tmp_path / "in.png"), str(tmp_path), options, limits=limits)
    assert (tmp_path / "in-10.png").read_bytes() == before


def test_an_output_with_an_unknown_suffix_is_refused_before_the_input_is_looked_at(tmp_path, limits):
    with pytest.raises(InvalidArguments, match=r"suffix \.jgp can't be written; did you mean jpg\?"):
        resize(str(tmp_path / "none"), str(tmp_path / "out.jgp"), ResizeOptions(width=10), limits=limits)


def test_an_output_below_a_file_is_refused(tmp_path, limits, photos):
    (tmp_path / "outputs").write_text("a file")
    for way in WAYS.values():
        with pytest.raises(
            OutputNotWritable, match=r"outputs/.* can't be written: a file stands .*; move that away, or"
        ):
            way(str(photos / "gray.jpg"), tmp_path / "outputs", limits)
    assert files_under(tmp_path) == {"outputs"}


def test_an_output_larger_than_its_format_is_refused(tmp_path, limits, plain):
    plain([1, 2, 3], 17_000, 2).pngsave(str(tmp_path / "in.png"))
    with pytest.raises(LimitExceeded, match=r"o.webp would be 17,000 x 2 px; webp holds at most 16,383 px a side"):
        convert(str(tmp_path / "in.png"), str(tmp_path / "o.webp"), ConversionOptions(), limits=limits)
    assert files_under(tmp_path) == {"in.png"}


def test_an_enlargement_beyond_the_limit_is_refused(tmp_path, limits, quadrants):
    quadrants.pngsave(str(tmp_path / "in.png"))
    options = ResizeOptions(width=60_000, enlarge=True)
    with pytest.raises(LimitExceeded, match=r"would take 60,000 x 40,000 px; .*MAX_PIXELS\): give a smaller width"):
        resize(str(tmp_path / "in.png"), str(tmp_path / "o.png"), options, limits=limits)
    assert files_under(tmp_path) == {"in.png"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif", "gif", "bmp"])
def test_a_full_disk_is_a_transient_error_that_names_the_output(small_disk, photos, limits, suffix):
    output = small_disk / f"out.{suffix}"
    options = ConversionOptions(quality=100)
    with pytest.raises(DiskFull, match=r"disk/out.*No space left.*free space"):
        convert(str(photos / "palette.png"), str(output), options, limits=limits)
    assert files_under(small_disk) == set()


def test_no_descriptor_is_left_open_after_an_error(tmp_path, limits, photos):
    (tmp_path / "in.jpg").write_bytes((photos / "gray.jpg").read_bytes()[:30_000])
    counts = []
    for _ in range(3):
        for way in WAYS.values():
            with pytest.raises(CorruptMedia):
                way(str(tmp_path / "in.jpg"), tmp_path / "outputs", limits)
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif", "gif", "bmp", "heic"])
def test_a_damaged_image_is_written_or_refused_and_nothing_else(tmp_path, photos, limits, suffix):
    if suffix == "heic":
        pytest.importorskip("pillow_heif")
    whole = tmp_path / f"whole.{suffix}"
    resize(str(photos / "animation.gif"), str(whole), ResizeOptions(width=48), limits=limits)
    chance = random.Random(suffix)  # noqa: S311 - the same damage each time
    for _ in range(60):
        damaged = bytearray(whole.read_bytes())
        for _ in range(chance.choice((1, 3, 10))):
            damaged[chance.randrange(min(len(damaged), chance.choice((40, 300, 10**9))))] = chance.randrange(256)
        (tmp_path / "in").write_bytes(damaged)
        out = tmp_path / "outputs"
        written: dict[str, Any] = {}
        with suppress(PermanentError):
            written = resize(str(tmp_path / "in"), str(out / "out.webp"), ResizeOptions(width=20), limits=limits)
        assert files_under(out) == ({"out.webp"} if written else set())
        (out / "out.webp").unlink(missing_ok=True)
