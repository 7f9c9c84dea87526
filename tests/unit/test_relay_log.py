"""Reading the log in PostgreSQL, where a row can become visible after one with a higher id."""

import pytest

from db import schema
from db.engine import Database
from db.store import Store
from tasks.relay import LogReader, _without
from tests.unit.jobs import new_job


@pytest.fixture
def store(fresh_postgres_url):
    database = Database(fresh_postgres_url)
    schema.upgrade(database)
    yield Store(database)
    database.close()


@pytest.fixture
def another(store, fresh_postgres_url):
    """A second process's store."""
    database = Database(fresh_postgres_url)
    yield Store(database)
    database.close()


def enqueue(store, *job_ids):
    for job_id in job_ids:
        store.enqueue(new_job(job_id))


def read(reader):
    return [row["job_id"] for row in reader.read(100)]


def test_a_row_that_becomes_visible_late_is_not_missed(store, another):
    reader = LogReader(store, 0)
    with another.database.transaction():
        enqueue(another, "late")
        enqueue(store, "early")
        assert read(reader) == ["early"]
        assert (read(reader), reader.position) == ([], 0)

    assert read(reader) == ["late"]
    assert (read(reader), reader.position) == ([], 2)


def test_nothing_waits_for_a_long_transaction(store, another):
    reader = LogReader(store, 0)
    with another.database.transaction():
        enqueue(another, "long")
        for number in range(5):
            enqueue(store, str(number))
            assert read(reader) == [str(number)]


def test_the_place_that_is_kept_stays_before_what_is_missing(store, another):
    enqueue(store, "a", "b")
    reader = LogReader(store, 0)
    with another.database.transaction():
        enqueue(another, "late")
        enqueue(store, "c")
        assert read(reader) == ["a", "b", "c"]
        assert reader.position == 2
        assert read(LogReader(store, reader.position)) == ["c"]

    assert read(LogReader(store, 2)) == ["late", "c"]


def test_what_was_rolled_back_is_waited_for_no_longer(store, another):
    reader = LogReader(store, 0)
    with another.database.transaction() as connection:
        enqueue(another, "never")
        enqueue(store, "a")
        assert read(reader) == ["a"]
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("BEGIN")

    assert read(reader) == []
    assert (read(reader), reader.position) == ([], 2)


def test_a_transaction_that_commits_between_two_looks_is_seen(store, another, monkeypatch):
    """It ends after the rows were read and before the writers are asked."""
    reader = LogReader(store, 0)
    ask = store.log_writers
    with another.database.transaction() as connection:
        enqueue(another, "late")
        enqueue(store, "early")

        def commit_first():
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("BEGIN")
            return ask()

        monkeypatch.setattr(store, "log_writers", commit_first)
        assert read(reader) == ["early"]
        monkeypatch.setattr(store, "log_writers", ask)
    assert read(reader) == ["late"]


def test_a_large_gap_costs_one_range(store, another):
    reader = LogReader(store, 0)
    with another.database.transaction():
        enqueue(another, *map(str, range(50)))
        enqueue(store, "early")
        assert read(reader) == ["early"]
        assert list(reader._missing) == [(1, 50)]

    assert read(reader) == list(map(str, range(50)))
    assert read(reader) == []
    assert reader._missing == {}


def interleave(connection, store, count):
    """Log rows that two transactions have written in turns; the odd ones are of this connection's, which goes on."""
    write = (
        "INSERT INTO task_logs (id, sequence, event_type, created_at)"
        " SELECT 2 * number - {}, 1, 'started', now() FROM generate_series(1, {}) AS number"
    )
    connection.exec_driver_sql(write.format(1, count))
    with store.database.transaction() as other:
        other.exec_driver_sql(write.format(0, count))
        other.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('task_logs', 'id'), {2 * count})")


def test_thousands_of_gaps_keep_nothing_back(store, another):
    reader = LogReader(store, 0)
    with another.database.transaction() as connection:
        interleave(connection, store, 3000)
        assert [row["id"] for row in reader.read(4000)] == list(range(2, 6001, 2))
        assert len(reader._missing) == 3000
        enqueue(store, "new")
        assert read(reader) == ["new"]
        assert reader.position == 0
        assert len({id(suspects) for suspects in reader._missing.values()}) == 1

    enqueue(store, "after")
    assert [row["id"] for row in reader.read(1000)] == list(range(1, 2000, 2))
    late = [*reader.read(1500), *reader.read(1000)]
    assert [row["id"] for row in late] == [*range(2001, 6000, 2), 6002]
    assert (read(reader), reader.position, reader.has_gaps) == ([], 6002, False)


def test_behind_too_many_gaps_it_waits_for_the_end_of_the_transaction_and_says_so_once(
    store, another, monkeypatch, caplog
):
    monkeypatch.setattr("tasks.relay.MOST_GAPS", 3)
    reader = LogReader(store, 0)
    with another.database.transaction() as connection:
        interleave(connection, store, 3)
        assert [row["id"] for row in reader.read(100)] == [2, 4, 6]
        enqueue(store, "new")
        assert (read(reader), read(reader)) == ([], [])
        (record,) = caplog.records
        assert "keep those that submit jobs short" in record.getMessage()

    assert [row["id"] for row in reader.read(100)] == [1, 3, 5]
    assert (read(reader), reader.position) == (["new"], 7)


def test_ranges_are_split_by_what_is_found():
    assert _without((1, 10), [3, 4, 7]) == [(1, 2), (5, 6), (8, 10)]
    assert _without((1, 3), [1, 2, 3]) == []
    assert _without((5, 6), [1, 9]) == [(5, 6)]
    assert _without((5, 6), [1, 6, 9]) == [(5, 5)]
    assert _without((1, 2), []) == [(1, 2)]


def test_news_are_rows_that_can_be_seen(store, another):
    before = store.news()
    with another.database.transaction():
        enqueue(another, "a")
        assert store.news() == before
    assert store.news() != before


def test_a_kept_connection_is_one_connection(store):
    def session():
        with store.database.reading() as connection:
            return connection.exec_driver_sql("SELECT pg_backend_pid()").scalar(), id(connection)

    with store.kept_connection():
        assert session() == session()
        enqueue(store, "a")
    assert session()[0]


def test_the_first_relay_begins_after_the_last_row_that_a_worker_wrote(store):
    def begins(duty):
        store.begin_relay(duty)
        store.take_duty(duty, "lease", after=None)
        return store.relay_position(duty, "lease")

    enqueue(store, "a", "b")
    store.log_worker("w", "started", "worker started")
    assert begins("without a worker") == 0

    job = new_job("a")
    store.claim("a", unknown=lambda: job, publication=1, worker_id="w", lease=None, judge=None, max_deaths=3)
    last = max(row["id"] for row in store.logs("a"))
    enqueue(store, "c")
    assert begins("after a worker") == last
    assert begins("without a worker") == 0
