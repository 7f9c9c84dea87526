import sys

import pytest

from tasks.errors import UnsupportedMedia
from tasks.media.decode import engine, pillow_plugin


@pytest.fixture
def nothing_known_yet():
    for cached in (engine, pillow_plugin):
        cached.cache_clear()
    yield
    for cached in (engine, pillow_plugin):
        cached.cache_clear()


def test_the_engine_uses_one_thread_and_caches_nothing(vips):
    assert vips.concurrency_get() == 1
    assert vips.voperation.cache_get_max() == 0


def test_loaders_that_read_other_files_are_blocked(vips, tmp_path):
    (tmp_path / "in.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    with pytest.raises(vips.Error):
        vips.Image.new_from_file(str(tmp_path / "in.svg"))


@pytest.mark.usefixtures("nothing_known_yet")
@pytest.mark.parametrize(
    ("module", "media_format", "remedy"),
    [("pillow_heif", "heic", "media-tasks[heif]"), ("pillow_jxl", "jxl", "pillow-jxl-plugin")],
)
def test_a_plug_in_that_is_missing_is_named_and_its_format_is_lacking(monkeypatch, lacks, module, media_format, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedMedia, match=f"{media_format} needs ") as refused:
        pillow_plugin(media_format)
    assert remedy in str(refused.value)
    assert remedy in lacks()[media_format]


@pytest.mark.usefixtures("nothing_known_yet")
def test_a_worker_without_pyvips_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(UnsupportedMedia, match=r"media-tasks\[image\]"):
        engine()
