"""Discovery: plug-ins that can't be imported, engines that can't be used, strategies for queues that nothing has."""

import logging
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from tasks import capabilities
from tasks.errors import SettingsError
from tasks.settings import settings


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """One plug-in is installed, whose module raises at its import."""
    (tmp_path / "raising.py").write_text("raise RuntimeError('no licence\\nfor this host')\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry_point = EntryPoint("half-done", "raising", capabilities.GROUP)
    monkeypatch.setattr(capabilities, "entry_points", lambda group: [entry_point])


@pytest.fixture
def log_level(monkeypatch):
    """`log_level("DEBUG")` sets LOG_LEVEL for this process."""

    def set_to(level):
        monkeypatch.setenv("LOG_LEVEL", level)
        settings.cache_clear()

    yield set_to
    settings.cache_clear()


@pytest.mark.usefixtures("broken")
def test_a_broken_plug_in_is_one_line_with_its_name_and_reason(caplog, log_level):
    log_level("INFO")

    with caplog.at_level(logging.INFO):
        capabilities.load_installed()

    (record,) = caplog.records
    assert record.getMessage() == (
        "capability plug-in 'half-done' of an unknown package is left out: it can't be imported "
        "(RuntimeError: no licence for this host)"
    )
    assert not record.exc_info


@pytest.mark.usefixtures("broken")
def test_its_traceback_is_shown_to_who_looks_for_it(caplog, log_level):
    log_level("DEBUG")

    with caplog.at_level(logging.INFO):
        capabilities.load_installed()

    assert "raising.py" in caplog.text
    assert "Traceback" in caplog.text


def strategies_for(*queues):
    """An app with two capabilities, one of Celery's own tasks, and these queues in QUEUE_STRATEGY."""
    settings = SimpleNamespace(queue_strategy=dict.fromkeys(queues, "LIFO"))
    return SimpleNamespace(tasks=["image_resize", "words", "celery.group"], settings=settings)


def test_strategies_of_capabilities_are_let_through_without_a_word(caplog):
    capabilities.check_strategies(strategies_for("*", "image_resize", "words"))

    assert caplog.records == []


def test_a_strategy_of_a_misspelt_queue_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"^QUEUE_STRATEGY: no queue is called wrods; did you mean words\?$"):
        capabilities.check_strategies(strategies_for("*", "wrods"))


def test_a_strategy_of_a_queue_that_only_has_a_name_is_warned_of(caplog):
    capabilities.check_strategies(strategies_for("vip"))
    capabilities.check_strategies(strategies_for("vip"), is_quiet=True)

    (record,) = caplog.records
    assert record.getMessage() == (
        "QUEUE_STRATEGY: vip is no capability's queue; it counts for workers with -Q vip only "
        "(known: image_resize, words, *)"
    )


# Engines


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

    found = capabilities.try_engines([works, broken, absent, SimpleNamespace()])

    assert found.lacked_by(works) == {}
    assert found.lacked_by(broken) == {"bad_engine": "can't be used: OSError: libengine.so.42: no such file"}
    assert found.lacked_by(absent) == {"absent_engine": "is not installed"}
    assert found.formats == {}


def test_an_engine_that_crashes_does_not_hide_the_next_one(engine):
    crashing = engine("a_crashing_engine", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    broken = engine("bad_engine", "1 / 0")
    works = engine("good_engine", "print('hello')")

    found = capabilities.try_engines([crashing, broken, works])

    assert found.lacked_by(crashing) == {
        "a_crashing_engine": "can't be used: its import ends the process with code -11"
    }
    assert "ZeroDivisionError" in found.unusable["bad_engine"]
    assert found.lacked_by(works) == {}


def test_an_engine_is_tried_again_when_somebody_kills_the_process_that_tries_it(engine, tmp_path):
    mark = tmp_path / "was killed"
    killed = f"import os; os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w'), os.kill(os.getpid(), 9))"
    unlucky, doomed = engine("unlucky_engine", killed), engine("doomed_engine", "import os; os.kill(os.getpid(), 9)")

    assert capabilities.try_engines([unlucky]).unusable == {}
    assert mark.exists()
    assert "with code -9" in capabilities.try_engines([doomed]).unusable["doomed_engine"]


def test_an_engine_that_hangs_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(capabilities, "TRY_WITHIN_S", 1)
    hanging = engine("hanging_engine", "import time; time.sleep(60)")

    assert capabilities.try_engines([hanging]).unusable == {"hanging_engine": "does not load within 1 s"}


def test_formats_whose_codec_is_missing_are_found_and_this_process_loads_no_engine(engine):
    engine("pillow_heif", "raise ImportError('libheif.so.1')")
    images = SimpleNamespace(requires=("pyvips",))
    before = set(sys.modules)

    found = capabilities.try_engines([images])

    assert found.unusable == {}
    assert "pip install it" in found.formats["heic"]
    assert not {"jpeg", "png", "webp", "avif", "jp2"} & set(found.formats)
    assert not {name for name in set(sys.modules) - before if name.startswith(("pyvips", "PIL"))}


def test_an_engine_without_any_format_is_not_usable(engine):
    engine("PIL", "raise ImportError('no Pillow')")
    images = engine("pyvips", "def __getattr__(name): raise RuntimeError('no codec')")

    assert "it has no format" in capabilities.try_engines([images]).unusable["pyvips"]
