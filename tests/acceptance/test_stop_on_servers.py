"""Graceful stop of the pools without processes on RabbitMQ and Redis with PostgreSQL; prefork: test_guarantees.py."""

import signal

import pytest

from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("broker", ["rabbitmq", "redis"], indirect=True),
    pytest.mark.parametrize("pool", ["threads", "solo"]),
]

GET = {"timeout": 30}
COMPLETED = ["created", "claimed", "started", "completed"]
RELEASED = ["created", "claimed", "started", "released", "claimed", "started", "completed"]


@pytest.fixture
def own(own_on_broker):
    return own_on_broker


def start_jobs(own, task, tmp_path, running_s):
    """One that runs, and three that wait, of which the worker may have reserved some."""
    running = task.dawdle.delay(str(tmp_path / "runs"), running_s, 0.0)
    eventually(lambda: lines(tmp_path / "runs"), 15)
    own.wait_for(running, "running")
    return running, [task.note.delay(str(tmp_path / str(number)), str(number)) for number in range(3)]


def assert_nothing_is_left(own, tmp_path, waiting):
    """All is done, by one attempt where that was not given back, and the first worker has left."""
    assert [job.get(**GET) for job in waiting] == ["0", "1", "2"]
    assert {own.row(job)["claimed_by"] for job in waiting} == {"w2"}
    assert {tuple(own.events(job)) for job in waiting} == {tuple(COMPLETED)}
    assert all(lines(tmp_path / str(number)) == [f"begin {number}", f"end {number}"] for number in range(3))
    assert own.app.store.jobs(status="running") == []
    assert [holder.worker_id for holder in own.app.store.holders()] == ["w2"]


def test_the_running_job_finishes_and_those_that_wait_go_back(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1", "--prefetch-multiplier=4")
    running, waiting = start_jobs(own, task, tmp_path, 4.0)

    worker.terminate()
    assert worker.wait(25) == 0
    own.start_worker("-P", pool, "--concurrency=1")

    assert own.events(running) == COMPLETED
    assert own.row(running)["claimed_by"] == "w1"
    assert_nothing_is_left(own, tmp_path, waiting)


def test_a_second_signal_gives_the_running_job_back(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1", "--prefetch-multiplier=4")
    running, waiting = start_jobs(own, task, tmp_path, 60.0)

    worker.terminate()
    worker.wait_for_log("running jobs have 300 s", 10)
    worker.signal(signal.SIGTERM)
    assert worker.wait(25) == 0
    own.start_worker("-P", pool, "--concurrency=1")

    assert running.get(**GET) == 2
    assert own.events(running) == RELEASED
    row = own.row(running)
    assert (row["claimed_by"], row["deaths"], row["retry_count"]) == ("w2", 0, 0)
    assert_nothing_is_left(own, tmp_path, waiting)
