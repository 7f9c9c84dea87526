"""Discovery: plug-ins that can't be imported, strategies for queues that nothing has."""

import logging
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
