"""People change their minds: jobs are cancelled, revoked and replayed, in every pool and in canvases."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from celery import chain, chord
from kombu import Queue

from tasks import control
from tasks.errors import InvalidArguments, PermanentError
from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually, stays

COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 30}


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_pool_without_processes_survives_the_cancel_of_a_running_job(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    job = task.note.delay(str(tmp_path / "runs"), "job", 4.0)
    eventually(lambda: lines(tmp_path / "runs"), 15)
    own.wait_for(job, "running")

    control.cancel(job.id, app=own.app)

    assert task.add.delay(1, 1).get(**GET) == 2
    assert worker.is_alive()
    assert own.events(job) == ["created", "claimed", "started", "cancelled"]


def test_a_revoked_job_can_be_replayed(own, task, tmp_path):
    own.start_worker("--concurrency=1")
    blocker = task.note.delay(str(tmp_path / "blocker"), "", 2.0)
    eventually(lambda: lines(tmp_path / "blocker"), 15)
    job = task.add.delay(40, 2)
    job.revoke()
    own.wait_for(job, "cancelled")
    blocker.get(**GET)

    assert control.replay(job.id, app=own.app)

    assert job.get(**GET) == 42
    assert own.events(job) == ["created", "cancelled", "replayed", "claimed", "started", "completed"]


def test_the_cancel_of_a_running_step_starts_no_next_one(own, task, tmp_path):
    own.start_worker("-P", "threads", "--concurrency=2")
    steps = chain(task.note.si(str(tmp_path / "first"), "first", 3.0), task.note.si(str(tmp_path / "second")))()
    eventually(lambda: lines(tmp_path / "first"), 15)
    own.wait_for(steps.parent, "running")

    control.cancel(steps.parent.id, app=own.app)
    eventually(lambda: lines(tmp_path / "first", "end"), 15)

    assert task.add.delay(1, 1).get(**GET) == 2
    # For longer than a dispatcher's round.
    stays(lambda: own.row(steps)["status"] == "cancelled" and not (tmp_path / "second").exists(), 1.5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_body_of_a_chord_runs_when_its_failed_member_is_replayed(own, task, tmp_path, steps):
    own.start_worker("--concurrency=2")
    header = [task.add.s(1, 1), task.recover_when.s(str(tmp_path / "mended"), 5)]
    result = chord(header, chain(task.total.s(), *[task.add.s(0)] * (steps - 1)))()
    own.wait_for(result, "failed")
    (tmp_path / "mended").touch()

    assert control.replay(result.parent[1].id, app=own.app)

    own.wait_for(result, "completed")
    assert own.row(result)["result_data"] == 7


def test_the_rest_of_a_chain_runs_when_its_failed_step_is_replayed(own, task, tmp_path):
    own.start_worker("--concurrency=2")
    result = chain(task.recover_when.s(str(tmp_path / "mended"), 5), task.add.s(10))()
    own.wait_for(result, "failed")
    (tmp_path / "mended").touch()

    assert control.replay(result.parent.id, app=own.app)

    own.wait_for(result, "completed")
    assert own.row(result)["result_data"] == 15


def test_a_step_that_was_never_sent_is_not_replayed_by_itself(own, task):
    from tasks.errors import InvalidArguments

    own.start_worker("--concurrency=1")
    result = chain(task.fail.si(), task.add.s(10))()
    own.wait_for(result, "failed")

    with pytest.raises(InvalidArguments, match="replay that one"):
        control.replay(result.id, app=own.app)


def test_a_job_may_run_again_with_other_arguments(own, task, tmp_path):
    own.start_worker("--concurrency=1")

    job = task.count_down.delay(str(tmp_path / "runs"), 2)

    assert job.get(**GET) == "lift-off"
    assert lines(tmp_path / "runs") == ["2", "1", "0"]
    assert own.row(job)["parameters"] == {"file": str(tmp_path / "runs"), "left": 0}


def test_a_job_may_replace_itself_by_one_that_is_due_later(own, task, tmp_path):
    own.start_worker("--concurrency=1")

    job = task.become_later.delay(str(tmp_path / "runs"))

    assert job.get(**GET) == 42
    assert lines(tmp_path / "runs") == ["became"]
    row = own.row(job)
    assert (row["task_type"], row["queue"], row["parameters"]) == ("add", "add", {"x": 40, "y": 2})


@pytest.mark.parametrize("kind", ["chain", "group", "chord"])
def test_a_job_that_replaces_itself_by_a_canvas_fails_and_says_what_to_do(own, task, kind):
    own.start_worker("--concurrency=1")

    with pytest.raises(InvalidArguments, match=f"become_canvas can't be replaced by a {kind}; submit that by itself"):
        task.become_canvas.delay(kind).get(**GET)


def test_a_job_that_raises_retry_by_hand_fails_and_says_what_to_do(own, task):
    own.start_worker("--concurrency=1")

    with pytest.raises(PermanentError, match=r"use raise self\.retry\(exc=\.\.\.\)"):
        task.retry_by_hand.delay().get(**GET)


def test_an_error_after_a_retry_was_asked_for_does_not_end_the_retry(own, task, tmp_path):
    own.start_worker("--concurrency=1")
    job = task.retry_and_fail.delay(str(tmp_path / "runs"))

    job.get(**GET)

    assert lines(tmp_path / "runs") == ["run", "run"]
    assert own.events(job) == ["created", "claimed", "started", "retry", "claimed", "started", "completed"]


def test_a_job_that_is_given_back_by_its_body_runs_again_without_a_death(own, task, tmp_path):
    own.start_worker("--concurrency=1")

    job = task.reject.delay(str(tmp_path / "runs"), requeue=True)

    assert job.get(**GET) == "done"
    assert own.events(job) == ["created", "claimed", "started", "released", "claimed", "started", "completed"]
    assert own.row(job)["deaths"] == 0


def test_a_job_that_is_rejected_by_its_body_fails_with_the_reason(own, task, tmp_path):
    own.start_worker("--concurrency=1")

    row = own.wait_for(task.reject.delay(str(tmp_path / "runs")), "failed")

    assert row["error_message"] == "rejected: not now"
    assert lines(tmp_path / "runs") == ["run"]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_body_that_would_end_its_process_fails_and_its_worker_lives(own, task, tmp_path, pool):
    worker = own.start_worker("-P", pool, "--concurrency=1")
    for how, raised in {"exit": "SystemExit(3)", "interrupt": "KeyboardInterrupt()", "cancel": "Cancelled"}.items():
        job = task.leave.delay(str(tmp_path / how), how)

        row = own.wait_for(job, "failed")

        assert (row["error_type"], row["deaths"]) == ("PermanentError", 0)
        assert f"leave raised {raised}" in row["error_message"]
        assert lines(tmp_path / how) == ["begin"]
    assert task.add.delay(1, 1).get(**GET) == 2
    assert worker.is_alive()


def test_a_shutdown_from_afar_lets_running_jobs_finish(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1")
    job = task.note.delay(str(tmp_path / "runs"), "job", 3.0)
    eventually(lambda: lines(tmp_path / "runs"), 15)

    own.app.control.shutdown()

    assert worker.wait(20) == 0
    assert own.events(job) == COMPLETED
    assert lines(tmp_path / "runs") == ["begin job", "end job"]


def test_a_paused_queue_is_served_by_its_workers_and_takes_jobs(own, task):
    own.start_worker("--concurrency=1", "-Q", "add")
    control.pause("add", "maintenance", app=own.app)
    job = task.add.delay(1, 1)
    eventually(lambda: "is paused" in own.workers[0].log(), 10)
    stays(lambda: own.events(job) == ["created"], 1)

    reasons = [chapter.text for chapter in control.explain(job.id, app=own.app) if chapter.event == "waits"]
    assert reasons == ["add is paused: maintenance"]
    assert own.app.live_workers()[0]["capabilities"] == ["add"]

    control.resume("add", app=own.app)
    assert job.get(**GET) == 2


def test_an_eager_run_with_an_error_that_passes_fails_at_once(own, task, tmp_path):
    result = task.recover.apply((str(tmp_path / "runs"),))

    assert result.state == "FAILURE"
    assert own.row(result)["status"] == "failed"


def test_an_eager_run_that_retries_itself_goes_on_at_once(own, task, tmp_path):
    result = task.count_down.apply((str(tmp_path / "runs"), 2))

    assert (result.state, lines(tmp_path / "runs")) == ("SUCCESS", ["2", "1", "0"])
    again = ["retry", "claimed", "started"]
    assert own.events(result.id) == ["created", "claimed", "started", *again, *again, "completed"]


@pytest.mark.parametrize("zone", [UTC, None])
def test_a_message_of_another_client_that_is_due_later_keeps_all_that_it_asks_for(own, zone):
    own.start_worker("--concurrency=1")
    due = datetime.now(UTC) + timedelta(seconds=4)
    eta = due.replace(tzinfo=zone).isoformat()
    expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    headers = {
        "lang": "py", "task": "add", "id": "from-elsewhere", "root_id": "from-elsewhere", "retries": 0, "eta": eta,
        "expires": expires, "timelimit": [30, 20], "group_index": 3,
    }  # fmt: skip
    body = json.dumps([[40, 2], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    with own.app.connection_for_write() as connection, connection.channel() as channel:
        connection.Producer(channel).publish(
            body, routing_key="add", declare=[Queue("add", durable=True)], headers=headers, priority=9,
            content_type="application/json", content_encoding="utf-8",
        )  # fmt: skip

    eventually(lambda: own.app.store.job("from-elsewhere"), 10)
    row = own.row("from-elsewhere")
    assert (row["status"], row["published_at"], row["priority"], row["group_index"]) == ("queued", None, 9, 3)
    assert (row["run_after_utc"], row["expires_at"].isoformat()) == (due, expires)
    assert row["message"]["options"]["time_limit"] == 30
    assert list(own.app.control.inspect(timeout=2).scheduled().values()) == [[]], "no worker holds it in its memory"
    own.wait_for("from-elsewhere", "completed")
    assert own.row("from-elsewhere")["started_at"] >= row["run_after_utc"]
