"""Whatever is wrong with the file, the message names it and says what to do, and waiting is for what may pass."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import kombu
import pytest
from kombu.exceptions import OperationalError

from tasks.broker import Transport, database
from tasks.broker.errors import BrokerReplaced, BrokerUnavailable, BrokerUnusable
from tasks.broker.messages import MessageStore

NOBODY = 65534


def put(store, body="body"):
    store.put(["q"], "{}", body)


def remove(path):
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@pytest.fixture
def as_nobody(broker_path):
    """Lose root's right to write everywhere, where the tests have it; all may read and enter the directory."""
    for directory in broker_path.parents[:4]:  # pytest's own folders, of which each process may have one
        if directory.owner() == broker_path.parent.owner():
            directory.chmod(directory.stat().st_mode | 0o055)
    broker_path.parent.chmod(0o555)
    if os.geteuid():
        yield
    else:
        os.seteuid(NOBODY)
        yield
        os.seteuid(0)
    broker_path.parent.chmod(0o755)


def test_only_what_may_pass_by_itself_is_worth_a_reconnect():
    assert issubclass(BrokerUnavailable, Transport.connection_errors)
    assert not issubclass(BrokerUnusable, Transport.connection_errors + Transport.channel_errors)
    assert issubclass(BrokerUnusable, OperationalError)


def test_a_file_of_a_newer_release_is_refused_and_left_alone(open_store, broker_path):
    open_store().close()
    db = sqlite3.connect(broker_path)
    db.execute("PRAGMA user_version = 7")
    db.close()

    with pytest.raises(BrokerUnusable, match=r"broker\.db has format 7, made by a newer release; .* up to 1"):
        open_store()


def test_the_database_of_another_program_is_refused(open_store, broker_path):
    db = sqlite3.connect(broker_path)
    db.execute("CREATE TABLE customers (id)")
    db.close()

    with pytest.raises(BrokerUnusable, match=r"broker\.db holds another program's tables"):
        open_store()


def test_a_file_that_is_no_database_is_refused(open_store, broker_path):
    broker_path.write_text("Dear diary, " * 100)

    with pytest.raises(BrokerUnusable, match=r"broker\.db: it is no SQLite database"):
        open_store()


def test_a_damaged_file_is_named_with_its_remedy(open_store, broker_path):
    store = open_store()
    for _ in range(200):
        put(store)
    store.close()
    with broker_path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (broker_path.stat().st_size - 4096))

    damaged = open_store()
    with pytest.raises(BrokerUnusable, match=r"broker\.db: it is damaged; stop the workers, move it away"):
        put(damaged)


def test_a_missing_directory_is_worth_waiting_for(tmp_path):
    with kombu.Connection(f"sqlite:///{tmp_path}/later/broker.db") as connection:
        with pytest.raises(BrokerUnavailable, match=r"later/broker\.db: its directory is missing; make it"):
            connection.connect()
        (tmp_path / "later").mkdir()
        connection.connect()


def test_a_url_without_a_path_is_explained():
    with (
        kombu.Connection("sqlite://") as connection,
        pytest.raises(BrokerUnusable, match=r"write sqlite:////absolute/path/broker\.db"),
    ):
        connection.connect()


def test_a_directory_that_may_not_be_written_is_refused_at_once(open_store, as_nobody):
    with pytest.raises(BrokerUnusable, match=r"broker\.db: it can't be opened; give this user write permission"):
        open_store()


def test_a_file_that_may_not_be_written_is_refused_at_once(open_store, broker_path, request):
    open_store().close()
    broker_path.chmod(0o444)
    request.getfixturevalue("as_nobody")

    with pytest.raises(BrokerUnusable, match=r"broker\.db.*give this user write permission"):
        open_store()


def test_a_full_disk_is_waited_for_and_the_work_goes_on_when_there_is_space(store):
    handle = store._database._handle
    handle.execute("PRAGMA max_page_count = 1")  # as full as SQLite can be made without a full disk
    with pytest.raises(BrokerUnavailable, match=r"broker\.db: the disk is full; free some space"):
        put(store, "b" * 1_000_000)

    handle.execute("PRAGMA max_page_count = 1000000")
    put(store, "b" * 1_000_000)
    assert store.size("q") == 1


def test_a_lock_that_outlasts_the_busy_timeout_is_worth_another_try(open_store, broker_path):
    store = open_store(busy_timeout_s=0.05)
    other = sqlite3.connect(broker_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BrokerUnavailable, match=r"broker\.db: another process kept it locked"):
        put(store)
    other.close()

    put(store)


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="mounts are read from /proc")
def test_a_network_file_system_is_refused(open_store, monkeypatch):
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in lines}
    monkeypatch.setattr(database, "NETWORK_FILE_SYSTEMS", frozenset(kinds))

    with pytest.raises(BrokerUnusable, match=r"broker\.db is on a network file system"):
        open_store()


@pytest.mark.parametrize("successor", ["none", "new"])
def test_a_file_that_was_replaced_is_noticed_at_the_next_write(open_store, broker_path, successor):
    store = open_store()
    remove(broker_path)
    if successor == "new":
        open_store()

    with pytest.raises(BrokerReplaced, match=r"broker\.db was removed or replaced"):
        put(store)


def test_a_closed_store_says_so(store):
    store.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        put(store)


FORK_WHILE_A_THREAD_WRITES = """
import os, sys, threading
from pathlib import Path
from tasks.broker.messages import MessageStore

store = MessageStore(Path(sys.argv[1]))
store.open()
is_over = threading.Event()

def write():
    while not is_over.is_set():
        store.put(["parent"], "{}", "body")

thread = threading.Thread(target=write)
thread.start()
for _ in range(40):
    pid = os.fork()
    if not pid:
        store.put(["child"], "{}", "body")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
is_over.set()
thread.join()
assert store.size("child") == 40, store.sizes()
store.close()
"""


def test_children_forked_while_a_thread_writes_use_the_store_on_their_own(broker_path):
    subprocess.run([sys.executable, "-c", FORK_WHILE_A_THREAD_WRITES, str(broker_path)], check=True, timeout=30)


def test_what_a_child_commits_outlives_the_parent_that_closes_first(broker_path):
    parent = MessageStore(broker_path)
    parent.open()
    parent.put(["q"], "{}", "parent")
    asked, answered = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        parent.put(["q"], "{}", "child")
        os.write(answered[1], b"1")
        os.read(asked[0], 1)
        parent.put(["q"], "{}", "child")
        os._exit(0)

    os.read(answered[0], 1)
    parent.close()
    os.write(asked[1], b"1")
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (*asked, *answered):
        os.close(fd)

    later = MessageStore(broker_path)
    later.open()
    assert later.sizes() == {"q": 3}
    later.close()


def test_a_file_that_is_replaced_around_a_fork_is_noticed(broker_path):
    store = MessageStore(broker_path)
    store.open()
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    for path in broker_path.parent.glob(f"{broker_path.name}*"):
        if path.is_file():
            path.unlink()

    with pytest.raises(BrokerReplaced):
        store.put(["q"], "{}", "x")
    store.close()


def test_many_processes_that_open_a_new_file_at_once_all_succeed(broker_path):
    code = (
        "import sys; from pathlib import Path; from tasks.broker.messages import MessageStore;"
        "store = MessageStore(Path(sys.argv[1])); store.open(); store.put(['q'], '{}', 'x'); store.close()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(broker_path)]) for _ in range(8)]
    assert [process.wait(30) for process in processes] == [0] * 8

    db = sqlite3.connect(broker_path)
    assert db.execute("SELECT ready FROM queues").fetchall() == [(8,)]
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_what_went_wrong_is_told_where_sqlite_has_rolled_back_by_itself(store):
    """As it does when the disk is full, sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction."""

    def fail():
        with store.transaction() as db:
            db.execute("ROLLBACK")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    store.put(["q"], "{}", "goes on")

    assert store.sizes() == {"q": 1}
