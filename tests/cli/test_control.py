"""`jobs cancel | retry | replay`: a line for each job, and exit code 1 if something could not be done."""

import json
from datetime import timedelta
from functools import partial

import pytest

from db.records import Failure, Fence, Status, now
from tasks.cli.jobs import jobs
from tests.tooling import processes
from tests.tooling.waiting import eventually
from tests.unit.jobs import new_job

CORRUPT = Failure(error_type="CorruptMedia", error_module="tasks.errors", error_message="in.jpg is broken")


@pytest.fixture
def failed(commands):
    """`failed(job_id)`: a job that failed by itself."""

    def make(job_id, **columns):
        commands.claim(job := commands.job(job_id, **columns))
        assert commands.store.end(job.job_id, Status.FAILED, CORRUPT, fence=Fence(attempt=1))
        return job

    return make


def status(commands, job_id):
    return commands.store.job(job_id)["status"]


# Cancel


def test_a_running_job_shows_as_cancelled_within_three_seconds_and_its_process_is_gone(
    celery, run_worker, plug_ins, tmp_path
):
    # Given a job that runs for a minute
    run_worker("-Q", "note", "--concurrency=1", env=plug_ins | {"WORKER_ID": "edge-1"})
    job_id = celery("submit", "note", tmp_path / "runs", "", 60, env=plug_ins).stdout.strip()
    eventually((tmp_path / "runs").exists, 20)
    child = int((tmp_path / "runs.pid").read_text())

    # When it is cancelled
    done = celery("jobs", "cancel", job_id[:10], "--reason", "not wanted", env=plug_ins)

    # Then its process ends, nobody runs it again, and it says why
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{job_id}: cancelled; it was running on edge-1, which ends it\n"
    eventually(lambda: not processes.is_running(child), 3)
    shown = json.loads(celery("jobs", "show", job_id, "--json").stdout)
    assert (shown["status"], shown["error_message"]) == ("cancelled", "cancelled: not wanted")
    assert (tmp_path / "runs").read_text() == "begin \n"


def test_each_job_gets_its_line_and_what_cannot_be_done_does_not_keep_the_others(commands):
    commands.job("aaaa-queued")
    commands.claim(done := commands.job("bbbb-done"))
    commands.store.complete(done.job_id, 1, {})
    commands.job("cccc-queued")

    result = commands.run(jobs, "cancel", "aaaa", "bbbb", "nope", "cccc")

    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["aaaa-queued: cancelled", "cccc-queued: cancelled"]
    assert result.stderr.splitlines() == [
        "Error: bbbb-done is completed already; there is nothing to cancel",
        "Error: no job's id starts with 'nope'; celery -A tasks jobs list shows them",
    ]
    assert status(commands, "cccc-queued") == "cancelled"


def test_cancelling_twice_is_no_error(commands):
    commands.job("aaaa")
    commands.run(jobs, "cancel", "aaaa")

    again = commands.run(jobs, "cancel", "aaaa")

    assert (again.exit_code, again.stdout) == (0, "aaaa: cancelled already\n")


# Retry


def test_a_job_that_waits_for_its_time_is_due_now(commands):
    commands.worker("edge-1", "image_resize")
    commands.job("aaaa", is_resting=True, run_after_utc=now() + timedelta(hours=1))

    result = commands.run(jobs, "retry", "aaaa")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "aaaa: due now; it waited\n", "")
    assert commands.store.job("aaaa")["run_after_utc"] <= now()


def test_retry_runs_failed_jobs_again_and_refuses_running_ones(commands, failed):
    failed("aaaa")
    commands.claim(commands.job("bbbb"))
    commands.job("cccc")

    result = commands.run(jobs, "retry", "aaaa", "bbbb", "cccc")

    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["aaaa: due now; it was failed", "cccc: due already"]
    assert "Error: bbbb is running; only what waits or failed can run now" in result.stderr
    assert status(commands, "aaaa") == "queued"


def test_retry_leaves_cancelled_jobs_to_replay(commands):
    commands.job("aaaa")
    commands.run(jobs, "cancel", "aaaa")

    result = commands.run(jobs, "retry", "aaaa")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: aaaa was cancelled; `jobs replay` runs it again\n"
    assert status(commands, "aaaa") == "cancelled"


@pytest.mark.parametrize("command", ["retry", "replay"])
def test_a_remark_says_why_a_job_that_is_due_will_wait(commands, failed, command):
    failed("aaaa")
    failed("bbbb", queue="image_conversion")
    commands.store.pause("image_conversion")

    result = commands.run(jobs, command, "aaaa", "bbbb")

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "image_conversion is paused: celery -A tasks queues resume image_conversion",
        "no live worker serves image_resize: celery -A tasks worker -Q image_resize",
    ]


# Replay


def test_a_failed_job_is_done_when_it_is_replayed_with_its_input_mended(celery, run_worker, photo, broken, tmp_path):
    run_worker("-Q", "image_resize", "--concurrency=1")
    celery("submit", "image_resize", broken, "out.webp", "--width", 80, "--wait", "--timeout", 30)
    (row,) = map(json.loads, celery("jobs", "list", "--json", "--status", "failed").stdout.splitlines())
    broken.write_bytes(photo.read_bytes())

    done = celery("jobs", "replay", row["job_id"][:8])

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{row['job_id']}: queued again; it was failed\n"
    eventually((tmp_path / "out.webp").exists, 20)


def test_failed_takes_the_newest_of_a_capability_and_says_if_there_are_more(commands, failed):
    commands.worker("edge-1", "image_resize", "image_conversion")
    for number in range(3):
        failed(f"resize-{number}")
    failed("conversion", task_type="image_conversion")
    commands.job("queued")

    result = commands.run(jobs, "replay", "--failed", "--task", "image_resize", "--limit", "2")

    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["resize-2", "resize-1"]
    assert result.stderr == "only the newest 2; there are more: repeat it, or give --limit\n"
    assert [status(commands, f"resize-{number}") for number in range(3)] == ["failed", "queued", "queued"]
    assert status(commands, "conversion") == "failed"
    rest = commands.run(jobs, "replay", "--failed", "--task", "image_resize", "--limit", "1")
    assert (rest.stdout, rest.stderr) == ("resize-0: queued again; it was failed\n", "")


def test_failed_leaves_jobs_alone_that_failed_with_the_one_they_wait_for(commands, failed):
    """They lack its result, and follow it by themselves."""
    failed("first-step")
    for number in range(5):
        job_id = f"after-{number}"
        unknown = partial(new_job, job_id, task_type="image_resize", queue="image_resize")
        assert commands.store.end(job_id, Status.FAILED, CORRUPT, unknown=unknown, was_sent=False)

    result = commands.run(jobs, "replay", "--failed", "--limit", "1")

    assert result.stdout == "first-step: queued again; it was failed\n"
    assert status(commands, "after-0") == "failed"


def test_without_failed_jobs_it_says_so(commands):
    result = commands.run(jobs, "replay", "--failed", "--task", "image_resize")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no failed image_resize jobs\n")


def test_failed_of_a_misspelt_capability_is_an_error_that_names_the_nearest(commands, failed):
    failed("aaaa")

    result = commands.run(jobs, "replay", "--failed", "--task", "image_reszie")

    assert (result.exit_code, result.stdout) == (1, "")
    nearest = "no job of image_reszie, and no capability has that name; did you mean image_resize?"
    assert result.stderr == f"Error: {nearest}\n"
    assert status(commands, "aaaa") == "failed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the ids of jobs, or --failed"),
        (("aaaa", "--failed"), "give either ids or --failed, not both"),
        (("--task", "image_resize"), "they need --failed"),
        (("aaaa", "--limit", "3"), "they need --failed"),
    ],
)
def test_replay_is_told_either_ids_or_a_choice(commands, failed, arguments, said):
    failed("aaaa")

    result = commands.run(jobs, "replay", *arguments)

    assert result.exit_code == 2
    assert said in result.stderr
    assert status(commands, "aaaa") == "failed"


def test_a_completed_job_is_not_replayed(commands):
    commands.claim(done := commands.job("aaaa"))
    commands.store.complete(done.job_id, 1, {})

    result = commands.run(jobs, "replay", "aaaa")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: aaaa is completed; only failed and cancelled jobs can be replayed\n"


def test_a_replay_that_would_make_two_of_a_unique_job_is_refused_in_one_line(commands, failed):
    failed("aaaa", unique_key="photo-1")
    commands.job("bbbb", unique_key="photo-1")

    result = commands.run(jobs, "replay", "aaaa")

    assert result.exit_code == 1
    assert result.stderr == "Error: aaaa: bbbb lives, with the same unique_key; wait for it, or cancel it\n"
