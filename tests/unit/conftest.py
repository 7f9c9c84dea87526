"""This process's app on an empty database and broker of the test's own; nothing runs the jobs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import app as media_tasks
from tasks.outgoing import Dispatcher
from tasks.reconciler import Reconciler
from tests.acceptance.deployment import Deployment, deployed
from tests.unit.jobs import Clock


@pytest.fixture
def producer(server_dir: Path, tmp_path: Path) -> Iterator[Deployment]:
    with deployed(server_dir, tmp_path) as deployment:
        yield deployment


@pytest.fixture
def app(producer: Deployment) -> Any:
    return producer.app


@pytest.fixture
def task(producer: Deployment) -> Any:
    """Its tasks, by name."""
    return producer.task


@pytest.fixture
def add(producer: Deployment) -> Any:
    return producer.task.add


@pytest.fixture(autouse=True)
def leases_of_its_own() -> Iterator[None]:
    """Each test sees the locks of its own directory, and holds none at its beginning."""

    def forget() -> None:
        leases = media_tasks.__dict__.pop("leases", None)
        if leases is not None and leases._mine is not None:
            leases._mine.release()
        media_tasks.__dict__.pop("lease", None)

    forget()
    yield
    forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Puts the clock of who judges others, and of the guard, forward: `clock.pass_s(10)`."""
    clock = Clock()
    for module in ("reconciler", "lost_messages", "leases", "job", "guard", "upkeep", "duty"):
        monkeypatch.setattr(f"tasks.{module}.time", clock)
    return clock


@pytest.fixture
def reconciler(producer: Deployment, clock: Clock) -> Iterator[Reconciler]:
    """The parts of a reconciler, to be called directly; `clock` is its clock."""
    reconciler = Reconciler(producer.app)
    yield reconciler
    store: Any = getattr(reconciler._lost_messages._ledger, "_store", None)
    if store is not None:
        store.close()


@pytest.fixture
def dispatcher(producer: Deployment) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(producer.app)
    yield dispatcher
    dispatcher.close()
