"""An error that somebody keeps holds nothing of what the failed function had open."""

import gc
import os
import traceback
from pathlib import Path

import pytest

from tasks.errors import AttemptLost, CorruptMedia, DiskFull
from tasks.media.image import convert, resize
from tasks.media.options import ConversionOptions, ResizeOptions


@pytest.fixture(autouse=True)
def _no_collector():
    """What is free only when the collector runs is not free yet."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def descriptors(tmp_path):
    """`descriptors()` is what this process has open below the test's directory."""

    def below() -> list[str]:
        paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return [path for path in paths if path.startswith(str(tmp_path))]

    return below


@pytest.fixture
def noise(vips, tmp_path):
    path = tmp_path / "noise.png"
    vips.Image.gaussnoise(400, 400).cast("uchar").pngsave(str(path))
    return path


def kept(error: type[BaseException], call, *args, **options) -> BaseException:
    with pytest.raises(error) as caught:
        call(*args, **options)
    return caught.value


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif"])
def test_a_corrupt_input_and_its_temp_file_are_closed(tmp_path, vips, limits, descriptors, suffix):
    whole = tmp_path / f"in.{suffix}"
    vips.Image.gaussnoise(400, 400).cast("uchar").write_to_file(str(whole))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    error = kept(CorruptMedia, resize, str(whole), str(tmp_path / "o.png"), ResizeOptions(width=99), limits=limits)

    assert descriptors() == []
    lines = "".join(traceback.format_exception(error))
    assert "in resize" in lines
    assert "in open_image" in lines or "in encode" in lines


def test_an_attempt_that_lost_its_job_has_nothing_open(tmp_path, noise, limits, descriptors, monkeypatch):
    monkeypatch.setattr("tasks.media.progress._TOLD_FROM_PIXELS", 1)

    def lost(_percent: float = 0) -> None:
        raise AttemptLost("another worker has it")

    for hook in ("progress", "confirm"):
        options = {"limits": limits, hook: lost}
        kept(AttemptLost, convert, str(noise), str(tmp_path / "o.tif"), ConversionOptions(), **options)
        assert descriptors() == []


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_a_full_disk_gets_its_space_back(small_disk: Path, noise, limits, suffix):
    free = os.statvfs(small_disk).f_bfree
    output = str(small_disk / f"o.{suffix}")

    error = kept(DiskFull, convert, str(noise), output, ConversionOptions(quality=100), limits=limits)

    assert str(error).startswith(output)
    assert os.statvfs(small_disk).f_bfree == free
