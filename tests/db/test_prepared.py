"""What goes to the driver past SQLAlchemy is what SQLAlchemy would have sent, and fails in the same way."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import bindparam, select
from sqlalchemy.exc import IntegrityError

from db import statements
from db.engine import Database
from db.models import task_logs, task_queue
from db.prepared import Prepared
from db.store import Store
from tests.db.conftest import new_job, running

NOON_IN_INDIA = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))


@pytest.fixture
def logged(store):
    """A function that writes a log row through LOG, and reads it back through SQLAlchemy."""
    store.enqueue(new_job())
    job_id = store.jobs()[0]["job_id"]

    def write_and_read(at, details):
        with store.database.transaction() as connection:
            statements.LOG.first(connection, statements.log_row(job_id, 7, "noted", "w", at, None, details))
            return connection.execute(select(task_logs).where(task_logs.c.sequence == 7)).mappings().one()

    return write_and_read


def test_values_are_written_as_their_columns_have_them(logged):
    row = logged(NOON_IN_INDIA, {"attempt": 1})

    assert row["created_at"] == datetime(2026, 1, 1, 6, 30, tzinfo=UTC)
    assert row["details"] == {"attempt": 1}
    assert row["message"] is None


def test_no_document_is_null_and_not_the_text_null(logged, store):
    logged(NOON_IN_INDIA, None)

    with store.database.reading() as connection:
        nulls = select(task_logs.c.id).where(task_logs.c.sequence == 7, task_logs.c.details.is_(None))
        assert connection.execute(nulls).first() is not None


def test_each_database_writes_documents_in_its_own_way(tmp_path):
    """The statement is the same one for both."""
    for number, dumps in enumerate((json.dumps, lambda _: '{"written": "otherwise"}', json.dumps)):
        store = Store(Database(f"sqlite:///{tmp_path}/{number}.db", dumps=dumps))
        job, attempt = running(store)
        assert store.complete(job.job_id, attempt, {"width": 800})
        assert store.job(job.job_id)["result_data"] == json.loads(dumps({"width": 800}))


@pytest.fixture
def sqlite_store(tmp_path):
    store = Store(Database(f"sqlite:///{tmp_path}/jobs.db"))
    store.enqueue(new_job())
    return store


def test_an_error_is_sqlalchemys_and_holds_no_values(sqlite_store):
    statement = Prepared(task_logs.insert().values(job_id=bindparam("b_job_id"), event_type=bindparam("b_event")))

    with pytest.raises(IntegrityError) as error, sqlite_store.database.transaction() as connection:
        statement.first(connection, {"b_job_id": "a", "b_event": "a-secret"})

    assert "a-secret" not in str(error.value)


def test_a_value_that_is_missing_is_no_null(sqlite_store):
    statement = Prepared(select(task_queue.c.job_id).where(task_queue.c.job_id == bindparam("b_job_id")))

    with pytest.raises(KeyError), sqlite_store.database.reading() as connection:
        statement.first(connection, {})
