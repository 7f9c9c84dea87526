"""The SQLite file: how it is opened, who waits for whom, and what people read when it can't be used."""

import os
import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from db import sqlite
from db.engine import Database, patiently
from db.errors import DatabaseUnavailable, DatabaseUnusable, is_transient
from db.store import Store
from tasks.errors import DatabaseNotReady
from tests.db.conftest import claim, new_job, open_database, raw_sqlite
from tests.db.processes import fork, in_processes
from tests.tooling.waiting import eventually

PRAGMAS = {
    "journal_mode": "wal",
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "synchronous": 1,
    "cache_size": -10000,
    "mmap_size": 256 * 2**20,
    "auto_vacuum": 2,
    "temp_store": 2,
}


@pytest.fixture
def database(sqlite_path):
    database = open_database(sqlite_path)
    yield database
    database.close()


@pytest.fixture
def store(database):
    store = Store(database)
    store.jobs()
    return store


@contextmanager
def locked(path, seconds, *statements):
    """Another process holds the write lock for so long, or what it gets by `statements`, from the block's begin on."""
    statements = list(statements or ["BEGIN IMMEDIATE"])
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "[c.execute(statement).fetchall() for statement in sys.argv[3:]];"
        "print('held', flush=True); time.sleep(float(sys.argv[2])); c.execute('COMMIT')"
    )
    command = ["python3", "-c", code, str(path), str(seconds), *statements]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


def pragmas_of(database):
    with database.reading() as connection:
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}


class TestPragmas:
    def test_they_are_in_force_in_every_process_and_after_every_opening(self, store, database):
        assert pragmas_of(database) == PRAGMAS
        assert in_processes(3, lambda _number: pragmas_of(database)) == [PRAGMAS] * 3
        assert pragmas_of(database) == PRAGMAS
        database.close()
        assert pragmas_of(database) == PRAGMAS
        store.enqueue(new_job())
        assert pragmas_of(database) == PRAGMAS

    def test_the_mapped_size_is_a_setting(self, sqlite_path):
        database = open_database(sqlite_path, mmap_bytes=2**20)

        assert pragmas_of(database)["mmap_size"] == 2**20
        database.close()

    def test_auto_vacuum_is_set_before_the_first_table_is_made(self, store, sqlite_path):
        with raw_sqlite(sqlite_path) as other:
            assert other.execute("PRAGMA auto_vacuum").fetchone() == (2,)

    def test_foreign_keys_drop_the_log_with_its_job(self, store, database):
        job = new_job()
        store.enqueue(job)

        with database.transaction() as connection:
            connection.exec_driver_sql("DELETE FROM task_queue")

        assert store.logs(job.job_id) == []

    def test_a_process_holds_one_connection_however_many_threads_it_has(self, store, sqlite_path):
        threads = [threading.Thread(target=store.jobs) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(open_files(sqlite_path)) == 1


class TestTransactions:
    def test_one_begins_with_the_write_lock(self, store, database, sqlite_path):
        with database.transaction(), raw_sqlite(sqlite_path) as other:
            other.execute("PRAGMA busy_timeout = 0")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")

    def test_reads_go_on_while_another_process_writes(self, store, sqlite_path):
        job = new_job()
        store.enqueue(job)

        with locked(sqlite_path, 30):
            began = time.monotonic()
            assert store.job(job.job_id) is not None
            assert store.jobs()

        assert time.monotonic() - began < 2

    def test_an_error_rolls_everything_back(self, store, database):
        with suppress(ZeroDivisionError), database.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO task_groups (group_id, created_at) VALUES ('g', '2026-01-01')")
            raise ZeroDivisionError

        with database.reading() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 0

    def test_a_time_limit_that_strikes_at_its_beginning_leaves_no_transaction(self, store, monkeypatch):
        begin = sqlite._begin

        def begin_and_be_struck(handle, *, is_last_try):
            begin(handle, is_last_try=is_last_try)
            raise TimeoutError

        with monkeypatch.context() as limited:
            limited.setattr(sqlite, "_begin", begin_and_be_struck)
            with pytest.raises(TimeoutError):
                store.enqueue(new_job("struck"))

        assert store.enqueue(new_job("next"))
        assert [row["job_id"] for row in store.jobs()] == ["next"]

    def test_a_transaction_or_a_read_inside_a_transaction_joins_it(self, store, database):
        insert = "INSERT INTO task_groups (group_id, created_at) VALUES (?, '2026-01-01')"
        with suppress(ZeroDivisionError), database.transaction() as outer:
            outer.exec_driver_sql(insert, ("a",))
            with database.transaction() as inner:
                inner.exec_driver_sql(insert, ("b",))
            with database.reading() as reader:
                assert reader.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 2
            raise ZeroDivisionError

        with database.reading() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 0

    def test_a_transaction_inside_a_read_is_its_own(self, store, database):
        with database.reading() as reader:
            assert reader.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 0
            with database.transaction() as connection:
                connection.exec_driver_sql("INSERT INTO task_groups (group_id, created_at) VALUES ('a', '2026-01-01')")
            assert reader.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 1
            assert reader.exec_driver_sql("PRAGMA busy_timeout").scalar() == sqlite.BUSY_TIMEOUT_MS


class TestWaiting:
    def test_on_a_file_system_without_wal_a_commit_waits_for_those_who_read(
        self, store, database, sqlite_path, monkeypatch
    ):
        store.counts()
        database.close()
        with closing(sqlite3.connect(sqlite_path)) as plain:
            plain.execute("PRAGMA journal_mode=DELETE")
        monkeypatch.setattr(sqlite, "set_patiently", lambda *_: None)  # which would make it WAL again
        with locked(sqlite_path, 1.0, "BEGIN", "SELECT * FROM task_queue"):
            assert store.enqueue(new_job())

    def test_a_short_lock_of_another_process_is_waited_for(self, store, sqlite_path):
        with locked(sqlite_path, 1.0):
            began = time.monotonic()

            assert store.enqueue(new_job())

        assert time.monotonic() - began > 0.5

    def test_a_long_one_is_an_error_that_says_so(self, store, sqlite_path, monkeypatch):
        monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 300)

        with (
            locked(sqlite_path, 30),
            pytest.raises(DatabaseUnavailable, match=r"media_store\.db is locked by another process") as error,
        ):
            store.enqueue(new_job())

        assert is_transient(error.value)

    def test_patience_outlasts_it(self, store, sqlite_path, monkeypatch):
        monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 300)
        job, waits = new_job(), []
        store.enqueue(job)

        with locked(sqlite_path, 3.0):
            claimed = patiently(lambda: claim(store, job), on_wait=lambda exc, wait_s: waits.append((exc, wait_s)))

        assert (claimed.attempt, claimed.deaths) == (1, 0)
        assert [wait_s for _exc, wait_s in waits][:4] == [0.05, 0.1, 0.2, 0.4]
        assert all(isinstance(exc, DatabaseUnavailable) for exc, _wait_s in waits)

    def test_patience_does_not_wait_for_what_waiting_cannot_mend(self, sqlite_path):
        sqlite_path.write_text("no database" * 1000)
        store = Store(open_database(sqlite_path))

        with pytest.raises(DatabaseUnusable):
            patiently(store.jobs, on_wait=lambda *_: pytest.fail("it waited"))

    def test_a_thread_that_waits_stops_neither_reads_nor_forks(self, store, database, sqlite_path):
        with locked(sqlite_path, 30):
            waiting = threading.Thread(target=lambda: suppressed(lambda: store.enqueue(new_job())))
            waiting.start()
            began = time.monotonic()
            for _ in range(10):
                store.jobs()
            for _ in range(10):
                in_processes(1, lambda _number: len(store.jobs()))
            took_s = time.monotonic() - began
            assert waiting.is_alive()
        waiting.join()

        assert took_s < 3

    def test_writers_in_many_processes_never_see_a_lock(self, store):
        def write(number):
            for index in range(60):
                store.enqueue(new_job(f"job-{number}-{index}"))

        in_processes(8, write)

        assert store.counts() == {"image_resize": {"queued": 480}}


def suppressed(call):
    with suppress(DatabaseUnavailable):
        call()


def open_files(path):
    """The descriptors of this process that are open on `path`."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if entry.readlink() == path:
                found.append(int(entry.name))
    return found


class TestForks:
    def test_children_forked_while_threads_write_all_answer(self, store):
        """Without the lock around forks one child in ten hangs on a mutex of a thread that it does not have."""
        is_over = threading.Event()

        def write(number):
            index = 0
            while not is_over.is_set():
                store.enqueue(new_job(f"thread-{number}-{index}"))
                index += 1

        threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(80):
                in_processes(1, lambda _n, number=number: store.enqueue(new_job(f"child-{number}")), timeout_s=20)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()

        assert len(store.jobs(id_prefix="child-", limit=1000)) == 80

    def test_a_child_inherits_no_descriptor_of_the_file(self, store, sqlite_path):
        store.enqueue(new_job())
        assert open_files(sqlite_path)

        assert in_processes(1, lambda _number: open_files(sqlite_path)) == [[]]

    def test_what_a_child_commits_survives_the_parents_closing(self, store, database, sqlite_path):
        """A child that inherits SQLite's record of the file takes no locks; a parent that closes deletes its log."""
        child_ready, parent_closed = os.pipe(), os.pipe()
        store.enqueue(new_job("before"))
        pid = fork()
        if pid == 0:
            store.enqueue(new_job("one"))
            os.write(child_ready[1], b"x")
            os.read(parent_closed[0], 1)
            store.enqueue(new_job("two"))
            os._exit(0)
        os.read(child_ready[0], 1)
        database.close()
        os.write(parent_closed[1], b"x")
        os.waitpid(pid, 0)
        for descriptor in (*child_ready, *parent_closed):
            os.close(descriptor)

        assert {row["job_id"] for row in store.jobs()} == {"before", "one", "two"}
        with raw_sqlite(sqlite_path) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def test_a_fork_inside_a_transaction_leaves_it_to_the_parent(self, store, database):
        with database.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO task_groups (group_id, created_at) VALUES ('a', '2026-01-01')")
            seen = in_processes(1, lambda _number: len(store.jobs()))

        assert seen == [0]
        with database.reading() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM task_groups").scalar() == 1


class TestFile:
    def test_its_directory_is_made(self, tmp_path):
        database = open_database(tmp_path / "not" / "there" / "media_store.db")

        assert Store(database).enqueue(new_job())
        database.close()

    def test_a_removed_file_is_made_anew(self, store, sqlite_path):
        store.enqueue(new_job("old"))
        for path in sqlite_path.parent.iterdir():
            path.unlink()

        assert store.enqueue(new_job("new"))

        assert {row["job_id"] for row in store.jobs()} == {"new"}

    def test_a_replaced_file_is_used_and_upgraded(self, store, sqlite_path, tmp_path):
        store.enqueue(new_job("old"))
        for path in sqlite_path.parent.iterdir():
            path.unlink()
        other = Store(open_database(tmp_path / "other.db"))
        other.enqueue(new_job("restored"))
        other.database.close()
        shutil.move(tmp_path / "other.db", sqlite_path)

        assert {row["job_id"] for row in store.jobs()} == {"restored"}


class TestUnusable:
    """Each is refused with a message that names the file and the remedy."""

    def assert_refused(self, path, match, kind=DatabaseNotReady):
        database = open_database(path)
        with pytest.raises(kind, match=match) as error:
            Store(database).enqueue(new_job())
        assert str(path) in str(error.value)
        assert not is_transient(error.value)
        database.close()

    def test_a_file_where_its_directory_should_be_is_refused(self, tmp_path):
        (tmp_path / "file").touch()

        self.assert_refused(tmp_path / "file" / "media_store.db", "a file stands where its directory.*CL_SERVER_DIR")
        self.assert_refused(tmp_path / "file" / "deeper" / "media_store.db", "a file stands where its directory")

    def test_a_directory_in_its_place_is_refused(self, tmp_path):
        (tmp_path / "media_store.db").mkdir()

        self.assert_refused(tmp_path / "media_store.db", "is a directory; name a file in DATABASE_URL")

    @pytest.mark.parametrize("what", ["directory", "file"])
    def test_one_that_this_user_may_not_write_is_refused(self, tmp_path, monkeypatch, what):
        path = tmp_path / "media_store.db"
        path.touch()
        forbidden = tmp_path if what == "directory" else path
        may = os.access
        monkeypatch.setattr(os, "access", lambda asked, mode: asked != forbidden and may(asked, mode))

        self.assert_refused(path, "can't be written; set CL_SERVER_DIR to a directory that this user may write")

    @pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc: a directory in which even root makes nothing")
    def test_a_directory_that_cannot_be_made_is_refused(self):
        self.assert_refused(
            Path("/proc/self/media/media_store.db"), "its directory can't be made .*; set CL_SERVER_DIR"
        )

    def test_one_in_memory_is_refused(self):
        for url in ("sqlite://", "sqlite:///:memory:"):
            with pytest.raises(DatabaseNotReady, match="names no file"):
                Database(url)

    def test_one_that_is_no_database_is_refused(self, sqlite_path):
        sqlite_path.write_text("this is a text file, and a long one\n" * 200)

        self.assert_refused(sqlite_path, "is not a database; move it away, or name another file", DatabaseUnusable)

    def test_a_damaged_one_is_refused(self, store, database, sqlite_path):
        for _ in range(300):
            store.enqueue(new_job())
        database.close()
        with sqlite_path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(sqlite_path.stat().st_size - 4096))

        with pytest.raises(DatabaseUnusable, match="is damaged; put a backup in its place"):
            Store(database).jobs(limit=1000)

    def test_one_that_lost_a_table_is_refused(self, store, database, sqlite_path):
        with database.transaction() as connection:
            connection.exec_driver_sql("DROP TABLE task_logs")

        with pytest.raises(DatabaseUnusable, match="lacks a table or column of media-tasks"):
            store.logs("a")

    def test_one_that_becomes_read_only_is_refused_until_it_is_mended(self, store, database):
        with database.reading() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")

        with pytest.raises(DatabaseUnusable, match="is read-only; make file and directory writable"):
            store.enqueue(new_job())
        assert store.enqueue(new_job())  # mended: opened anew

    def test_a_full_disk_is_waited_for(self, tmp_path):
        small = tmp_path / "small"
        small.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("needs to mount a small tmpfs: run as root")
        with ExitStack() as ending:
            ending.callback(subprocess.run, ["umount", "--lazy", str(small)], check=True)
            database = open_database(small / "media_store.db")
            ending.callback(database.close)
            store = Store(database)
            with pytest.raises(DatabaseUnavailable, match=r"small/media_store\.db (has no space|could not)") as error:
                fill(store)
            assert is_transient(error.value)
            assert store.jobs(limit=1)

            subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)

            assert store.enqueue(new_job())


def fill(store):
    for _ in range(5000):
        store.enqueue(new_job())


def test_a_file_on_a_network_file_system_is_refused(sqlite_path, monkeypatch):
    monkeypatch.setattr(sqlite, "file_system_of", lambda *_: "nfs4")

    with pytest.raises(DatabaseNotReady, match=r"network file system \(nfs4\).*DATABASE_URL=postgresql"):
        Store(open_database(sqlite_path)).jobs()
    assert not sqlite_path.exists()


def test_a_thread_finds_the_connection_free_after_an_error_of_another(store, database):
    def fail():
        with suppress(ZeroDivisionError), database.transaction():
            raise ZeroDivisionError

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    eventually(lambda: store.enqueue(new_job()), 2)
