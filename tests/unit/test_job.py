"""What the base task gives a body, and what becomes of its errors."""

import re
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import Thread

import pytest
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded

from db.errors import DatabaseUnavailable
from db.records import Failure, Liveness, Status
from tasks import guard, remedy
from tasks.errors import AttemptLost
from tasks.outgoing import Dispatcher
from tests.unit.jobs import change, claim, messages, new_job, publications, run

FAILURE = Failure(error_type="E", error_message="m")


def test_a_transient_error_lets_the_job_rest_until_its_retry(producer, task, tmp_path):
    job = task.recover.delay(str(tmp_path / "runs"))
    messages(producer, "recover")

    assert run(task.recover, job.id, str(tmp_path / "runs"), publication=1) == "RETRY"
    row = producer.row(job)
    assert (row["status"], row["published_at"], row["publication"], row["retry_count"]) == ("queued", None, 2, 1)
    assert 1 < (row["run_after_utc"] - row["updated_at"]).total_seconds() < 3
    assert messages(producer, "recover") == []


def test_a_transient_error_that_cannot_be_printed_lets_the_job_rest_until_its_retry(producer, add, monkeypatch):
    class Mute(ConnectionError):
        def __str__(self):
            raise RuntimeError("no text")

    def body(x, y):
        raise Mute

    monkeypatch.setattr(add, "run", body)
    job = add.delay(1, 1)

    assert run(add, job.id, 1, 1, publication=1) == "RETRY"
    assert (producer.row(job)["status"], producer.row(job)["error_type"]) == ("queued", "Mute")


def test_a_transient_error_of_the_last_attempt_fails_the_job_with_it(producer, task, tmp_path):
    job = task.recover.delay(str(tmp_path / "runs"))

    assert run(task.recover, job.id, str(tmp_path / "runs"), publication=1, retries=2) == "FAILURE"
    row = producer.row(job)
    assert (row["status"], row["error_type"], row["error_message"]) == (
        "failed",
        "TransientError",
        "the network is away, run 1",
    )


@pytest.mark.parametrize("name", ["be_limited", "be_limited_by_http"])
@pytest.mark.parametrize("said_s", [90, 3600, 86_400])
def test_a_job_rests_for_as_long_as_a_server_wants_to_be_left_alone(producer, task, name, said_s):
    limited = getattr(task, name)
    job = limited.delay(said_s)
    messages(producer, name)

    assert run(limited, job.id, said_s, publication=1) == "RETRY"
    row = producer.row(job)
    assert (row["status"], row["published_at"], row["retry_count"]) == ("queued", None, 1)
    assert (row["run_after_utc"] - row["updated_at"]).total_seconds() == pytest.approx(said_s, abs=1)
    assert producer.app.store.take_due(10) == []


class AnHourAhead(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(hours=1)


def test_countdowns_and_retries_are_no_times_by_the_clock_of_the_host_that_asks_for_them(producer, task, monkeypatch):
    monkeypatch.setattr("tasks.options.datetime", AnHourAhead)
    counted = task.add.apply_async((1, 1), countdown=60)
    limited = task.be_limited.delay(60)
    run(task.be_limited, limited.id, 60, publication=1)

    for job in (counted, limited):
        row = producer.row(job)
        assert (row["run_after_utc"] - row["updated_at"]).total_seconds() == pytest.approx(60, abs=1)


def test_a_job_whose_server_says_never_fails_and_says_why_it_is_not_tried_again(producer, task, caplog):
    job = task.be_limited.delay(86_401)

    assert run(task.be_limited, job.id, 86_401, publication=1) == "FAILURE"
    row = producer.row(job)
    assert (row["status"], row["retry_count"], row["error_type"]) == ("failed", 0, "RateLimited")
    assert "the server asks for 86401 s, and no retry waits for more than 86400 s" in caplog.text


def test_a_retry_that_rests_for_an_hour_is_left_alone_until_then_and_sent(producer, task, reconciler, clock):
    job = task.be_limited.delay(3600)
    messages(producer, "be_limited")
    run(task.be_limited, job.id, 3600, publication=1)
    dispatcher = Dispatcher(producer.app)

    for _ in range(6):  # longer than the reconciler waits for a message that it misses
        reconciler.round()
        clock.pass_s(60)
    assert dispatcher.publish_due(10) == 0
    assert messages(producer, "be_limited") == []

    change(producer.app, job, run_after_utc=producer.row(job)["run_after_utc"] - timedelta(seconds=3600))
    assert dispatcher.publish_due(10) == 1
    dispatcher.close()
    assert publications(producer, "be_limited") == [(job.id, 2)]
    assert producer.events(job) == ["created", "claimed", "started", "retry"]


def test_a_permanent_error_fails_the_job_at_once(producer, task):
    job = task.fail.delay()

    assert run(task.fail, job.id, publication=1) == "FAILURE"
    row = producer.row(job)
    assert (row["status"], row["retry_count"], row["error_type"]) == ("failed", 0, "ValueError")


def test_an_attempt_that_lost_its_job_neither_completes_nor_fails_it(producer, task):
    job = task.add.delay(1, 1)
    store, backend = producer.app.store, producer.app.backend
    late = Context(id=job.id, task="add", attempt=claim(store, new_job(job.id)).attempt)
    claim(store, new_job(job.id), "other", liveness=Liveness.DEAD)

    backend.mark_as_done(job.id, "too late", late)
    backend.mark_as_failure(job.id, ValueError("too late"), request=late)

    row = producer.row(job)
    assert (row["status"], row["claimed_by"], row["result_data"], row["error_type"]) == ("running", "other", None, None)


def test_confirm_raises_once_the_attempt_has_lost_its_job(producer, task):
    job = task.add.delay(1, 1)
    attempt = claim(producer.app.store, new_job(job.id)).attempt
    task.add.push_request(id=job.id, attempt=attempt, called_directly=False)
    try:
        task.add.confirm()
        claim(producer.app.store, new_job(job.id), "other", liveness=Liveness.DEAD)
        with pytest.raises(AttemptLost):
            task.add.confirm()
    finally:
        task.add.pop_request()


@pytest.fixture
def wait_for_the_database(app, clock, monkeypatch):
    monkeypatch.setattr("tasks.celery.time", clock)
    return lambda: app.patiently(lambda: clock.pass_s(2))


@pytest.fixture
def out_of_time(producer, add, monkeypatch):
    """`out_of_time(work)`: how `add` ends, if its body does this and is then struck by its soft time limit."""

    def ended(work):
        def body(x, y):
            work()
            raise SoftTimeLimitExceeded(1)

        monkeypatch.setattr(add, "run", body)
        job = add.delay(1, 1)
        outcome = run(add, job.id, 1, 1, publication=1)
        return outcome, producer.row(job)["status"], producer.events(job)[-1]

    return ended


def test_a_job_whose_time_went_by_in_waiting_for_the_database_is_given_back(out_of_time, wait_for_the_database):
    assert out_of_time(wait_for_the_database) == ("IGNORED", "queued", "released")


def test_a_job_whose_time_went_by_before_its_claim_is_given_back(add, clock, out_of_time, monkeypatch):
    ask = guard._asked

    def ask_for_long(*args):
        clock.pass_s(2)
        return ask(*args)

    monkeypatch.setattr(guard, "_asked", ask_for_long)

    assert out_of_time(lambda: None) == ("IGNORED", "queued", "released")


def test_an_outage_at_each_attempt_excuses_no_third_one_in_a_row(producer, add, monkeypatch, wait_for_the_database):
    def hang(x, y):
        wait_for_the_database()
        raise SoftTimeLimitExceeded(1)

    monkeypatch.setattr(add, "run", hang)
    job = add.delay(1, 1)

    def ended():
        outcome = run(add, job.id, 1, 1, publication=producer.row(job)["publication"])
        return outcome, producer.events(job)[-1]

    given_back, failed = ("IGNORED", "released"), ("FAILURE", "failed")
    assert [ended() for _ in range(3)] == [given_back, given_back, failed]
    assert producer.row(job)["error_type"] == "JobTimeout"
    producer.app.store.replay(job.id)
    assert [ended() for _ in range(3)] == [given_back, given_back, failed], "a replay begins anew"


@pytest.mark.parametrize("follows", ["chain", "callbacks"])
def test_what_follows_a_result_that_is_no_json_is_never_sent(producer, add, monkeypatch, follows):
    monkeypatch.setattr(add, "run", lambda x, y: {x, y})
    job, step = add.delay(1, 1), add.si(1, 1)
    step.freeze("next")

    assert run(add, job.id, 1, 1, publication=1, **{follows: [dict(step)]}) == "FAILURE"

    assert publications(producer, "add") == [(job.id, 1)]
    assert producer.row(job)["error_type"] == "EncodeError"


@pytest.mark.parametrize(
    ("error", "write", "end"),
    [
        (None, "complete", ("completed", None)),
        (ValueError("broken"), "end", ("failed", "ValueError")),
        (ConnectionError("gone"), "requeue", ("queued", "ConnectionError")),
    ],
)
def test_a_soft_time_limit_that_strikes_while_an_end_is_written_comes_after_the_work(
    producer, add, monkeypatch, error, write, end
):
    store, tries = producer.app.store, []
    write_it = getattr(store, write)

    def body(x, y):
        if error is not None:
            raise error

    def write_late(*args, **kwargs):
        tries.append(args)
        if len(tries) == 1:
            raise SoftTimeLimitExceeded(1)
        return write_it(*args, **kwargs)

    monkeypatch.setattr(add, "run", body)
    monkeypatch.setattr(store, write, write_late)
    job = add.delay(1, 1)
    run(add, job.id, 1, 1, publication=1)

    row = producer.row(job)
    assert (row["status"], row["error_type"], row["deaths"]) == (*end, 0)


@pytest.mark.parametrize("follows", ["chain", "callbacks"])
def test_a_soft_time_limit_that_strikes_while_the_next_step_waits_for_the_database_comes_after_the_work(
    producer, add, monkeypatch, follows
):
    store, tries = producer.app.store, []
    enqueue = store.enqueue

    def enqueue_late(*args, **kwargs):
        tries.append(args)
        if len(tries) == 1:
            raise SoftTimeLimitExceeded(1)
        return enqueue(*args, **kwargs)

    job, step = add.delay(1, 1), add.s(1)
    step.freeze("next")
    monkeypatch.setattr(store, "enqueue", enqueue_late)

    assert run(add, job.id, 1, 1, publication=1, **{follows: [dict(step)]}) == 2

    assert (producer.row(job)["status"], producer.row("next")["status"]) == ("completed", "queued")


@pytest.mark.parametrize("follows", ["chain", "callbacks"])
def test_a_soft_time_limit_that_strikes_as_the_next_step_is_committed_does_not_keep_it_from_being_sent(
    producer, add, monkeypatch, follows
):
    store, job, step = producer.app.store, add.delay(1, 1), add.s(1)
    step.freeze("next")
    enqueue, change = store.enqueue, store._changing

    @contextmanager
    def striking():
        with change() as connection:
            yield connection
        monkeypatch.setattr(store, "_changing", change)
        raise SoftTimeLimitExceeded(1)

    def enqueue_late(*args, **kwargs):
        monkeypatch.setattr(store, "enqueue", enqueue)
        monkeypatch.setattr(store, "_changing", striking)
        return enqueue(*args, **kwargs)

    monkeypatch.setattr(store, "enqueue", enqueue_late)

    assert run(add, job.id, 1, 1, publication=1, **{follows: [dict(step)]}) == 2

    assert publications(producer, "add") == [(job.id, 1), ("next", 1)]


def test_a_job_whose_time_went_by_in_its_own_work_fails(out_of_time):
    assert out_of_time(lambda: None) == ("FAILURE", "failed", "failed")


def test_an_outage_excuses_no_job_that_did_not_wait_for_it(out_of_time, wait_for_the_database):
    def let_another_wait():
        other = Thread(target=wait_for_the_database)
        other.start()
        other.join()

    assert out_of_time(let_another_wait) == ("FAILURE", "failed", "failed")


def test_a_job_that_runs_another_in_its_own_process_still_knows_that_it_waited(
    task, out_of_time, wait_for_the_database
):
    def wait_and_run_another():
        wait_for_the_database()
        task.total.apply(([1, 2],))

    assert out_of_time(wait_and_run_another) == ("IGNORED", "queued", "released")


@pytest.fixture
def add_running(producer, add, clock):
    """The task `add` inside of a running attempt, one second after its claim."""
    job = add.delay(1, 1)
    attempt = claim(producer.app.store, new_job(job.id)).attempt
    add.push_request(id=job.id, attempt=attempt, claimed_at=clock.monotonic(), called_directly=False)
    clock.pass_s(1)
    yield add
    add.pop_request()


SAY = {
    "progress": lambda task, percent: task.progress(percent, "encode"),
    "update_state": lambda task, percent: task.update_state(
        state="PROGRESS", meta={"progress": percent, "stage": "encode"}
    ),
}


@pytest.fixture(params=SAY)
def say(request):
    """The two ways in which a body says how far it is."""
    return SAY[request.param]


def progress_of(producer, task):
    row = producer.row(task.request.id)
    return row["progress"], row["stage"]


def test_progress_is_written_at_most_twice_a_second(producer, add_running, clock, say):
    say(add_running, 40)
    say(add_running, 50)
    assert progress_of(producer, add_running) == (40, "encode")

    clock.pass_s(0.4)
    say(add_running, 60)
    assert progress_of(producer, add_running) == (40, "encode")

    clock.pass_s(0.2)
    say(add_running, 70)
    assert progress_of(producer, add_running) == (70, "encode")


def test_progress_that_the_database_can_t_take_is_left_out(producer, add_running, clock, say, monkeypatch):
    def away(*_, **__):
        raise DatabaseUnavailable("it is away")

    with monkeypatch.context() as outage:
        outage.setattr(producer.app.store, "progress", away)
        say(add_running, 40)

    clock.pass_s(1)
    say(add_running, 50)
    assert progress_of(producer, add_running) == (50, "encode")


def test_an_attempt_that_lost_its_job_stops_where_it_says_how_far_it_is(producer, add_running, say):
    producer.app.store.end(add_running.request.id, Status.CANCELLED, FAILURE)

    with pytest.raises(AttemptLost):
        say(add_running, 40)


@pytest.mark.parametrize(
    ("said", "shown"),
    [(40, 40), ("40", 40), (250, 100), (-1, 0), (float("nan"), 0), ("half", 0), (None, 0)],
)
def test_progress_that_a_body_says_by_update_state_is_a_percentage(producer, add_running, said, shown):
    add_running.update_state(state="PROGRESS", meta={"progress": said})

    assert progress_of(producer, add_running) == (shown, None)


@pytest.mark.parametrize(("said", "shown"), [(-1, 0), (100, 0), (250, 0), (float("nan"), 0), (40, 40)])
def test_a_body_s_progress_is_below_100_until_its_completion(producer, add_running, said, shown):
    add_running.progress(said)

    assert progress_of(producer, add_running)[0] == shown


def test_a_stage_may_be_anything_that_can_be_written(producer, add_running):
    add_running.update_state(state="PROGRESS", meta={"progress": 40, "stage": 2})

    assert progress_of(producer, add_running) == (40, "2")


def test_the_first_state_is_written_at_once_since_it_may_be_the_only_one(producer, add_running):
    add_running.request.claimed_at = time.monotonic() + 1  # now, by the test's clock
    add_running.progress(10)
    assert progress_of(producer, add_running)[0] == 0

    add_running.update_state(state="PROGRESS", meta={"progress": 40})

    assert progress_of(producer, add_running)[0] == 40


def test_the_progress_of_another_job_is_not_ours_to_write(producer, add_running):
    other = add_running.delay(2, 2)
    claim(producer.app.store, new_job(other.id))

    add_running.update_state(other.id, state="PROGRESS", meta={"progress": 40})

    assert producer.row(other)["progress"] == 0
    assert progress_of(producer, add_running)[0] == 0


def test_a_body_s_own_state_that_is_no_progress_changes_nothing(producer, add_running):
    add_running.update_state(state="HALFWAY", meta={"any": "thing"})

    assert producer.row(add_running.request.id)["status"] == "running"


def test_progress_of_a_direct_call_goes_nowhere(producer, add, say):
    say(add, 40)

    assert producer.app.store.jobs() == []


def test_a_direct_call_is_a_plain_function_call(producer, task):
    assert task.add(40, 2) == 42
    assert producer.app.store.jobs() == []


def test_a_token_names_the_job_and_the_attempt_and_fits_into_a_file_name(task):
    def token(job_id, attempt):
        task.add.push_request(id=job_id, attempt=attempt)
        try:
            return task.add.token
        finally:
            task.add.pop_request()

    ids = ["a/b", "a:b", "a.3", "a", "x" * 255, "\udcff"]
    tokens = {token(job_id, attempt) for job_id in ids for attempt in (3, 33)}
    assert len(tokens) == 2 * len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{24}\.33?", each) for each in tokens)
    assert task.add.token is None


def test_retries_wait_longer_and_longer_and_never_at_once():
    for retries in range(20):
        full = min(2.0 * 2**retries, 600)
        delays = [remedy.delay_s(ConnectionError(), retries) for _ in range(50)]
        assert 0.75 * full <= min(delays) <= max(delays) <= 1.25 * full
        assert len(set(delays)) > 1
