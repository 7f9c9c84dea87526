"""The worker fixture starts, watches and ends real workers, and notices what outlives them."""

import os
import sys
import time

import pytest

from tests.tooling import processes
from tests.tooling.environment import is_setting
from tests.tooling.waiting import eventually, stays
from tests.tooling.worker import Worker

APP = "tests.tooling.sample_app"


def test_a_worker_of_any_app_becomes_ready_and_shows_its_children(run_worker):
    worker = run_worker("--concurrency=2", app=APP)

    assert "ready." in worker.log()
    eventually(lambda: len(worker.child_pids()) == 2, 10)
    assert worker.pid not in worker.child_pids()


def test_a_terminated_worker_exits_with_0(run_worker):
    worker = run_worker("--concurrency=1", app=APP)

    worker.terminate()

    assert worker.wait() == 0
    assert worker.child_pids() == []


def test_the_children_of_a_killed_worker_die_with_it(run_worker):
    worker = run_worker("--concurrency=2", app=APP)
    children = eventually(worker.child_pids, 10)

    worker.kill9()

    assert worker.returncode == -9
    eventually(lambda: not any(map(processes.is_running, children)), 5)


def test_a_lost_machine_takes_everything_at_once(run_worker):
    worker = run_worker("--concurrency=1", app=APP, env={"SAMPLE_GRANDCHILD": "sleep 60"})
    eventually(lambda: len(worker.leftovers()) == 3, 10)

    worker.kill9_everything()

    eventually(lambda: not worker.leftovers(), 5)


@pytest.mark.skipif(not processes.HAS_PROC, reason="a process that left its group is found through /proc only")
def test_a_process_that_outlives_its_worker_fails_the_test_and_is_ended(server_dir, tmp_path):
    env = {"CL_SERVER_DIR": server_dir, "SAMPLE_GRANDCHILD": "sleep 60"}
    worker = Worker("--concurrency=1", app=APP, env=env, log_path=tmp_path / "worker.log")
    worker.wait_until_ready()
    eventually(lambda: len(worker.leftovers()) == 3, 10)

    with pytest.raises(AssertionError, match=r"outlived it: .*sleep 60"):
        worker.clean_up()

    eventually(lambda: not worker.leftovers(), 5)


def test_a_worker_that_cannot_start_shows_its_log_at_once(run_worker):
    with pytest.raises(AssertionError, match=r"exited with \d+ before it said ' ready.'(?s:.*)no_such_app"):
        run_worker(app="tests.tooling.no_such_app")


def test_a_worker_sees_no_setting_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://the-real-one/")
    worker = Worker("--help", app=APP, env={"WORKER_ID": "w1"}, log_path=tmp_path / "worker.log")
    environment = worker._environment({"WORKER_ID": "w1"})
    worker.wait()

    assert {name for name in environment if is_setting(name)} == {"WORKER_ID"}


def test_the_tests_see_no_setting_of_the_host():
    assert [name for name in os.environ if is_setting(name)] == []


def test_clean_environment_forgets_what_a_test_left(monkeypatch, request):
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://the-real-one/")

    request.getfixturevalue("clean_environment")

    assert "CELERY_BROKER_URL" not in os.environ


def test_eventually_says_what_it_waited_for():
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the cows come home \(last value: 0\)"):
        eventually(lambda: 0, 0.05, "the cows come home")


def test_stays_fails_as_soon_as_it_is_no_longer_so():
    values = iter([1, 1, 0])
    began = time.monotonic()

    with pytest.raises(AssertionError, match=r"no longer so after \d\.\d\d s: the cows are home \(value: 0\)"):
        stays(lambda: next(values), 60, "the cows are home", interval_s=0.01)

    assert time.monotonic() - began < 30


def test_stays_looks_until_the_time_has_passed_and_returns_the_last_value():
    began, looks = time.monotonic(), []

    last = stays(lambda: looks.append(time.monotonic() - began) or len(looks), 0.2, interval_s=0.01)

    assert last == len(looks) > 2
    assert looks[0] < 0.1
    assert looks[-1] >= 0.2


def test_server_dir_leaves_room_for_a_unix_socket(server_dir):
    assert os.environ["CL_SERVER_DIR"] == str(server_dir)
    if sys.platform == "linux":
        assert len(str(server_dir)) < 40
