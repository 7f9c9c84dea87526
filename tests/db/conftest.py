"""A job database of each kind for each test, empty and ready."""

import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kombu.utils.json import dumps, loads
from sqlalchemy import Connection, text

from db import schema
from db.engine import Database
from db.errors import DatabaseUnavailable
from db.models import metadata
from db.records import Claim, Failure, Heartbeat, Liveness, NewJob
from db.store import Store

KINDS = ("sqlite", "postgresql")
WHEN = datetime(2026, 3, 29, 1, 30, 15, 123456, tzinfo=UTC)
LOST = Failure(error_type="WorkerLost", error_message="three workers died", error_module="tasks.errors")


def open_database(url: str | Path, **options: Any) -> Database:
    url = f"sqlite:///{url}" if isinstance(url, Path) else url
    return Database(url, dumps=dumps, loads=loads, **options)


def beat(worker_id: str = "worker-1", **values: Any) -> Heartbeat:
    """What a worker says of itself."""
    defaults: dict[str, Any] = {
        "hostname": "host",
        "pid": 1,
        "capabilities": ["image_resize"],
        "concurrency": 2,
        "status": "idle",
        "started_at": WHEN,
    }
    return Heartbeat(worker_id=worker_id, **{**defaults, **values})


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    return tmp_path / "media_store.db"


@pytest.fixture(scope="session")
def upgraded_sqlite_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with our schema, to be copied: making one takes ten times as long."""
    path = tmp_path_factory.mktemp("upgraded") / "media_store.db"
    database = open_database(path)
    schema.upgrade(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def upgraded_postgres_url(postgres_server: Any) -> Iterator[str]:
    """A database with our schema; each test finds its tables empty."""
    with postgres_server.database() as url:
        database = open_database(url)
        schema.upgrade(database)
        database.close()
        yield url


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An upgraded, empty database; the test runs on each kind."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("upgraded_sqlite_path"), request.getfixturevalue("sqlite_path"))
        database = open_database(request.getfixturevalue("sqlite_path"))
    else:
        database = open_database(request.getfixturevalue("upgraded_postgres_url"))
        with database.transaction() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(metadata.tables)}"))
    yield database
    database.close()


@pytest.fixture(params=KINDS)
def empty_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database without any table; the test runs on each kind."""
    fixture = "sqlite_path" if request.param == "sqlite" else "fresh_postgres_url"
    database = open_database(request.getfixturevalue(fixture))
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


_numbers = itertools.count(1)


def new_job(job_id: str | None = None, **values: Any) -> NewJob:
    """A job with an id of its own."""
    defaults = {"task_type": "image_resize", "queue": "image_resize", "parameters": {"input": "in.jpg"}}
    defaults["message"] = {"args": ["in.jpg"], "kwargs": {}, "options": {}}
    return NewJob(job_id=job_id or f"job-{next(_numbers)}", **{**defaults, **values})


def claim(
    store: Store, job: NewJob, worker_id: str = "worker-1", *, liveness: Liveness = Liveness.ALIVE, **values: Any
) -> Claim:
    """A claim as the guard makes it for a first delivery. `liveness` is that of who holds the job already."""
    lease = f"lease of {worker_id}"
    # Through a store of its own: the next write of this one may have to be lost.
    Store(store.database).renew_lease(lease, worker_id, "this host")
    defaults = {"publication": 1, "max_deaths": 3, "lease": lease, "judge": lambda _: liveness}
    return store.claim(job.job_id, unknown=lambda: job, worker_id=worker_id, **{**defaults, **values})


def running(store: Store, worker_id: str = "worker-1", **values: Any) -> tuple[NewJob, int]:
    """A job that is running, and the attempt that runs it."""
    job = new_job(**values)
    store.enqueue(job)
    return job, claim(store, job, worker_id).attempt


def row_of(store: Store, job: NewJob) -> dict[str, Any]:
    row = store.job(job.job_id)
    assert row is not None
    return dict(row)


def events_of(store: Store, job: NewJob) -> list[str]:
    """The job's events in order; their numbers have no gap, and the row knows the last."""
    logs = store.logs(job.job_id)
    assert [log["sequence"] for log in logs] == list(range(1, len(logs) + 1))
    assert row_of(store, job)["sequence"] == len(logs)
    return [log["event_type"] for log in logs]


@pytest.fixture
def lose_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After `lose_commit()` the next write is committed, but its caller gets an error: the connection is lost."""
    change = store._changing

    def lose() -> None:
        @contextmanager
        def losing() -> Iterator[Connection]:
            monkeypatch.setattr(store, "_changing", change)
            context: AbstractContextManager[Connection] = change()
            with context as connection:
                yield connection
            raise DatabaseUnavailable("the connection was lost")

        monkeypatch.setattr(store, "_changing", losing)

    return lose


@contextmanager
def raw_sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of another application to the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture
def unavailable() -> AbstractContextManager[object]:
    """A block that has to end in a transient error."""
    return pytest.raises(DatabaseUnavailable)
