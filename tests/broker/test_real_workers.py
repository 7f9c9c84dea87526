"""Real Celery workers on the SQLite broker: they are killed, restarted, asked and told, and lose nothing."""

import json
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from tests.broker.small_app import make_app
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

APP = "tests.broker.small_app"
POLL_S = 1.0  # the default


class Records:
    """What the task `record` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, begin=""):
        return [line for line in self._read() if line.startswith(begin)]

    def _read(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "records")


@pytest.fixture
def url(broker_path):
    return f"sqlite:///{broker_path}"


@pytest.fixture
def app(url):
    app = make_app(url)
    yield app
    app.close()


@pytest.fixture
def start(run_worker, url):
    def start(*args, ready_timeout_s=30.0, **options):
        env = {"SMALL_BROKER": url, "SMALL_OPTIONS": json.dumps(options)}
        return run_worker(*args, app=APP, env=env, ready_timeout_s=ready_timeout_s)

    return start


def submit(app, records, text="", sleep_s=0.0, **options):
    return app.send_task("record", [str(records.path), text, sleep_s], **options)


def is_drained(store):
    return not store.owners() and not any(store.sizes().values())


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_every_pool_runs_each_task_once(app, start, records, store, pool):
    for number in range(40):
        submit(app, records, str(number))
    worker = start("-P", pool, "-c", "2")
    for number in range(40, 80):
        submit(app, records, str(number))

    eventually(lambda: len(records.lines("end")) == 80, 10)
    assert sorted(records.lines("begin")) == sorted(f"begin {number} False 1" for number in range(80))
    worker.terminate()
    assert worker.wait() == 0
    assert is_drained(store)


def test_two_workers_and_two_producers_share_the_work_without_an_error(app, start, records, store):
    workers = [start("-c", "2", "-n", f"w{number}@%h") for number in range(2)]
    threads = [
        threading.Thread(target=lambda n=n: [submit(app, records, f"{n}-{number}") for number in range(100)])
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    eventually(lambda: len(records.lines("end")) == 200, 20)
    assert len(set(records.lines("begin"))) == 200
    eventually(lambda: not any(store.sizes().values()), 5)
    for worker in workers:
        assert "ERROR" not in worker.log()
        assert "locked" not in worker.log()


def test_a_lost_workers_task_runs_again_within_two_seconds_while_another_worker_lives(app, start, records):
    first = start("-c", "1", "-n", "first@%h")
    submit(app, records, "long", 60)
    eventually(lambda: records.lines("begin"), 10)
    start("-c", "1", "-n", "second@%h")

    first.kill9_everything()
    killed = time.monotonic()

    eventually(lambda: len(records.lines("begin")) == 2, 5)
    assert time.monotonic() - killed < POLL_S + 1.0
    assert records.lines("begin") == ["begin long False 1", "begin long True 2"]


def test_the_only_worker_takes_its_own_task_again_as_soon_as_it_is_back(app, start, records):
    worker = start("-c", "1", poll_interval=60)
    submit(app, records, "long", 60)
    eventually(lambda: records.lines("begin"), 10)
    worker.kill9_everything()

    start("-c", "1", poll_interval=60)

    eventually(lambda: "begin long True 2" in records.lines(), 2)


def test_a_long_task_is_not_delivered_twice_while_its_holder_lives(app, start, records):
    start("-c", "1", "-n", "first@%h", poll_interval=0.1)
    start("-c", "1", "-n", "second@%h", poll_interval=0.1)

    submit(app, records, "long", 3)

    eventually(lambda: records.lines("end"), 10)  # thirty polls of the worker that does not have it
    assert records.lines() == ["begin long False 1", "end long"]


def test_the_task_of_a_killed_pool_child_runs_again(app, start, records):
    worker = start("-c", "1")
    submit(app, records, "long", 2)
    eventually(lambda: records.lines("begin"), 10)

    (child,) = worker.child_pids()
    os.kill(child, signal.SIGKILL)

    eventually(lambda: records.lines("end"), 15)
    assert records.lines("begin") == ["begin long False 1", "begin long True 2"]


def test_a_warm_shutdown_finishes_what_runs_and_gives_back_what_waits(app, start, records, store):
    worker = start("-c", "1", "--prefetch-multiplier", "4")
    for text in ("running", "waiting 1", "waiting 2"):
        submit(app, records, text, 1)
    eventually(lambda: records.lines("begin running"), 10)

    worker.terminate()
    assert worker.wait() == 0

    assert records.lines() == ["begin running False 1", "end running"]
    assert store.sizes()["celery"] == 2
    assert store.owners() == set()


@pytest.fixture
def events(app):
    """The types of the events that workers send, as Flower would hear them."""
    heard = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": lambda event: heard.append(event["type"])})
        thread = threading.Thread(target=lambda: list(receiver.consume(limit=None)))
        thread.start()
        yield heard
        receiver.should_stop = True
        thread.join(10)
        assert not thread.is_alive()


def test_inspect_revoke_and_events_work(app, start, records, events):
    start("-c", "1", "-E", "-n", "one@%h")
    (answer,) = app.control.inspect(timeout=5, limit=1).ping().items()
    assert answer[0].startswith("one@")
    assert answer[1] == {"ok": "pong"}

    submit(app, records, "running", 1)
    revoked = submit(app, records, "revoked")
    eventually(lambda: records.lines("begin running"), 10)
    revoked.revoke()
    submit(app, records, "last")
    eventually(lambda: records.lines("end last"), 10)

    assert not records.lines("begin revoked")
    expected = {"task-received", "task-started", "task-succeeded", "task-revoked"}
    eventually(lambda: expected <= set(events), 10, lambda: str(events))


def test_a_worker_goes_on_with_a_new_file_when_its_own_was_removed(app, start, records, broker_path):
    worker = start("-c", "1")
    submit(app, records, "before")
    eventually(lambda: records.lines("end before"), 10)

    for suffix in ("", "-wal", "-shm"):
        Path(f"{broker_path}{suffix}").unlink(missing_ok=True)
    submit(app, records, "after")

    eventually(lambda: records.lines("end after"), 10)
    assert worker.is_alive()
    assert app.control.inspect(timeout=2, limit=1).ping()


def test_a_worker_on_a_newer_file_stops_and_says_why(start, broker_path, store):
    db = sqlite3.connect(broker_path)
    db.execute("PRAGMA user_version = 7")
    db.close()

    worker = start("-c", "1", ready_timeout_s=0)

    assert worker.wait() != 0
    assert "broker.db has format 7, made by a newer release" in worker.log()


def test_an_idle_worker_costs_less_than_one_percent_of_a_processor(start):
    worker = start("-c", "1")
    statistics = Path(f"/proc/{worker.pid}/stat")
    if not statistics.exists():
        pytest.skip("processor time is read from /proc")

    def processor_time_s():
        fields = statistics.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    used, began = processor_time_s(), time.monotonic()
    eventually(lambda: time.monotonic() - began > 3, 10)
    assert (processor_time_s() - used) / (time.monotonic() - began) < 0.02  # 1 %, and a clock tick of 10 ms
