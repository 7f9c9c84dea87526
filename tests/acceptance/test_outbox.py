"""Jobs of the outbox: what a caller commits with its own rows runs once, and what it rolls back never."""

import signal
import sqlite3
from contextlib import closing

import psycopg
import pytest

from db import schema
from tasks import outbox
from tests.acceptance.deployment import deployed, lines

COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 60}


@pytest.fixture
def broker():
    return "embedded"


@pytest.fixture
def own(request, broker, server_dir, tmp_path):
    env = {"ENQUEUE": "outbox"}
    if broker != "embedded":
        env["CELERY_BROKER_URL"] = request.getfixturevalue(f"fresh_{broker}_url")
        env["DATABASE_URL"] = request.getfixturevalue("fresh_postgres_url")
    with deployed(server_dir, tmp_path, env) as deployment:
        schema.upgrade(deployment.app.store.database)
        yield deployment


@pytest.fixture
def connection(own):
    """The caller's own, to the database of its uploads and of the jobs."""
    path = own.app.store.database.path
    url = own.app.settings.database_url.replace("+psycopg", "")
    with closing(sqlite3.connect(path) if path else psycopg.connect(url)) as connection:
        connection.execute("CREATE TABLE uploads (name TEXT)")
        connection.commit()
        yield connection


def uploads(connection):
    return connection.execute("SELECT count(*) FROM uploads").fetchone()[0]


def test_what_is_committed_runs_once_and_what_is_rolled_back_never(own, task, connection, tmp_path):
    own.start_worker("--concurrency=2")

    connection.execute("INSERT INTO uploads VALUES ('no.jpg')")
    never = outbox.enqueue(connection, task.note, str(tmp_path / "never"), "never")
    connection.rollback()
    connection.execute("INSERT INTO uploads VALUES ('yes.jpg')")
    job = outbox.enqueue(connection, task.note, str(tmp_path / "runs"), "job")
    connection.commit()
    plain = task.note.delay(str(tmp_path / "plain"), "plain")

    assert (job.get(**GET), plain.get(**GET)) == ("job", "plain")
    assert own.events(job) == own.events(plain) == COMPLETED
    assert lines(tmp_path / "runs") == ["begin job", "end job"]
    assert uploads(connection) == 1
    assert own.app.store.job(never.id) is None
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "broker"),
    [("due taken", "embedded"), ("due taken", "rabbitmq"), ("due taken", "redis"), ("due sent", "embedded")],
)
def test_a_worker_that_is_killed_while_it_sends_loses_nothing(own, task, connection, tmp_path, point):
    env = {"CRASH_AT": point, "CRASH_FILE": tmp_path / "crashed"}
    worker = own.start_worker("--concurrency=1", "-Q", "total", env=env, plug_in="tests.acceptance.crash_points")
    files = [tmp_path / f"{number}" for number in range(5)]
    jobs = [outbox.enqueue(connection, task.note, str(file), file.name) for file in files]
    connection.commit()
    assert worker.wait() == -signal.SIGKILL
    assert [own.row(job)["status"] for job in jobs] == ["queued"] * 5
    assert all(own.row(job)["published_at"] for job in jobs)

    own.start_worker("--concurrency=2")

    assert [job.get(**GET) for job in jobs] == [file.name for file in files]
    assert [lines(file) for file in files] == [[f"begin {file.name}", f"end {file.name}"] for file in files]
    assert {own.events(job).count("completed") for job in jobs} == {1}
