"""The guard: one claim decides whether a message runs."""

import time

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from db.records import Failure, Status, now
from tasks.leftovers import token_of
from tests.unit.jobs import change, claimed_by, messages, run, silent_for

FAILURE = Failure(error_type="E", error_message="m")


def test_a_job_runs_once_and_its_message_has_no_effect_afterwards(producer, task):
    job = task.add.delay(40, 2)

    assert run(task.add, job.id, 40, 2, publication=1) == 42
    assert run(task.add, job.id, 40, 2, publication=1) == "IGNORED"
    assert producer.events(job) == ["created", "claimed", "started", "completed"]


@pytest.mark.parametrize("publication", [2, 7])
def test_a_message_of_another_publication_has_no_effect(producer, task, publication):
    job = task.add.delay(40, 2)

    assert run(task.add, job.id, 40, 2, publication=publication) == "IGNORED"
    assert producer.events(job) == ["created"]


@pytest.mark.parametrize("silent_s", [0, 14])
def test_a_job_that_a_living_worker_holds_is_left_to_it(producer, task, silent_s):
    job = task.add.delay(40, 2)
    claimed_by(producer.app, job, "other", host_id="elsewhere")
    silent_for(producer.app, silent_s, "other")

    assert run(task.add, job.id, 40, 2, publication=1) == "IGNORED"
    assert producer.row(job)["claimed_by"] == "other"


def test_a_job_of_a_dead_worker_is_taken_over_and_the_death_is_counted(producer, task):
    job = task.add.delay(40, 2)
    claimed_by(producer.app, job, "dead")

    assert run(task.add, job.id, 40, 2, publication=1) == 42
    assert producer.events(job) == ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
    assert (producer.row(job)["deaths"], producer.row(job)["attempt"]) == (1, 3)


@pytest.mark.parametrize("waited_s", [0, 5])
def test_a_guard_that_waited_for_the_database_takes_over_from_nobody_who_had_to_wait_as_well(
    producer, task, clock, monkeypatch, waited_s
):
    app = producer.app
    job = task.add.delay(40, 2)
    claimed_by(app, job, "other", host_id="elsewhere")
    silent_for(app, 60, "other")
    app.leases.interrupted()
    clock.pass_s(60)
    claim = app.store.claim

    def claim_later(*args, **options):
        clock.pass_s(waited_s)
        return claim(*args, **options)

    monkeypatch.setattr(app.store, "claim", claim_later)

    assert run(task.add, job.id, 40, 2, publication=1) == ("IGNORED" if waited_s else 42)
    assert producer.row(job)["deaths"] == (0 if waited_s else 1)


def test_a_redelivered_job_is_taken_over_from_another_host_that_does_not_renew(producer, task, clock, monkeypatch):
    job = task.add.delay(40, 2)
    claimed_by(producer.app, job, "other", host_id="elsewhere")

    def stay_silent(_s):
        clock.pass_s(7)
        silent_for(producer.app, 7, "other")

    monkeypatch.setattr(clock, "sleep", stay_silent, raising=False)

    info = {"routing_key": "add", "redelivered": True}
    assert run(task.add, job.id, 40, 2, publication=1, delivery_info=info) == 42
    assert producer.events(job) == ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
    assert producer.row(job)["deaths"] == 1


def test_a_redelivered_job_stays_with_another_host_that_renews(producer, task, clock, monkeypatch):
    """It has lost its connection to the broker, and goes on."""
    job = task.add.delay(40, 2)
    claimed_by(producer.app, job, "other", host_id="elsewhere")
    renew = producer.app.store.renew_lease
    monkeypatch.setattr(clock, "sleep", lambda _s: renew("lease of other", "other", "elsewhere"), raising=False)

    info = {"routing_key": "add", "redelivered": True}
    assert run(task.add, job.id, 40, 2, publication=1, delivery_info=info) == "IGNORED"
    assert producer.events(job) == ["created", "claimed", "started"]


def test_what_a_lost_attempt_left_is_gone_when_the_next_begins(producer, task, tmp_path):
    job = task.list_beside.delay(tmp_path / "out")
    attempt = claimed_by(producer.app, job)
    kept = [".media-tasks-of-another-job.1-abc.part", f".media-tasks-{token_of(job.id, attempt + 3)}-abc.part"]
    for name in (f".media-tasks-{token_of(job.id, attempt)}-abc.part", *kept):
        (tmp_path / name).touch()

    info = {"routing_key": "list_beside", "redelivered": True}
    left = run(task.list_beside, job.id, str(tmp_path / "out"), publication=1, delivery_info=info)

    assert left == sorted(kept), "a later attempt may have taken over meanwhile"


def test_a_job_whose_workers_died_too_often_fails_instead_of_running(producer, task):
    job = task.add.delay(40, 2)
    claimed_by(producer.app, job, "dead")
    change(producer.app, job, deaths=2)

    assert run(task.add, job.id, 40, 2, publication=1) == "FAILURE"
    row = producer.row(job)
    assert (row["status"], row["error_type"], row["deaths"]) == ("failed", "WorkerLost", 3)
    assert "MAX_DEATHS=3" in row["error_message"]


def test_a_job_of_a_paused_queue_goes_to_rest(producer, task):
    job = task.add.delay(40, 2)
    producer.app.store.pause("add")

    assert run(task.add, job.id, 40, 2, publication=1) == "IGNORED"
    row = producer.row(job)
    assert (row["status"], row["published_at"], row["publication"]) == ("queued", None, 2)


def test_a_message_without_a_row_gets_one(producer, task):
    assert run(task.add, "from-elsewhere", 40, 2) == 42
    assert producer.row("from-elsewhere")["parameters"] == {"x": 40, "y": 2}


@pytest.mark.parametrize(("age_days", "result"), [(29, 42), (31, "IGNORED")])
def test_a_message_that_has_outlived_its_row_does_not_bring_its_job_back(producer, task, age_days, result):
    """A cancelled job of a queue that nobody served, say: its message lies there until somebody does."""
    job = task.add.delay(40, 2)
    (message,) = messages(producer, "add")
    assert time.time() - message.headers["published_at"] < 60
    producer.app.store.end(job.id, Status.CANCELLED, FAILURE)
    producer.app.store.prune(now())

    published_at = time.time() - age_days * 86400
    assert run(task.add, job.id, 40, 2, publication=1, published_at=published_at) == result
    assert (producer.app.store.job(job.id) is None) is (result == "IGNORED")


def test_a_job_whose_time_goes_by_between_claim_and_body_is_given_back_without_a_death(producer, add, monkeypatch):
    job = add.delay(1, 1)
    claimed_by(producer.app, job, "dead")

    def clean_up_for_long(*args, **kwargs):
        raise SoftTimeLimitExceeded(1)

    monkeypatch.setattr("tasks.guard.remove_temp_files", clean_up_for_long)

    assert run(add, job.id, 1, 1, publication=1) == "IGNORED"
    row = producer.row(job)
    assert (row["status"], row["deaths"], producer.events(job)[-1]) == ("queued", 1, "released")
