"""Processes are killed in mid-job, the database is locked, pools and settings differ: every job ends once."""

import os
import signal
import subprocess
import sys
import time

import pytest
import pyvips

from tests.acceptance.deployment import (
    REPOSITORY,
    deployed,
    kill_pool_child_that_notes,
    lines,
)
from tests.tooling.environment import without_settings
from tests.tooling.locks import Lock
from tests.tooling.waiting import eventually

COMPLETED = ["created", "claimed", "started", "completed"]
TAKEN_OVER = ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
GET = {"timeout": 20}


def test_a_killed_pool_child_costs_one_attempt_and_nothing_else(own, task, tmp_path):
    own.start_worker("--concurrency=2")
    job = task.note.delay(str(tmp_path / "runs"), "job", 2.0)
    neighbour = task.note.delay(str(tmp_path / "neighbour"), "neighbour", 3.0)
    eventually(lambda: lines(tmp_path / "runs") and lines(tmp_path / "neighbour"), 10)

    kill_pool_child_that_notes(tmp_path / "runs")

    assert job.get(**GET) == "job"
    assert lines(tmp_path / "runs") == ["begin job", "begin job", "end job"]
    assert own.events(job) == TAKEN_OVER
    row = own.row(job)
    assert (row["attempt"], row["deaths"], row["publication"], row["retry_count"]) == (3, 1, 2, 0)
    (lost,) = [log for log in own.app.store.logs(job.id) if log["event_type"] == "lost"]
    assert lost["message"] == "its process died"  # its own main process has seen it
    neighbour.get(**GET)
    assert own.events(neighbour) == COMPLETED
    assert lines(tmp_path / "neighbour") == ["begin neighbour", "end neighbour"]


def test_an_image_job_whose_process_is_killed_has_its_whole_output_in_the_end(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1", "-Q", "image_resize")
    (pyvips.Image.perlin(6000, 6000, cell_size=50) * 100 + 128).cast("uchar").pngsave(
        str(tmp_path / "in.png"), compression=1
    )
    job = task.image_resize.delay(tmp_path / "in.png", tmp_path / "out" / "out.webp", width=3000)
    own.wait_for(job, "running")

    (child,) = worker.child_pids()
    os.kill(child, signal.SIGKILL)

    result = job.get(**GET)
    assert (result["width"], result["height"]) == (3000, 3000)
    image = pyvips.Image.new_from_file(str(tmp_path / "out" / "out.webp"))
    assert (image.width, image.height) == (3000, 3000)
    assert 100 < image.avg() < 150
    assert own.events(job) == TAKEN_OVER


def test_a_job_that_kills_its_worker_fails_after_three_deaths_and_its_neighbours_live(own, task, tmp_path):
    worker = own.start_worker("--concurrency=2")
    poison = task.kill_its_worker.delay(str(tmp_path / "runs"))
    neighbours = [task.note.delay("/dev/null", "", 0.3) for _ in range(10)]

    row = own.wait_for(poison, "failed")

    assert row["error_type"] == "WorkerLost"
    assert "3 workers died" in row["error_message"]
    assert "MAX_DEATHS" in row["error_message"]
    assert row["deaths"] == 3
    assert lines(tmp_path / "runs") == ["run"] * 3
    assert own.events(poison) == ["created", *["claimed", "started", "lost"] * 3, "failed"]
    for neighbour in neighbours:
        neighbour.get(**GET)
    assert [own.events(neighbour) for neighbour in neighbours] == [COMPLETED] * 10
    assert worker.is_alive()


def test_a_lost_workers_job_runs_on_another_one_within_three_seconds(own, task, tmp_path):
    first = own.start_worker("--concurrency=1")
    job = task.dawdle.delay(str(tmp_path / "runs"), 60.0, 0.1)
    eventually(lambda: lines(tmp_path / "runs"), 10)
    own.start_worker("--concurrency=1")

    first.kill9_everything()
    killed = time.monotonic()

    eventually(lambda: len(lines(tmp_path / "runs")) == 2, 10)
    assert time.monotonic() - killed < 3
    assert job.get(**GET) == 2
    assert own.events(job) == TAKEN_OVER
    assert (own.row(job)["claimed_by"], own.row(job)["deaths"]) == ("w2", 1)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_run_jobs_and_record_them(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=2")
    pyvips.Image.black(60, 40).pngsave(str(tmp_path / "in.png"))

    jobs = [task.image_resize.delay(tmp_path / "in.png", tmp_path / f"{n}.png", width=10 + n) for n in range(6)]
    steps = task.add.s(1, 1) | task.add.s(2)
    retried = task.recover.delay(str(tmp_path / "runs"))

    assert [job.get(**GET)["width"] for job in jobs] == [10, 11, 12, 13, 14, 15]
    assert steps.delay().get(**GET) == 4
    assert retried.get(**GET) == 2
    assert [own.events(job) for job in jobs] == [COMPLETED] * 6
    worker.terminate()
    assert worker.wait() == 0


@pytest.mark.slow
def test_a_locked_database_delays_claims_and_completions_and_fails_none(own, task, tmp_path):
    worker = own.start_worker("--concurrency=2")
    running = task.note.delay(str(tmp_path / "running"), "running", 1.0)
    eventually(lambda: lines(tmp_path / "running"), 10)
    # Published, but not claimed yet: the worker finds the message while the database is locked.
    own.app.control.cancel_consumer("add", reply=True, timeout=2)
    waiting = task.add.delay(1, 1)

    with Lock(own.server_dir / "media_store.db", 6.0):  # longer than busy_timeout
        own.app.control.add_consumer("add", reply=True, timeout=2)
        eventually(lambda: lines(tmp_path / "running", "end"), 10)

    assert running.get(**GET) == "running"
    assert waiting.get(**GET) == 2
    assert own.events(running) == own.events(waiting) == COMPLETED
    assert lines(tmp_path / "running") == ["begin running", "end running"]
    assert worker.is_alive()
    assert "the job database does not answer" in worker.log()


@pytest.mark.slow
def test_a_locked_database_does_not_break_a_chain(own, task, tmp_path):
    own.start_worker("--concurrency=2")
    steps = (task.note.s(str(tmp_path / "runs"), "first", 0.5) | task.note_parts.s(str(tmp_path / "body")))()
    eventually(lambda: lines(tmp_path / "runs"), 10)

    with Lock(own.server_dir / "media_store.db", 6.5):
        pass

    assert steps.get(**GET) == "first"
    assert own.events(steps.parent) == own.events(steps) == COMPLETED
    assert lines(tmp_path / "runs") == ["begin first", "end first"]


def test_a_producer_waits_for_a_locked_database_too(own, task):
    with Lock(own.server_dir / "media_store.db", 0.1):
        pass  # the first use makes the tables
    own.app.store.counts()

    with Lock(own.server_dir / "media_store.db", 3.0):
        job = task.add.delay(1, 1)

    assert own.events(job) == ["created"]


def test_a_worker_serves_only_the_queue_that_it_was_given(own, task, tmp_path):
    own.start_worker("--concurrency=1", "-Q", "image_resize")
    pyvips.Image.black(60, 40).pngsave(str(tmp_path / "in.png"))
    others = [task.image_conversion.delay(tmp_path / "in.png", tmp_path / "out.webp"), task.add.delay(1, 1)]

    job = task.image_resize.delay(tmp_path / "in.png", tmp_path / "out.png", width=30)

    job.get(**GET)
    assert [own.events(other) for other in others] == [["created"]] * 2
    assert [worker["capabilities"] for worker in own.app.live_workers()] == [["image_resize"]]


def test_without_the_mirror_jobs_run_plainly(server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"MIRROR": "off"}) as plain:
        worker = plain.start_worker("--concurrency=1")
        pyvips.Image.black(60, 40).pngsave(str(tmp_path / "in.png"))

        plain.task.image_resize.delay(tmp_path / "in.png", tmp_path / "out.png", width=30)
        eventually((tmp_path / "out.png").exists, 15)
        assert pyvips.Image.new_from_file(str(tmp_path / "out.png")).width == 30

        plain.task.kill_its_worker.delay(str(tmp_path / "runs"))
        eventually(lambda: len(lines(tmp_path / "runs")) > 1, 20)  # Celery delivers it again, and counts no deaths
        assert worker.is_alive()
        assert not (server_dir / "media_store.db").exists()
        worker.clean_up()


def test_an_eager_run_is_recorded(own, task):
    result = task.add.apply((40, 2))

    assert result.get() == 42
    assert own.events(result) == COMPLETED
    assert own.row(result)["result_data"] == 42


def test_an_eager_run_whose_process_is_killed_fails_and_a_living_one_goes_on(own, task, tmp_path):
    code = "import sys; from tests.acceptance.capabilities import note; note.apply((sys.argv[1], '', 60.0))"
    env = without_settings(os.environ) | {name: str(value) for name, value in own.env.items()}
    env["PYTHONPATH"] = str(REPOSITORY)
    callers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / name], env=env, cwd=REPOSITORY)
        for name in ("killed", "living")
    ]
    try:
        eventually(lambda: lines(tmp_path / "killed") and lines(tmp_path / "living"), 30)
        own.start_worker("--concurrency=1")
        dead, living = (
            next(row for row in own.app.store.jobs() if row["parameters"]["file"] == str(tmp_path / name))["job_id"]
            for name in ("killed", "living")
        )
        callers[0].kill()

        row = own.wait_for(dead, "failed", timeout_s=15)
        assert (row["error_type"], row["deaths"]) == ("WorkerLost", 0)
        assert own.events(dead) == ["created", "claimed", "started", "failed"]
        assert own.row(living)["status"] == "running"
        assert lines(tmp_path / "killed") == ["begin "]
    finally:
        for caller in callers:
            caller.kill()
            caller.wait()


def test_an_eager_run_that_fails_is_recorded(own, task):
    result = task.fail.apply()

    assert result.state == "FAILURE"
    assert own.events(result) == ["created", "claimed", "started", "failed"]
