"""The guard: one claim decides whether a message runs; and what the base task gives a body."""

import pytest
from celery.app.task import Context
from celery.app.trace import build_tracer

from db.records import Heartbeat, NewJob, now
from tasks.errors import AttemptLost
from tasks.job import retry_delay_s

LIMITS = {"publication": 1, "worker_id": "w1", "is_redelivered": False, "holder_timeout_s": 15, "max_deaths": 3}


@pytest.fixture
def task(producer):
    return producer.task


def run(task, job_id, *args, **headers):
    """Run a task as a pool child does; its result, or the name of the state that it ended in."""
    tracer = build_tracer(task.name, task, app=task.app)
    request = {"id": job_id, "retries": 0, "delivery_info": {"routing_key": task.name}, **headers}
    outcome = tracer(job_id, list(args), {}, request=request)
    return outcome.retval if outcome.info is None else outcome.info.state


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


def test_a_job_that_a_living_worker_holds_is_left_to_it(producer, task):
    job = task.add.delay(40, 2)
    producer.app.store.heartbeat(beat_of("other"))
    producer.app.store.claim(new_job(job.id), **LIMITS | {"worker_id": "other"})

    assert run(task.add, job.id, 40, 2, publication=1) == "IGNORED"
    assert producer.row(job)["claimed_by"] == "other"


def test_a_redelivered_job_is_taken_over(producer, task):
    job = task.add.delay(40, 2)
    producer.app.store.heartbeat(beat_of("other"))
    producer.app.store.claim(new_job(job.id), **LIMITS | {"worker_id": "other"})

    info = {"routing_key": "add", "redelivered": True}
    assert run(task.add, job.id, 40, 2, publication=1, delivery_info=info) == 42
    assert producer.events(job) == ["created", "claimed", "started", "lost", "claimed", "started", "completed"]


def test_a_message_without_a_row_gets_one(producer, task):
    assert run(task.add, "from-elsewhere", 40, 2) == 42
    assert producer.row("from-elsewhere")["parameters"] == {"x": 40, "y": 2}


def test_an_attempt_that_lost_its_job_neither_completes_nor_fails_it(producer, task):
    job = task.add.delay(1, 1)
    store, backend = producer.app.store, producer.app.backend
    late = Context(id=job.id, task="add", attempt=store.claim(new_job(job.id), **LIMITS).attempt)
    store.claim(new_job(job.id), **LIMITS | {"worker_id": "other", "is_redelivered": True})

    backend.mark_as_done(job.id, "too late", late)
    backend.mark_as_failure(job.id, ValueError("too late"), request=late)

    row = producer.row(job)
    assert (row["status"], row["claimed_by"], row["result_data"], row["error_type"]) == ("running", "other", None, None)


def test_confirm_raises_once_the_attempt_has_lost_its_job(producer, task):
    job = task.add.delay(1, 1)
    attempt = producer.app.store.claim(new_job(job.id), **LIMITS).attempt
    task.add.push_request(id=job.id, attempt=attempt, called_directly=False)
    try:
        task.add.confirm()
        producer.app.store.claim(new_job(job.id), **LIMITS | {"is_redelivered": True})
        with pytest.raises(AttemptLost):
            task.add.confirm()
    finally:
        task.add.pop_request()


def test_a_direct_call_is_a_plain_function_call(producer, task):
    assert task.add(40, 2) == 42
    assert producer.app.store.jobs() == []


def test_a_token_names_the_job_and_the_attempt_and_fits_into_a_file_name(task):
    task.add.push_request(id="../a b/c", attempt=3)
    try:
        assert task.add.token == ".._a_b_c.3"
    finally:
        task.add.pop_request()
    assert task.add.token is None


def test_retries_wait_longer_and_longer_and_never_at_once():
    for retries in range(20):
        full = min(2.0 * 2**retries, 600)
        delays = [retry_delay_s(retries) for _ in range(50)]
        assert 0.75 * full <= min(delays) <= max(delays) <= 1.25 * full
        assert len(set(delays)) > 1


def new_job(job_id):
    return NewJob(job_id=job_id, task_type="add", queue="add", parameters={})


def beat_of(worker_id):
    return Heartbeat(
        worker_id=worker_id, hostname="h", pid=1, capabilities=["add"], concurrency=1, status="idle", started_at=now()
    )
