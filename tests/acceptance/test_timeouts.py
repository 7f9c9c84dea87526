"""A job that takes too long ends: with a clear failure, or a retry where its task says so; never in a stuck row."""

import pytest
import pyvips

from tests.acceptance.deployment import lines
from tests.tooling import processes
from tests.tooling.waiting import eventually

GET = {"timeout": 30}


@pytest.fixture(scope="module", autouse=True)
def _worker(deployment):
    deployment.start_worker("--concurrency=2")


@pytest.fixture
def task(deployment):
    return deployment.task


def test_the_soft_limit_interrupts_a_job_and_says_so(deployment, task, tmp_path):
    job = task.stay.apply_async((str(tmp_path / "runs"), 30.0), soft_time_limit=1)

    row = deployment.wait_for(job, "failed")

    assert row["error_type"] == "JobTimeout"
    assert "stay ran longer than its soft time limit of 1 s" in row["error_message"]
    assert "soft_time_limit" in row["error_message"]
    assert lines(tmp_path / "runs") == ["begin"]
    assert deployment.events(job) == ["created", "claimed", "started", "failed"]


def test_the_hard_limit_ends_a_call_that_nothing_interrupts(deployment, task, tmp_path):
    job = task.stay_whatever.apply_async((str(tmp_path / "runs"), 30.0), time_limit=1)
    neighbour = task.note.delay(str(tmp_path / "neighbour"), "neighbour", 2.0)

    row = deployment.wait_for(job, "failed")

    assert row["error_type"] == "JobTimeout"
    assert "stay_whatever ran longer than its hard time limit of 1 s" in row["error_message"]
    assert (row["deaths"], row["retry_count"]) == (0, 0)
    assert deployment.events(job) == ["created", "claimed", "started", "failed"]
    assert neighbour.get(**GET) == "neighbour"
    assert task.add.delay(1, 1).get(**GET) == 2


@pytest.mark.parametrize("limit", ["soft_time_limit", "time_limit"])
def test_a_task_that_wants_it_is_tried_again(deployment, task, tmp_path, limit):
    job = task.hurry.apply_async((str(tmp_path / "runs"), 30.0), **{limit: 1})

    assert job.get(**GET) == 2
    assert deployment.events(job) == ["created", "claimed", "started", "retry", "claimed", "started", "completed"]
    row = deployment.row(job)
    assert (row["retry_count"], row["deaths"]) == (1, 0)


def test_what_a_job_has_started_ends_with_it(deployment, task, tmp_path):
    job = task.stay.apply_async((str(tmp_path / "runs"), 60.0, True), time_limit=2)
    eventually(lambda: lines(tmp_path / "runs.started"), 10)
    pid = int(lines(tmp_path / "runs.started")[0])

    deployment.wait_for(job, "failed")

    eventually(lambda: not processes.is_running(pid), 3)


def temp_files(directory):
    return list(directory.glob(".media-tasks-*"))


@pytest.mark.slow
def test_an_image_that_takes_too_long_leaves_no_temp_file_and_no_output(deployment, task, tmp_path):
    pyvips.Image.gaussnoise(6000, 6000).cast("uchar").pngsave(str(tmp_path / "in.png"), compression=0)
    job = task.image_conversion.apply_async((tmp_path / "in.png", tmp_path / "out.avif"), time_limit=4)
    eventually(lambda: temp_files(tmp_path), 10)

    row = deployment.wait_for(job, "failed")

    assert row["error_type"] == "JobTimeout"
    eventually(lambda: not temp_files(tmp_path), 3)
    assert not (tmp_path / "out.avif").exists()


def test_a_job_that_opens_temp_files_until_it_is_killed_leaves_none(deployment, task, tmp_path):
    job = task.litter.apply_async((tmp_path / "out",), time_limit=1)

    deployment.wait_for(job, "failed")

    (pid,) = map(int, lines(tmp_path / "out.pid"))
    eventually(lambda: not processes.is_running(pid), 3)
    assert temp_files(tmp_path) == []


def test_a_cancelled_job_takes_with_it_what_it_has_started(deployment, task, tmp_path):
    from tasks import control

    job = task.stay.delay(str(tmp_path / "runs"), 60.0, True)
    eventually(lambda: lines(tmp_path / "runs.started"), 10)
    deployment.wait_for(job, "running")
    pid = int(lines(tmp_path / "runs.started")[0])

    control.cancel(job.id, app=deployment.app)

    eventually(lambda: not processes.is_running(pid), 3)
    assert deployment.row(job)["status"] == "cancelled"


def test_limits_grow_with_the_input(task, tmp_path):
    (tmp_path / "in.jpg").write_bytes(b"x" * 3_000_000)
    resize = task.image_resize

    _, alone = resize.limits({"input": str(tmp_path / "missing.jpg")})
    _, larger = resize.limits({"input": str(tmp_path / "in.jpg")})

    assert alone == resize.time_limit
    assert larger == pytest.approx(resize.time_limit + 3 * resize.seconds_per_megabyte)


@pytest.mark.parametrize(("name", "kind"), [("read", "soft"), ("read_whatever", "hard")])
def test_a_job_has_the_time_that_its_input_takes(deployment, task, tmp_path, name, kind):
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"x" * 1_000_000)
    read = getattr(task, name)

    jobs = [read.delay(large, 2.0), read.delay(small, 2.0)]

    row = deployment.wait_for(jobs[1], "failed")
    assert row["error_type"] == "JobTimeout"
    assert f"{name} ran longer than its {kind} time limit of 1.001 s" in row["error_message"]
    assert jobs[0].get(**GET) == "read"
    assert deployment.events(jobs[0]) == ["created", "claimed", "started", "completed"]


def test_a_limit_of_the_caller_does_not_grow(deployment, task, tmp_path):
    (tmp_path / "large.jpg").write_bytes(b"x" * 1_000_000)

    job = task.read.apply_async((tmp_path / "large.jpg", 20.0), soft_time_limit=1)

    assert "time limit of 1 s" in deployment.wait_for(job, "failed")["error_message"]


def test_a_body_that_runs_out_of_memory_fails_and_its_worker_lives(deployment, task):
    job = task.exhaust_memory.delay()

    row = deployment.wait_for(job, "failed")

    assert row["error_type"] == "OutOfMemory"
    assert task.add.delay(1, 1).get(**GET) == 2


def test_a_worker_shows_how_many_jobs_it_has_ended(deployment, task, tmp_path):
    def shown():
        (worker,) = deployment.app.live_workers()
        return worker["tasks_processed"], worker["tasks_failed"]

    eventually(lambda: sum(shown()) >= len(deployment.app.store.jobs(status="failed")), 10)
    eventually(lambda: deployment.app.live_workers()[0]["current_tasks"] == [], 10)
    processed, failed = eventually(shown, 10)

    task.add.delay(1, 1).get(**GET)
    deployment.wait_for(task.fail.delay(), "failed")

    eventually(lambda: shown() == (processed + 1, failed + 1), 10, lambda: f"{shown()} after {(processed, failed)}")
