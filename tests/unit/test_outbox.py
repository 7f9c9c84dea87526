"""Jobs written in the caller's own transaction."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta

import psycopg
import psycopg2
import pytest
from psycopg.rows import dict_row, scalar_row
from psycopg2.extras import RealDictCursor
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from db import schema, views
from db.models import metadata
from db.records import now
from tasks import outbox
from tasks.errors import DatabaseNotReady, InvalidArguments, PermanentError, UnknownTask
from tasks.outgoing import Dispatcher
from tests.acceptance.deployment import deployed
from tests.unit.jobs import change, messages, run

OWN_TABLE = "CREATE TABLE IF NOT EXISTS uploads (name TEXT)"
OWN_ROW = "INSERT INTO uploads VALUES ('a.jpg')"


@pytest.fixture(params=["sqlite", "postgresql"])
def host(request, server_dir, tmp_path):
    """A producer whose job tables are in the database of the host application."""
    env = {"DATABASE_URL": request.getfixturevalue("fresh_postgres_url")} if request.param == "postgresql" else {}
    with deployed(server_dir, tmp_path, env) as deployment:
        schema.upgrade(deployment.app.store.database)
        with engine_of(deployment) as engine, engine.begin() as connection:
            connection.execute(text(OWN_TABLE))
        yield deployment


class engine_of:  # noqa: N801 (used as a function)
    """An engine of the caller's own, closed at the end."""

    def __init__(self, deployment):
        url = make_url(deployment.app.settings.database_url)
        self._engine = create_engine(
            url.set(drivername="postgresql+psycopg") if url.drivername.startswith("postgresql") else url
        )

    def __enter__(self):
        return self._engine

    def __exit__(self, *_):
        self._engine.dispose()


class _Alchemy:
    """How a caller writes with SQLAlchemy: `own` executes SQL of its own."""

    def __init__(self, deployment, make):
        self._context, self._make = engine_of(deployment), make

    def __enter__(self):
        self.connection = self._make(self._context.__enter__())
        return self

    def __exit__(self, *_):
        self.connection.close()
        self._context.__exit__()

    def own(self, sql):
        return self.connection.execute(text(sql))


class _DbApi:
    """How a caller writes with the driver itself."""

    def __init__(self, deployment, driver=psycopg, **options):
        url = make_url(deployment.app.settings.database_url)
        if deployment.app.store.database.is_sqlite:
            self.connection = sqlite3.connect(url.database)
        else:
            plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
            self.connection = driver.connect(plain, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def own(self, sql):
        cursor = self.connection.cursor()
        cursor.execute(sql)
        return cursor


@pytest.fixture(
    params=[
        "session",
        "connection",
        "driver",
        "driver with rows by name",
        "driver with rows that are no tuples",
        "psycopg2",
        "psycopg2 with rows by name",
    ]
)
def caller(request, host):
    if request.param.startswith("psycopg2") and host.app.store.database.is_sqlite:
        pytest.skip("psycopg2 is for PostgreSQL")
    kinds = {
        "session": lambda: _Alchemy(host, Session),
        "connection": lambda: _Alchemy(host, lambda engine: engine.connect()),
        "driver": lambda: _DbApi(host),
        "driver with rows that are no tuples": lambda: _DbApi(host, row_factory=scalar_row),
        "driver with rows by name": lambda: _DbApi(host, row_factory=dict_row),
        "psycopg2": lambda: _DbApi(host, psycopg2),
        "psycopg2 with rows by name": lambda: _DbApi(host, psycopg2, cursor_factory=RealDictCursor),
    }
    with kinds[request.param]() as caller:
        if request.param.endswith("name") and host.app.store.database.is_sqlite:
            caller.connection.row_factory = sqlite3.Row
        if request.param.endswith("tuples") and host.app.store.database.is_sqlite:
            caller.connection.row_factory = lambda _cursor, row: row[0]
        yield caller


def uploads(host):
    with host.app.store.database.reading() as connection:
        return connection.execute(text("SELECT count(*) FROM uploads")).scalar()


def dispatched(host):
    dispatcher = Dispatcher(host.app)
    sent = dispatcher.publish_due(10)
    dispatcher.close()
    return sent


def drop_job_tables(host):
    with host.app.store.database.transaction() as connection:
        for view in views.NAMES:
            connection.execute(text(f"DROP VIEW {view}"))
        metadata.drop_all(connection)
        connection.execute(text(f"DROP TABLE {schema.VERSION_TABLE}"))


def test_a_database_without_the_job_tables_is_named_with_what_makes_them(host, caller):
    drop_job_tables(host)
    host.app.store.database.close()
    caller.own(OWN_ROW)

    with pytest.raises(DatabaseNotReady, match="run: celery -A tasks db upgrade") as told:
        outbox.enqueue(caller.connection, host.task.add, 1, y=2)
    caller.connection.commit()

    assert str(host.app.store.database) in str(told.value)
    assert "INSERT" not in str(told.value)
    assert uploads(host) == 1
    schema.upgrade(host.app.store.database)
    outbox.enqueue(caller.connection, host.task.add, 1, y=2)


def test_a_commit_writes_the_job_with_the_callers_own_rows_and_a_worker_sends_it(host, caller):
    caller.own(OWN_ROW)
    job = outbox.enqueue(caller.connection, host.task.add, 1, y=2, options={"priority": 7})
    assert host.app.store.job(job.id) is None
    caller.connection.commit()

    row = host.row(job)
    assert (row["status"], row["priority"], row["parameters"], row["queue"]) == ("queued", 7, {"x": 1, "y": 2}, "add")
    assert (row["published_at"], row["publication"], row["root_id"]) == (None, 1, job.id)
    assert host.events(job) == ["created"]
    assert uploads(host) == 1
    assert messages(host, "add") == []
    assert dispatched(host) == 1
    (message,) = messages(host, "add")
    assert (message.headers["id"], message.headers["publication"]) == (job.id, 1)
    assert run(host.task.add, job.id, 1, 2, publication=1) == 3


def test_a_job_whose_result_nobody_wants_says_so_as_by_delay(producer):
    quiet = producer.task.quiet
    by_delay = quiet.delay(1)
    with closing(sqlite3.connect(producer.app.store.database.path)) as connection, connection:
        by_task = outbox.enqueue(connection, quiet, 2)
        wanted = outbox.enqueue(connection, quiet, 3, options={"ignore_result": False})

    jobs = (by_delay, by_task, wanted)
    assert [producer.row(job)["message"]["options"]["ignore_result"] for job in jobs] == [True, True, False]


ENQUEUE = """
import sqlite3, sys
from tasks.outbox import enqueue
with sqlite3.connect(sys.argv[1]) as connection:
    print(enqueue(connection, "image_resize", "/in.jpg", "/out.webp", width=80).id)
connection.close()
"""


def test_a_process_that_knows_no_task_yet_writes_a_job_by_its_name(producer):
    producer.app.store.counts()  # makes the tables
    command = [sys.executable, "-c", ENQUEUE, str(producer.app.store.database.path)]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert producer.row(done.stdout.strip())["parameters"] == {"input": "/in.jpg", "output": "/out.webp", "width": 80}


def test_others_may_write_between_the_callers_begin_and_the_job(producer):
    """A transaction that has read can't write any more once somebody else has written: SQLite does not wait there."""
    path = producer.app.store.database.path
    producer.app.store.counts()  # makes the tables

    def somebody_writes(statement):
        if statement.startswith("INSERT INTO task_queue"):
            producer.app.store.log_worker("w1", "started", "between two statements of the caller")

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.set_trace_callback(somebody_writes)
        job = outbox.enqueue(connection, "add", 1, 2)
        connection.set_trace_callback(None)
        connection.execute("COMMIT")

    assert producer.events(job) == ["created"]


def test_a_job_of_a_host_whose_clock_is_ahead_is_due_at_once_by_that_of_the_server(host, caller, monkeypatch):
    if host.app.store.database.is_sqlite:
        pytest.skip("SQLite has one host, and its clock")
    monkeypatch.setattr(outbox, "now", lambda: now() + timedelta(hours=1))

    job = outbox.enqueue(caller.connection, host.task.add, 1, 2)
    caller.connection.commit()

    assert abs(host.row(job)["run_after_utc"] - now()) < timedelta(minutes=1)
    assert dispatched(host) == 1


def test_a_countdown_counts_by_the_clock_of_the_server_and_an_eta_stays_as_it_is(host, caller, monkeypatch):
    eta = now() + timedelta(hours=1)
    if not host.app.store.database.is_sqlite:  # which has one host, and its clock
        monkeypatch.setattr(outbox, "now", lambda: now() + timedelta(hours=2))

    jobs = [outbox.enqueue(caller.connection, host.task.add, 1, 2, options={"countdown": s}) for s in (0, 3600)]
    jobs.append(outbox.enqueue(caller.connection, host.task.add, 1, 2, options={"eta": eta}))
    caller.connection.commit()

    at_once, counted, named = (host.row(job)["run_after_utc"] for job in jobs)
    assert abs(counted - eta) < timedelta(minutes=1)
    assert named == eta
    assert dispatched(host) == 1
    assert at_once <= now()


def test_a_rollback_leaves_no_job(host, caller):
    caller.own(OWN_ROW)
    job = outbox.enqueue(caller.connection, host.task.add, 1)
    caller.connection.rollback()

    assert host.app.store.job(job.id) is None
    assert host.app.store.logs(job.id) == []
    assert (uploads(host), dispatched(host)) == (0, 0)


@pytest.fixture(params=["session", "connection", "driver", "psycopg2"])
def autocommitting(request, host):
    """A connection that commits each statement by itself."""
    is_sqlite = host.app.store.database.is_sqlite
    if request.param == "psycopg2" and is_sqlite:
        pytest.skip("psycopg2 is for PostgreSQL")
    autocommit = {"isolation_level": "AUTOCOMMIT"}
    kinds = {
        "session": lambda: _Alchemy(host, lambda engine: Session(engine.execution_options(**autocommit))),
        "connection": lambda: _Alchemy(host, lambda engine: engine.connect().execution_options(**autocommit)),
        "driver": lambda: _DbApi(host),
        "psycopg2": lambda: _DbApi(host, psycopg2),
    }
    with kinds[request.param]() as caller:
        if is_sqlite and request.param == "driver":
            caller.connection.isolation_level = None
        elif not is_sqlite and not isinstance(caller, _Alchemy):
            caller.connection.autocommit = True
        yield caller


def test_without_a_transaction_the_job_and_its_log_row_are_there_at_once_and_together(host, autocommitting):
    job = outbox.enqueue(autocommitting.connection, host.task.add, 1, 2)

    assert host.events(job) == ["created"]
    autocommitting.own(OWN_ROW)
    assert uploads(host) == 1


def test_without_a_transaction_a_job_whose_log_row_fails_is_none(host, autocommitting, monkeypatch):
    def fail(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr("tasks.outbox.log_row", fail)

    with pytest.raises(RuntimeError, match="on purpose"):
        outbox.enqueue(autocommitting.connection, host.task.add, 1, 2, options={"task_id": "j"})

    assert host.app.store.job("j") is None
    autocommitting.own(OWN_ROW)
    assert uploads(host) == 1


def test_a_transaction_that_such_a_connection_has_begun_is_joined(host, autocommitting):
    autocommitting.own("BEGIN")
    job = outbox.enqueue(autocommitting.connection, host.task.add, 1, 2)
    assert host.app.store.job(job.id) is None

    autocommitting.own("ROLLBACK")

    assert host.app.store.job(job.id) is None


def test_a_job_by_name_that_is_due_later_rests_until_then(host, caller):
    job = outbox.enqueue(caller.connection, "add", 1, options={"countdown": 60, "task_id": "job-1", "expires": 90})
    caller.connection.commit()

    row = host.row(job)
    assert job.id == "job-1"
    assert 29 < (row["expires_at"] - row["run_after_utc"]).total_seconds() < 31
    assert dispatched(host) == 0
    change(host.app, job, run_after_utc=row["created_at"])
    assert dispatched(host) == 1


def test_an_id_that_is_known_already_makes_no_second_job(host, caller):
    host.task.add.apply_async((1, 1), task_id="job-1")

    outbox.enqueue(caller.connection, host.task.add, 2, options={"task_id": "job-1"})
    caller.connection.commit()

    assert host.events("job-1") == ["created"]
    assert host.row("job-1")["parameters"] == {"x": 1, "y": 1}


@pytest.mark.parametrize(
    ("task", "args", "options", "error"),
    [
        ("image_resize", ("/in.jpg", "/out.webp"), {}, InvalidArguments),
        ("add", (1,), {"priority": 11}, InvalidArguments),
        ("add", (1,), {"unique_key": "k"}, InvalidArguments),
        ("add", (1,), {"unique_for": 60}, InvalidArguments),
        ("no_such_task", (), {}, UnknownTask),
    ],
)
def test_what_can_not_work_is_refused_and_the_transaction_goes_on(host, caller, task, args, options, error):
    caller.own(OWN_ROW)
    with pytest.raises(error):
        outbox.enqueue(caller.connection, task, *args, options=options)
    caller.connection.commit()

    assert uploads(host) == 1
    assert host.app.store.jobs() == []


# Other databases


@pytest.mark.parametrize("where", ["another file", ":memory:", "a copy"])
def test_another_sqlite_database_is_refused_and_the_transaction_goes_on(host, tmp_path, where):
    path = where if where == ":memory:" else str(tmp_path / "other.db")
    with closing(sqlite3.connect(path)) as connection:
        if where == "a copy" and host.app.store.database.path is not None:
            host.app.store.identity()
            with closing(sqlite3.connect(host.app.store.database.path)) as source:
                source.backup(connection)
        connection.execute(OWN_TABLE)
        connection.execute(OWN_ROW)
        with pytest.raises(InvalidArguments, match=r"not of the job database.*\.delay\(\) after your commit"):
            outbox.enqueue(connection, host.task.add, 1)
        connection.commit()

        assert connection.execute("SELECT count(*) FROM uploads").fetchone()[0] == 1
    assert host.app.store.jobs() == []


@pytest.mark.parametrize("is_upgraded", [False, True], ids=["without our tables", "with our tables"])
def test_another_postgresql_database_is_refused_and_the_transaction_goes_on(host, postgres_server, is_upgraded):
    with postgres_server.database() as url:
        other = make_url(url).set(drivername="postgresql+psycopg")
        engine = create_engine(other)
        try:
            if is_upgraded:
                from db.engine import Database

                database = Database(url)
                schema.upgrade(database)
                database.close()
            with Session(engine) as session:
                session.execute(text(OWN_TABLE))
                session.execute(text(OWN_ROW))
                with pytest.raises(InvalidArguments, match="not of the job database") as caught:
                    outbox.enqueue(session, host.task.add, 1)
                session.commit()
                assert session.execute(text("SELECT count(*) FROM uploads")).scalar() == 1
        finally:
            engine.dispose()
    assert str(make_url(url).password) not in str(caught.value).replace("None", "")


@pytest.mark.parametrize("connection", [None, "sqlite:///x.db", 7, object()], ids=lambda given: type(given).__name__)
def test_what_is_no_connection_is_refused_by_its_type(producer, connection):
    with pytest.raises(InvalidArguments, match="is no connection that a job can be written with"):
        outbox.enqueue(connection, producer.task.add, 1)


@pytest.mark.parametrize(("task", "options"), [(None, None), (7, None), ("", None), ("add", ["priority"])])
def test_what_is_no_task_or_no_options_is_refused(producer, task, options):
    with pytest.raises(InvalidArguments, match="give a task or its name; options are a dict"):
        outbox.enqueue(None, task, 1, options=options)


def test_an_engine_is_no_connection(producer):
    with engine_of(producer) as engine, pytest.raises(PermanentError):
        outbox.enqueue(engine, producer.task.add, 1)


def test_an_asynchronous_connection_is_refused(producer, fresh_postgres_url):
    plain = make_url(fresh_postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)

    async def submit():
        async with await psycopg.AsyncConnection.connect(plain) as connection:
            outbox.enqueue(connection, producer.task.add, 1)

    with pytest.raises(InvalidArguments, match="AsyncConnection is no connection that a job can be written with"):
        asyncio.run(submit())
