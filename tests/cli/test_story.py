"""`jobs explain`: what happened in order, and at the end why a job waits or who runs it."""

import json
import re
from datetime import timedelta

import pytest
from sqlalchemy import update

from db.models import task_logs
from db.records import now
from tasks.cli.jobs import jobs
from tests.tooling.waiting import eventually

ID = "8af269fb-e3fe-466a-b147-05f91584394b"


def explained(commands, job_id=ID):
    result = commands.run(jobs, "explain", job_id)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def waits(commands, job_id=ID):
    """The reasons of the last lines."""
    return [line.split("  waits    ")[1] for line in explained(commands, job_id) if "  waits    " in line]


@pytest.mark.parametrize(
    ("since", "shown"),
    [
        ({"seconds": 0.0123}, "+0.012 s"),
        ({"seconds": -59}, "-59.000 s"),
        ({"minutes": 2, "seconds": 3}, "+2:03"),
        ({"minutes": -1, "seconds": -15}, "-1:15"),
        ({"hours": 1, "minutes": 2, "seconds": 3}, "+1:02:03"),
        ({"days": 3, "hours": 1, "minutes": 2, "seconds": 3}, "+3d 1:02:03"),
        ({"days": -3}, "-3d 0:00:00"),
    ],
)
def test_a_change_says_how_long_after_the_jobs_creation_it_came_and_before_it_where_clocks_differ(
    commands, since, shown
):
    commands.job(ID)
    with commands.store.database.transaction() as connection:
        connection.execute(
            update(task_logs).values(created_at=commands.store.job(ID)["created_at"] + timedelta(**since))
        )

    created = next(line for line in explained(commands) if "  created" in line)

    assert f" {shown}  created" in created


# One that waits


def test_no_worker_serves_its_queue_and_the_nearest_that_one_serves_is_named(commands):
    commands.worker("edge-1", "image_resize")
    commands.job(ID, queue="image_reszie")

    assert waits(commands)[0] == "no worker serves image_reszie; did you mean image_resize?"


def test_its_queue_is_paused(commands):
    commands.worker("edge-1", "image_resize")
    commands.job(ID)
    commands.store.pause("image_resize", reason="the disk is full")

    assert waits(commands)[0] == "image_resize is paused: the disk is full"


def test_it_is_due_later(commands):
    commands.worker("edge-1", "image_resize")
    due = now() + timedelta(hours=1)
    commands.job(ID, is_resting=True, run_after_utc=due)

    assert waits(commands) == [f"is due at {due:%Y-%m-%d %H:%M:%S} UTC"]


def test_others_come_first(commands):
    commands.worker("edge-1", "image_resize")
    for number in range(2):
        commands.job(f"before-{number}")
    commands.job(ID)
    commands.job("urgent", priority=9)
    commands.job("later")

    assert waits(commands) == ["behind 3 other jobs of image_resize"]


def test_all_workers_of_its_queue_are_busy(commands):
    commands.worker("edge-1", "image_resize", current_tasks=["another"])
    commands.job(ID)

    assert waits(commands) == ["it is the next one; all workers of its queue are busy"]


# The lines


def test_a_running_job_says_who_runs_it_and_how_far_it_is(commands):
    commands.worker("edge-1", "image_resize")
    commands.claim(commands.job(ID))
    commands.store.progress(ID, 1, percent=40.0, stage="encode")

    lines = explained(commands, ID[:4])

    assert lines[0] == f"{ID}: image_resize, running"
    for line in lines[1:]:
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}   +\+\d\.\d{3} s  [a-z]+", line)
    assert [line.split()[4] for line in lines[1:]] == ["created", "claimed", "started", "runs"]
    assert re.search(r"  runs     edge-1  40 % \(encode\), attempt 1, heard of \d s ago$", lines[-1])


def test_json_is_one_object_a_line(commands):
    commands.job(ID)

    lines = [json.loads(line) for line in commands.run(jobs, "explain", ID, "--json").stdout.splitlines()]

    assert set(lines[0]) == {"at", "since_s", "event", "worker", "text"}
    assert (lines[0]["event"], lines[0]["since_s"]) == ("created", 0.0)
    assert lines[-1]["event"] == "waits"


def test_an_unknown_id_is_said_in_one_line(commands):
    result = commands.run(jobs, "explain", "nope")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: no job's id starts with 'nope'; celery -A tasks jobs list shows them\n"


def test_what_an_error_holds_stays_on_its_line(commands):
    commands.job(ID)
    commands.store.pause("image_resize", reason="one\ntwo\x1b[2J")

    assert r"image_resize is paused: one\ntwo\x1b[2J" in waits(commands)


# One that has ended


@pytest.fixture
def ended(celery, run_worker, plug_ins):
    """`ended(capability, ...)`: what is explained of a job once a real worker has ended it, without the times."""
    env = plug_ins | {"WORKER_ID": "edge-1", "MAX_ATTEMPTS": 2, "MAX_DEATHS": 2}
    run_worker("--concurrency=1", env=env)

    def run(capability, *arguments):
        job_id = celery("submit", capability, *arguments, env=env).stdout.strip()

        def has_ended():
            told = celery("jobs", "explain", job_id, env=env)
            assert told.returncode == 0, told.stderr
            lines = told.stdout.splitlines()
            return lines if lines[0].endswith((", completed", ", failed")) else None

        return [line[24:].split(" s  ", 1)[1] for line in eventually(has_ended, 40, interval_s=0.1)[1:]]

    return run


def test_the_stories_of_jobs_that_a_worker_has_ended(ended, photo, tmp_path):
    assert ended("image_resize", photo, "out.webp", "--width", 80) == [
        "created",
        "claimed    edge-1  attempt 1",
        "started    edge-1",
        "completed  edge-1",
    ]

    # After all its retries
    failed = ended("recover", tmp_path / "runs", 9)
    told = [line.split()[0] for line in failed]
    assert told == ["created", "claimed", "started", "retry", "claimed", "started", "failed"]
    assert "TransientError: the network is away, run 1, runs again after " in failed[3]
    assert failed[-1].endswith("edge-1  TransientError: the network is away, run 2")

    # Poisoned
    poisoned = ended("kill_its_worker", tmp_path / "deaths")
    assert [line.split()[0] for line in poisoned].count("lost") == 2
    assert "1 of its workers have died" in next(line for line in poisoned if line.startswith("lost"))
    assert "WorkerLost: 2 workers died while running this job (MAX_DEATHS=2)" in poisoned[-1]
