"""What an operator does to the file while others use it."""

import sqlite3

import pytest

from db import maintenance
from db.errors import DatabaseUnavailable
from db.store import Store
from tasks.errors import DatabaseNotReady
from tests.db.conftest import new_job, open_database, raw_sqlite


@pytest.fixture
def store(sqlite_path):
    store = Store(open_database(sqlite_path))
    for _ in range(200):
        store.enqueue(new_job(parameters={"text": "x" * 2000}))
    yield store
    store.database.close()


def test_sizes_count_rows_and_bytes(database):
    Store(database).enqueue(new_job())

    sizes = maintenance.sizes(database)

    assert (sizes["task_queue"], sizes["task_logs"], sizes["worker_heartbeats"]) == (1, 1, 0)
    assert ("file_bytes" in sizes) is database.is_sqlite


def test_a_checkpoint_moves_the_log_into_the_file(store):
    assert maintenance.sizes(store.database)["log_bytes"] > 0

    moved, left = maintenance.checkpoint(store.database)

    assert moved > 0
    assert left == 0
    assert maintenance.sizes(store.database)["log_bytes"] == 0


@pytest.fixture
def impatient(monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **{**options, "timeout": 0.1}))


def test_a_checkpoint_says_what_a_reader_holds(store, sqlite_path, impatient):
    with raw_sqlite(sqlite_path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM task_queue").fetchall()
        for _ in range(10):
            store.enqueue(new_job())

        _moved, left = maintenance.checkpoint(store.database)

    assert left > 0


def test_vacuum_gives_the_space_of_deleted_jobs_back(store):
    maintenance.checkpoint(store.database)
    with store.database.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM task_queue")

    before, after = maintenance.vacuum(store.database)

    assert after < before / 2
    assert store.enqueue(new_job())


def test_a_backup_is_whole_while_another_process_writes(store, sqlite_path, tmp_path):
    with raw_sqlite(sqlite_path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM task_queue")

        size_bytes = maintenance.backup(store.database, tmp_path / "copy.db")

    assert size_bytes == (tmp_path / "copy.db").stat().st_size
    copy = Store(open_database(tmp_path / "copy.db"))
    assert copy.counts() == {"image_resize": {"queued": 200}}
    copy.database.close()


def test_a_locked_file_is_a_transient_error(store, sqlite_path, impatient):
    with raw_sqlite(sqlite_path) as writer:
        writer.execute("BEGIN IMMEDIATE")

        with pytest.raises(DatabaseUnavailable, match="is locked by another process"):
            maintenance.vacuum(store.database)


@pytest.mark.parametrize("act", [maintenance.pragmas, maintenance.checkpoint, maintenance.vacuum])
def test_postgresql_looks_after_itself(upgraded_postgres_url, act):
    database = open_database(upgraded_postgres_url)

    with pytest.raises(DatabaseNotReady, match="is no SQLite file: PostgreSQL"):
        act(database)
