"""Engines that are missing, broken, crash or hang are found, each with its reason, and this process loads none."""

import sys
from types import SimpleNamespace

import pytest

from tasks import engines


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """`engine(name, source)`: an installed module, and a task that needs it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        return SimpleNamespace(requires=(name,))

    return install


def test_an_engine_that_can_not_be_loaded_is_found_with_its_reason(engine):
    works = engine("good_engine", "")
    broken = engine("bad_engine", "raise OSError('libengine.so.42:\\nno such file')")
    absent = SimpleNamespace(requires=("absent_engine", "good_engine"))

    found = engines.try_engines([works, broken, absent, SimpleNamespace()])

    assert found.lacked_by(works) == {}
    assert found.lacked_by(broken) == {"bad_engine": "can't be used: OSError: libengine.so.42: no such file"}
    assert found.lacked_by(absent) == {"absent_engine": "is not installed"}
    assert found.formats == {}


def test_an_engine_that_crashes_does_not_hide_the_next_one(engine):
    crashing = engine("a_crashing_engine", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    broken = engine("bad_engine", "1 / 0")
    works = engine("good_engine", "print('hello')")

    found = engines.try_engines([crashing, broken, works])

    assert found.lacked_by(crashing) == {
        "a_crashing_engine": "can't be used: its import ends the process with code -11"
    }
    assert "ZeroDivisionError" in found.unusable["bad_engine"]
    assert found.lacked_by(works) == {}


def test_an_engine_is_tried_again_when_somebody_kills_the_process_that_tries_it(engine, tmp_path):
    mark = tmp_path / "was killed"
    killed = f"import os; os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w'), os.kill(os.getpid(), 9))"
    unlucky, doomed = engine("unlucky_engine", killed), engine("doomed_engine", "import os; os.kill(os.getpid(), 9)")

    assert engines.try_engines([unlucky]).unusable == {}
    assert mark.exists()
    assert "with code -9" in engines.try_engines([doomed]).unusable["doomed_engine"]


def test_an_engine_that_hangs_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(engines, "TRY_WITHIN_S", 1)
    hanging = engine("hanging_engine", "import time; time.sleep(60)")

    assert engines.try_engines([hanging]).unusable == {"hanging_engine": "does not load within 1 s"}


def test_formats_whose_codec_is_missing_are_found_and_this_process_loads_no_engine(engine):
    engine("pillow_heif", "raise ImportError('libheif.so.1')")
    images = SimpleNamespace(requires=("pyvips",))
    before = set(sys.modules)

    found = engines.try_engines([images])

    assert found.unusable == {}
    assert "pip install it" in found.formats["heic"]
    assert not {"jpeg", "png", "webp", "avif", "jp2"} & set(found.formats)
    assert not {name for name in set(sys.modules) - before if name.startswith(("pyvips", "PIL"))}


def test_an_engine_without_any_format_is_not_usable(engine):
    engine("PIL", "raise ImportError('no Pillow')")
    images = engine("pyvips", "def __getattr__(name): raise RuntimeError('no codec')")

    assert "it has no format" in engines.try_engines([images]).unusable["pyvips"]
