"""However a worker is asked to stop, no row is left running, and what it did not finish runs elsewhere."""

import os
import pty
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.acceptance.deployment import deployed, lines
from tests.tooling.locks import Lock
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

COMPLETED = ["created", "claimed", "started", "completed"]
RELEASED = ["created", "claimed", "started", "released", "claimed", "started", "completed"]
GET = {"timeout": 30}
POOLS = ["prefork", "threads", "solo"]


@pytest.fixture
def own_env():
    return {"SHUTDOWN_GRACE_S": 20}


def running_job(own, task, tmp_path, seconds):
    job = task.note.delay(str(tmp_path / "runs"), "job", seconds)
    eventually(lambda: lines(tmp_path / "runs"), 15)
    own.wait_for(job, "running")
    return job


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_running_jobs_finish_and_the_worker_leaves(own, task, tmp_path, pool, signum):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = running_job(own, task, tmp_path, 2.0)

    worker.signal(signum)

    assert worker.wait() == 0
    assert own.events(job) == COMPLETED
    assert lines(tmp_path / "runs") == ["begin job", "end job"]
    (shown,) = own.app.store.workers()
    assert (shown["status"], shown["current_tasks"]) == ("stopped", [])
    assert own.app.store.holders() == []


def test_jobs_that_wait_in_the_worker_go_back_at_once(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1")
    job = running_job(own, task, tmp_path, 4.0)
    others = [task.add.delay(n, n) for n in range(5)]

    worker.terminate()
    second = own.start_worker("--concurrency=1")

    assert [other.get(timeout=15) for other in others] == [0, 2, 4, 6, 8]
    assert {own.row(other)["claimed_by"] for other in others} == {"w2"}
    assert job.get(**GET) == "job"
    assert worker.wait() == 0
    assert own.events(job) == COMPLETED
    assert second.is_alive()


@pytest.mark.parametrize("pool", POOLS)
def test_at_the_end_of_the_grace_running_jobs_are_given_back(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1", env={"SHUTDOWN_GRACE_S": 1})
    job = running_job(own, task, tmp_path, 20.0)

    worker.terminate()

    row = own.wait_for(job, "queued", timeout_s=10)
    assert worker.wait(25) == 0
    assert (row["deaths"], row["retry_count"]) == (0, 0)
    assert own.events(job) == ["created", "claimed", "started", "released"]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_gives_running_jobs_back(own, task, tmp_path, pool, first, second):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = running_job(own, task, tmp_path, 25.0)

    worker.signal(first)
    worker.wait_for_log("running jobs have", 10)
    worker.signal(second)

    own.wait_for(job, "queued", timeout_s=10)
    assert worker.wait(25) == 0
    assert own.events(job) == ["created", "claimed", "started", "released"]


def test_a_job_that_outlasts_the_grace_is_given_back_by_a_whole_group_that_is_stopped(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1", env={"SHUTDOWN_GRACE_S": 1})
    job = running_job(own, task, tmp_path, 30.0)

    os.killpg(worker.pid, signal.SIGTERM)

    assert worker.wait(15) == 0
    assert own.events(job) == ["created", "claimed", "started", "released"]
    eventually(lambda: not worker.leftovers(), 5)


@pytest.mark.parametrize("pool", POOLS)
def test_sigquit_gives_running_jobs_back_and_another_worker_runs_them(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = running_job(own, task, tmp_path, 6.0)
    own.start_worker("-P", pool, "--concurrency=1")

    worker.signal(signal.SIGQUIT)

    assert job.get(**GET) == "job"
    assert worker.wait() == 0
    assert own.events(job) == RELEASED
    assert (own.row(job)["claimed_by"], own.row(job)["deaths"]) == ("w2", 0)


# SIGHUP


def wait_until_it_has_started_anew(worker):
    eventually(lambda: worker.log().count(" ready.") == 2, 40, worker.log)


@pytest.mark.parametrize("pool", POOLS)
def test_at_sighup_running_jobs_finish_and_the_worker_starts_anew(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = running_job(own, task, tmp_path, 2.0)

    worker.signal(signal.SIGHUP)

    assert job.get(**GET) == "job"
    assert own.events(job) == COMPLETED
    wait_until_it_has_started_anew(worker)
    assert task.add.delay(1, 2).get(**GET) == 3
    worker.terminate()
    assert worker.wait() == 0
    assert own.app.store.holders() == []


@pytest.mark.parametrize("pool", POOLS)
def test_a_second_sighup_gives_running_jobs_back_and_the_worker_that_has_started_anew_runs_them(
    own, task, tmp_path, pool
):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = task.dawdle.delay(str(tmp_path / "runs"), 30.0, 0.0)
    eventually(lambda: lines(tmp_path / "runs"), 15)

    worker.signal(signal.SIGHUP)
    worker.wait_for_log("running jobs have", 10)
    worker.signal(signal.SIGHUP)

    assert job.get(timeout=45) == 2
    assert own.events(job) == RELEASED
    assert own.row(job)["deaths"] == 0
    assert worker.is_alive()


def test_a_sighup_to_the_whole_group_harms_no_child(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1")
    job = running_job(own, task, tmp_path, 2.0)

    os.killpg(worker.pid, signal.SIGHUP)

    assert job.get(**GET) == "job"
    assert own.events(job) == COMPLETED
    wait_until_it_has_started_anew(worker)


@pytest.mark.parametrize(
    "signals", [(signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGHUP)], ids=["hup-term", "term-hup"]
)
def test_a_worker_that_is_asked_to_stop_as_well_does_not_start_anew(own, task, tmp_path, signals):
    """systemd's SendSIGHUP sends both."""
    worker = own.start_worker("--concurrency=1")
    job = running_job(own, task, tmp_path, 25.0)

    for signum in signals:
        worker.signal(signum)
        worker.wait_for_log("running jobs have", 10)

    own.wait_for(job, "queued", timeout_s=10)
    assert worker.wait(25) == 0
    assert own.events(job) == ["created", "claimed", "started", "released"]


@pytest.fixture
def terminal(own, tmp_path):
    """The first worker's output is a terminal; calling this closes it."""
    ours, theirs = pty.openpty()
    (tmp_path / "worker-1.log").symlink_to(os.ttyname(theirs))
    is_closed = threading.Event()

    def read():
        with suppress(OSError):  # nobody has the other side any more
            while not is_closed.is_set():
                os.read(ours, 4096)
        os.close(ours)

    reader = threading.Thread(target=read)
    reader.start()
    yield is_closed.set
    is_closed.set()
    os.close(theirs)
    reader.join(10)


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_whose_terminal_is_closed_finishes_its_jobs_and_ends(own, task, tmp_path, terminal, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1", ready_timeout_s=0)
    job = running_job(own, task, tmp_path, 2.0)

    os.killpg(worker.pid, signal.SIGHUP)  # the kernel does so to what runs in the terminal's foreground
    terminal()

    eventually(lambda: not worker.is_alive(), 15)
    assert worker.returncode == 0
    assert own.events(job) == COMPLETED
    assert own.app.store.holders() == []


def test_a_worker_that_is_stopped_while_it_starts_leaves_nothing(own, tmp_path):
    worker = own.start_worker("--concurrency=1", ready_timeout_s=0)
    eventually(lambda: own.app.store.holders(), 20)

    worker.terminate()

    assert worker.wait(20) == 0
    assert own.app.store.holders() == []


def test_a_worker_that_waits_for_the_database_to_start_can_be_stopped(own):
    worker = own.start_worker("--concurrency=1")
    own.stop(worker)

    with Lock(own.server_dir / "media_store.db", 15.0):
        worker = own.start_worker("--concurrency=1", ready_timeout_s=0)
        worker.wait_for_log("does not answer", 25)
        worker.terminate()
        assert worker.wait(15) == 0


def test_a_worker_stops_while_the_database_is_locked_and_the_job_ends_elsewhere(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1", env={"SHUTDOWN_GRACE_S": 1})
    job = running_job(own, task, tmp_path, 8.0)

    with Lock(own.server_dir / "media_store.db", 9.0):
        worker.terminate()
    assert worker.wait(40) == 0
    own.start_worker("--concurrency=1")

    assert job.get(timeout=40) == "job"
    assert own.row(job)["status"] == "completed"
    assert own.app.store.jobs(status="running") == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_children_do_not_take_the_signal_of_their_group_for_theirs(own, task, tmp_path, signum):
    """Terminals and service managers signal the whole process group: the job finishes, as the main process decides."""
    worker = own.start_worker("--concurrency=1")
    job = running_job(own, task, tmp_path, 2.0)

    os.killpg(worker.pid, signum)

    assert worker.wait() == 0
    assert own.events(job) == COMPLETED


def test_a_worker_that_starts_anew_while_its_broker_is_frozen_has_no_children_of_before(
    private_redis, server_dir, tmp_path
):
    redis = private_redis()
    env = {"CELERY_BROKER_URL": redis.url, "SHUTDOWN_GRACE_S": 1}
    with deployed(server_dir, tmp_path, env) as own:
        worker = own.start_worker("--concurrency=2")
        running_job(own, own.task, tmp_path, 60.0)
        before = worker.child_pids()
        assert len(before) == 2

        redis.pause()
        worker.signal(signal.SIGHUP)
        worker.wait_for_log("the worker leaves without waiting", 25)
        eventually(lambda: worker.log().count("[tasks]") == 2, 20, worker.log)
        redis.resume()

        eventually(lambda: worker.log().count(" ready.") == 2, 40, worker.log)
        assert [pid for pid in before if Path(f"/proc/{pid}").exists()] == []
        assert own.task.add.delay(1, 2).get(**GET) == 3


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_a_worker_whose_broker_is_away_leaves_when_its_jobs_have_ended(request, server_dir, tmp_path, kind):
    broker = request.getfixturevalue(f"private_{kind}")()
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": broker.url, "SHUTDOWN_GRACE_S": 300}) as own:
        worker = own.start_worker("--concurrency=1")
        job = running_job(own, own.task, tmp_path, 8.0)

        broker.stop()
        worker.wait_for_log("Cannot connect", 10)
        worker.terminate()

        assert worker.wait(30) == 0
        assert own.events(job) == COMPLETED
        assert own.app.store.holders() == []
