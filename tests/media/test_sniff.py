import os
import struct
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import CorruptMedia, InputMissing, LimitExceeded, PathNotAllowed, UnsupportedMedia
from tasks.media.sniff import check_output, open_input, sniff
from tests.media.conftest import gif
from tests.media.limits import LIMITS


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + brand + b"\0\0\0\0" + b"".join(compatible)
    return struct.pack(">I", len(body) + 4) + body


@pytest.mark.parametrize(
    ("head", "media_format"),
    [
        (b"\xff\xd8\xff\xe1", "jpeg"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"RIFF\n\n\n\nWEBPVP8X", "webp"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"II+\0", "tiff"),
        (b"BM" + bytes(12) + b"\x28\0\0\0", "bmp"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
        (b"\xff\x4f\xff\x51", "jp2"),
        (b"\xff\x0a\xfa", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
        (ftyp(b"avif", b"mif1", b"miaf"), "avif"),
        (ftyp(b"mif1", b"avif"), "avif"),
        (ftyp(b"heic", b"mif1"), "heic"),
        (ftyp(b"mif1", b"heic"), "heic"),
    ],
)
def test_magic_bytes_name_the_format(head, media_format):
    assert sniff(head) == media_format


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"<svg xmlns='x'>", "an SVG"),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg>", "an SVG"),
        (b"\xef\xbb\xbf <!DOCTYPE svg><SVG>", "an SVG"),
        (b"%PDF-1.7", "a PDF"),
        (b"%!PS-Adobe", "PostScript"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04", "ZIP"),
        (ftyp(b"isom", b"mp42"), "a video"),
        (b"#EXTM3U\n", "a video"),
        (b"BMW is a car", "holds text"),
        ("grüße".encode(), "holds text"),
        (b"\0\1\2\3\4", "00 01 02 03 04"),
    ],
)
def test_what_is_no_image_is_named_for_what_it_looks_like(head, words):
    with pytest.raises(UnsupportedMedia, match=r"/in/photo\.jpg") as refused:
        sniff(head, "/in/photo.jpg")
    assert words in str(refused.value)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_format_or_refused(head):
    with suppress(UnsupportedMedia):
        assert isinstance(sniff(head), str)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: None, InputMissing, "does not exist"),
        (lambda p: p.mkdir(), InputMissing, "is a directory"),
        (lambda p: p.write_bytes(b""), InputMissing, "is empty"),
        (lambda p: os.mkfifo(p), InputMissing, "is a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), InputMissing, "is a device"),
        (lambda p: p.symlink_to(p), PathNotAllowed, "can't be resolved"),
        (lambda p: p.symlink_to(p.parent / "gone"), InputMissing, "does not exist"),
    ],
)
def test_a_path_without_a_regular_file_is_refused(tmp_path, limits, make, error, words):
    path = tmp_path / "in.jpg"
    make(path)
    with pytest.raises(error, match=words) as refused, open_input(str(path), limits):
        pytest.fail("must not open")
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("path", ["in.jpg", "./in.jpg", "s3://bucket/in.jpg", ""])
def test_a_relative_path_is_refused(limits, path):
    with pytest.raises(PathNotAllowed, match="not an absolute local path"), open_input(path, limits):
        pytest.fail("must not open")


@pytest.mark.parametrize("path", ["/a\0b.jpg", "/" + "a" * 5000, "/" + "a/" * 3000])
def test_a_path_that_no_file_can_have_is_refused(limits, path):
    with pytest.raises((PathNotAllowed, InputMissing)), open_input(path, limits):
        pytest.fail("must not open")


def test_a_file_over_the_byte_limit_is_refused(tmp_path):
    path = tmp_path / "in.gif"
    path.write_bytes(gif(1))
    with (
        pytest.raises(LimitExceeded, match=r"in.gif has \d+ bytes; the limit is 10 \(MAX_INPUT_BYTES\)"),
        open_input(str(path), replace(LIMITS, max_input_bytes=10)),
    ):
        pytest.fail("must not open")


def test_paths_outside_of_the_media_roots_are_refused_even_through_symlinks(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "other"
    inside.mkdir()
    outside.mkdir()
    (outside / "in.gif").write_bytes(gif(1))
    (inside / "link.gif").symlink_to(outside / "in.gif")
    (inside / "door").symlink_to(outside)
    (inside / "ok.gif").write_bytes(gif(1))
    limits = replace(LIMITS, media_roots=(str(inside),))

    for path in (
        outside / "in.gif",
        inside / "link.gif",
        inside / "door" / "in.gif",
        inside / ".." / "other" / "in.gif",
    ):
        with pytest.raises(PathNotAllowed, match=r"outside of .*media \(MEDIA_ROOTS\)"), open_input(str(path), limits):
            pytest.fail("must not open")
    with open_input(str(inside / "ok.gif"), limits) as source:
        check_output(str(inside / "new" / "out.gif"), source, limits)
        for path in (outside / "out.gif", inside / "door" / "out.gif", tmp_path / "media-too" / "out.gif"):
            with pytest.raises(PathNotAllowed, match="MEDIA_ROOTS"):
                check_output(str(path), source, limits)


def test_the_output_may_not_be_the_input_under_any_name(tmp_path, limits):
    path = tmp_path / "in.gif"
    path.write_bytes(gif(1))
    (tmp_path / "soft.gif").symlink_to(path)
    (tmp_path / "hard.gif").hardlink_to(path)
    (tmp_path / "sub").mkdir()
    with open_input(str(path), limits) as source:
        for name in ("in.gif", "soft.gif", "hard.gif", "sub/../in.gif"):
            with pytest.raises(PathNotAllowed, match=r"is the input .* itself; write to another file"):
                check_output(f"{tmp_path}/{name}", source, limits)
        check_output(str(tmp_path / "out.gif"), source, limits)


@settings(deadline=None, max_examples=50)
@given(frames=st.integers(1, 30))
def test_frames_of_a_gif_are_counted(tmp_path_factory, frames):
    path = tmp_path_factory.mktemp("gif") / "in.gif"
    path.write_bytes(gif(frames))
    with open_input(str(path), replace(LIMITS, max_frames=30)) as source:
        assert source.frames == frames


def test_frames_of_a_real_animation_are_counted(photos, limits):
    for name in ("animation.gif", "animation.webp"):
        with open_input(str(photos / name), limits) as source:
            assert source.frames == 12


def test_one_frame_too_many_is_refused(tmp_path):
    path = tmp_path / "in.gif"
    path.write_bytes(gif(31))
    with pytest.raises(LimitExceeded, match="MAX_FRAMES"), open_input(str(path), replace(LIMITS, max_frames=30)):
        pytest.fail("must not open")


def test_a_gif_that_ends_inside_a_frame_is_corrupt(tmp_path, limits):
    path = tmp_path / "in.gif"
    path.write_bytes(gif(1)[:-3])
    with pytest.raises(CorruptMedia, match="cut off"), open_input(str(path), limits):
        pytest.fail("must not open")


def test_counting_is_bounded_by_the_limit_and_not_by_the_file(tmp_path):
    path = tmp_path / "in.gif"
    header = gif(1)[:-1]
    path.write_bytes(header + (b"\x21\xfe" + (b"\xff" + bytes(255)) * 200_000 + b"\0") + b";")  # 51 MB of comment
    started = time.process_time()
    with open_input(str(path), LIMITS) as source:
        assert source.frames == 1
    assert time.process_time() - started < 1


def test_no_descriptor_is_left_open(tmp_path, limits):
    path = tmp_path / "in.gif"
    path.write_bytes(gif(1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_input(str(path), limits):
        pass
    path.write_bytes(b"text")
    with pytest.raises(UnsupportedMedia), open_input(str(path), limits):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
