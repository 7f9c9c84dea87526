"""`queues list | pause | resume | purge`."""

import json
import os
import subprocess
import sys

import pytest

from tasks.cli.queues import queues
from tests.cli.conftest import REPOSITORY
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually


def test_the_list_shows_what_waits_and_runs_who_serves_and_what_is_paused(commands):
    commands.worker("edge-1", "image_resize", "image_conversion")
    commands.worker("edge-2", "image_resize")
    commands.job("aaaa")
    commands.job("bbbb")
    commands.claim(commands.job("cccc"))
    commands.store.pause("image_conversion", reason="[red]no\ndisk")

    lines = commands.run(queues, "list").stdout.splitlines()

    assert lines[0].split() == ["queue", "queued", "running", "workers", "paused"]
    lines[1:] = [line for line in lines[1:] if line.startswith("image_")]  # other tests declare capabilities, too
    assert lines[1].split() == ["image_conversion", "0", "0", "edge-1", "yes:", r"[red]no\ndisk"]
    assert lines[2].split() == ["image_renditions", "0", "0"]
    assert lines[3].split() == ["image_resize", "2", "1", "edge-1,", "edge-2"]
    assert max(map(len, commands.run(queues, "list", columns=80).stdout.splitlines())) <= 80


def test_json_is_one_object_a_line(commands):
    commands.job("aaaa")
    commands.run(queues, "pause", "image_resize", "--reason", "x", "--for", "1d")

    rows = {row["name"]: row for row in map(json.loads, commands.run(queues, "list", "--json").stdout.splitlines())}

    paused = rows["image_resize"]
    assert (paused["queued"], paused["running"], paused["workers"]) == (1, 0, [])
    assert (paused["is_paused"], paused["reason"]) == (True, "x")
    assert paused["paused_until"].endswith("+00:00")
    assert rows["image_conversion"]["paused_until"] is None


@pytest.mark.parametrize(
    ("duration", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("0.5h", 1800)]
)
def test_a_pause_lasts_as_long_as_it_is_told(commands, duration, seconds):
    result = commands.run(queues, "pause", "image_resize", "--for", duration)

    assert result.exit_code == 0, result.stderr
    (pause,) = commands.store.paused()
    assert (pause["paused_until"] - pause["paused_at"]).total_seconds() == pytest.approx(seconds, abs=1)
    assert result.stdout.startswith("image_resize: paused until ")


@pytest.mark.parametrize("duration", ["0", "-5", "10x", "", "nan", "1h30m", "99999999d", "9" * 400])
def test_what_is_no_duration_is_refused(commands, duration):
    result = commands.run(queues, "pause", "image_resize", "--for", duration)

    assert result.exit_code == 2
    assert "is no duration such as 90, 90s, 10m, 2h or 1d" in result.stderr
    assert commands.store.paused() == []


@pytest.mark.parametrize("command", ["pause", "resume", "purge"])
def test_a_queue_that_nothing_has_the_name_of_is_refused_with_the_nearest(commands, command):
    result = commands.run(queues, command, "image_reszie")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: no queue is called image_reszie; did you mean image_resize?\n"


def test_a_queue_that_is_like_no_other_is_refused_with_all_there_are(commands):
    result = commands.run(queues, "pause", "xyzzy")

    assert result.stderr.startswith("Error: no queue is called xyzzy; known: ")
    assert "image_conversion, image_renditions, image_resize" in result.stderr


def test_resume_says_what_goes_on_and_may_be_repeated(commands):
    commands.worker("edge-1", "image_resize")
    commands.job("aaaa")
    commands.run(queues, "pause", "image_resize", "--reason", "maintenance")

    first, second = commands.run(queues, "resume", "image_resize"), commands.run(queues, "resume", "image_resize")

    assert (first.exit_code, first.stdout) == (0, "image_resize: resumed; 1 job queued\n")
    assert (second.exit_code, second.stdout) == (0, "image_resize: was not paused; 1 job queued\n")


def test_resume_of_a_queue_that_nobody_serves_says_so(commands):
    commands.store.pause("image_resize")

    result = commands.run(queues, "resume", "image_resize")

    served = "no live worker serves it: celery -A tasks worker -Q image_resize"
    assert result.stdout == f"image_resize: resumed; 0 jobs queued, and {served}\n"


def test_purge_cancels_nothing_unasked_where_nobody_can_answer(celery, photo):
    job_id = celery("submit", "image_resize", photo, "out.webp", "--width", 80).stdout.strip()

    refused = celery("queues", "purge", "image_resize")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.error == "Error: this cancels 1 queued job of image_resize; where nobody can be asked, add --yes"
    assert json.loads(celery("jobs", "show", job_id, "--json").stdout)["status"] == "queued"

    done = celery("queues", "purge", "image_resize", "--yes")
    assert (done.returncode, done.stdout) == (0, "image_resize: 1 job cancelled\n")
    shown = json.loads(celery("jobs", "show", job_id, "--json").stdout)
    assert (shown["status"], shown["error_message"]) == ("cancelled", "the queue image_resize was purged")


def test_purge_asks_nothing_where_nothing_waits(celery):
    done = celery("queues", "purge", "image_resize")

    assert (done.returncode, done.stdout, done.stderr) == (0, "image_resize: 0 jobs cancelled\n", "")


def test_purge_asks_first_at_a_terminal(celery, photo, server_dir):
    celery("submit", "image_resize", photo, "out.webp", "--width", 80)
    ours, theirs = os.openpty()
    env = without_settings(os.environ) | {"CL_SERVER_DIR": str(server_dir), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "celery", "-A", "tasks", "queues", "purge", "image_resize"]

    for answer, said in (b"n\n", ""), (b"y\n", "image_resize: 1 job cancelled\n"):
        os.write(ours, answer)
        done = subprocess.run(command, env=env, stdin=theirs, capture_output=True, text=True, check=False)
        assert "Cancel 1 queued job of image_resize? [y/N]" in done.stderr
        assert done.stdout == said
    os.close(ours)
    os.close(theirs)


def test_purge_spares_other_queues_and_running_jobs(commands):
    commands.job("queued")
    commands.claim(commands.job("running"))
    commands.job("other", queue="image_conversion", task_type="image_conversion")

    result = commands.run(queues, "purge", "image_resize", "--yes")

    assert result.stdout == "image_resize: 1 job cancelled\n"
    statuses = {row["job_id"]: row["status"] for row in commands.store.jobs()}
    assert statuses == {"queued": "cancelled", "running": "running", "other": "queued"}


def test_a_pause_outlives_its_worker_and_ends_with_resume(celery, run_worker, photo, tmp_path):
    # Given a worker whose queue is paused
    worker = run_worker("-Q", "image_resize", "--concurrency=1")
    paused = celery("queues", "pause", "image_resize", "--reason", "maintenance", "--for", "1h")
    assert paused.returncode == 0, paused.stderr
    worker.wait_for_log("the queue image_resize is paused")

    # When it is started anew, and a job comes
    worker.terminate()
    worker.wait()
    restarted = run_worker("-Q", "image_resize", "--concurrency=1")
    restarted.wait_for_log("the queue image_resize is paused")
    job_id = celery("submit", "image_resize", photo, "out.webp", "--width", 80).stdout.strip()

    # Then it waits, and says why
    told = celery("jobs", "explain", job_id).stdout
    assert "image_resize is paused until " in told
    assert "maintenance" in told
    assert not (tmp_path / "out.webp").exists()

    # And when the queue is resumed, it is done
    assert celery("queues", "resume", "image_resize").stdout.startswith("image_resize: resumed; 1 job queued")
    eventually((tmp_path / "out.webp").exists, 20)
