"""The rounds of the upkeep, called one by one."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
from kombu.exceptions import OperationalError

from db.errors import DatabaseUnavailable
from db.records import Event, Failure, Liveness, Status, now
from tasks import request
from tasks.duty import Duty
from tasks.errors import JobTimeout
from tasks.leftovers import token_of
from tasks.upkeep import ROUND_S, Housework, Upkeep
from tests.tooling.waiting import eventually
from tests.unit.jobs import ELSEWHERE, change, claim, claimed_by, messages, new_job, silent_for


@pytest.fixture
def upkeep(app, clock):
    """That of a worker which holds a lease, runs nothing, and has been there for a while."""
    app.leases.take()
    clock.pass_s(60)
    return Upkeep(SimpleNamespace(app=app))


def reconcile(upkeep):
    """A round in which the reconciler's turn has come."""
    upkeep._reconcile_due = 0.0
    upkeep._housework["reconciler"].round()


def dispatch(upkeep):
    upkeep._housework["dispatcher"].round()


def holders(app):
    return {app.store.duty_holder(name) for name in ("dispatcher", "reconciler")}


def test_who_stops_leaves_its_duties_and_its_lease(app, upkeep):
    upkeep.start(None)
    eventually(lambda: holders(app) == {app.lease}, 10)

    upkeep.stop(None)

    assert holders(app) == {None}
    assert app.store.holders() == []
    assert [worker["status"] for worker in app.store.workers()] == ["stopped"]


def test_a_worker_that_loses_its_broker_in_mid_round_renews_its_lease_in_the_next(app, upkeep, monkeypatch):
    renewals = []
    monkeypatch.setattr(app.leases, "renew", lambda: renewals.append(1))
    monkeypatch.setattr(upkeep, "_close_unclaimed", upkeep.renew_soon)  # which comes after the heartbeat

    upkeep.round()
    upkeep.round()

    assert len(renewals) == 2


def test_a_worker_that_begins_to_drain_in_mid_round_is_shown_so_by_the_next(app, upkeep, monkeypatch):
    monkeypatch.setattr(upkeep, "_close_unclaimed", upkeep.drain)  # which comes after the heartbeat

    upkeep.round()
    upkeep.round()

    assert [worker["status"] for worker in app.store.workers()] == ["draining"]


@pytest.mark.parametrize("step_s", [60, -60])
def test_after_the_machine_slept_or_its_clock_was_set_silence_counts_anew(
    producer, upkeep, add, clock, monkeypatch, step_s
):
    timeout_s = producer.app.settings.lease_timeout_s
    job = add.delay(1, 1)
    claimed_by(producer.app, job, "asleep", host_id=ELSEWHERE)
    reconcile(upkeep)
    silent_for(producer.app, 60, "asleep")

    monkeypatch.setattr("tasks.upkeep.now", lambda: now() + timedelta(seconds=step_s))
    upkeep._notice_lost_time()
    reconcile(upkeep)
    clock.pass_s(timeout_s - 5)
    reconcile(upkeep)
    assert producer.row(job)["status"] == "running"

    clock.pass_s(5)
    reconcile(upkeep)
    assert producer.row(job)["status"] == "queued"


def test_a_worker_that_does_not_reach_the_broker_leaves_what_is_due_and_its_duty_to_others(
    producer, app, upkeep, add, monkeypatch
):
    job = add.apply_async((1, 1), countdown=60)
    dispatch(upkeep)
    assert app.store.duty_holder("dispatcher") == app.lease
    change(app, job, run_after_utc=now())
    monkeypatch.setattr(app, "connection_for_write", Unreachable)

    dispatch(upkeep)

    assert app.store.duty_holder("dispatcher") is None
    assert (producer.row(job)["status"], producer.row(job)["published_at"]) == ("queued", None)


def test_who_is_stuck_while_the_database_is_away_leaves_the_duty_when_it_is_back(app, clock, upkeep, monkeypatch):
    duty = Duty(app, "reconciler")

    def away():
        raise DatabaseUnavailable("away")

    def be_stuck():
        clock.pass_s(16)
        with monkeypatch.context() as patch:
            patch.setattr(duty, "leave", away)
            with pytest.raises(DatabaseUnavailable):
                work.duty.leave_if_stuck(15.0)
        work.duty.leave_if_stuck(15.0)
        assert app.store.duty_holder("reconciler") is None
        return ROUND_S

    work = Housework(duty, be_stuck)

    assert work.round() == ROUND_S


def test_who_is_stuck_in_its_housework_loses_the_duty_and_goes_on_without_it(app, upkeep, clock, caplog):
    done = []

    def be_stuck():
        assert app.store.duty_holder("reconciler") == app.lease
        work.duty.leave_if_stuck(15.0)
        assert app.store.duty_holder("reconciler") == app.lease, "not for so long yet"
        clock.pass_s(16)
        for _ in range(2):  # by the upkeep's thread
            work.duty.leave_if_stuck(15.0)
        assert app.store.take_duty("reconciler", "lease of another", after=None)
        done.append(1)
        return ROUND_S

    work = Housework(Duty(app, "reconciler"), be_stuck)

    work.round()

    assert "the reconciler has been stuck for 15 s" in caplog.text
    assert caplog.text.count("stuck") == 1
    assert done == [1]


def test_the_reconciler_comes_every_lease_renewal_and_not_every_round(app, upkeep, clock, monkeypatch):
    looks = []
    monkeypatch.setattr(upkeep._reconciler, "round", looks.append)

    for _ in range(10):
        assert upkeep.reconcile() == ROUND_S
        clock.pass_s(ROUND_S)

    assert app.settings.lease_renew_s == 5
    assert len(looks) == 2


def test_who_waits_for_the_next_round_is_not_stuck(app, upkeep, clock, caplog):
    work = Housework(Duty(app, "reconciler"), lambda: ROUND_S)
    work.round()

    clock.pass_s(ROUND_S)
    work.duty.leave_if_stuck(1.0)  # LEASE_TIMEOUT_S may be as short

    assert "stuck" not in caplog.text
    assert app.store.duty_holder("reconciler") == app.lease


def test_what_the_reconciler_has_mended_wakes_the_dispatcher(app, add, upkeep):
    job = add.delay(1, 1)
    reconcile(upkeep)
    assert not upkeep._wakes["dispatcher"].is_set()
    claimed_by(app, job, "dead")

    reconcile(upkeep)

    assert upkeep._wakes["dispatcher"].is_set()


def test_who_mends_much_is_not_stuck_while_it_goes_on(app, add, upkeep, clock, monkeypatch):
    jobs = [add.delay(number, number) for number in range(3)]
    for job in jobs:
        claimed_by(app, job, f"dead-{job.id}")
    close = app.store.close

    def close_slowly(*args, **options):
        clock.pass_s(10)
        upkeep._housework["reconciler"].duty.leave_if_stuck(15.0)
        return close(*args, **options)

    monkeypatch.setattr(app.store, "close", close_slowly)

    reconcile(upkeep)

    assert app.store.duty_holder("reconciler") == app.lease
    assert [app.store.job(job.id)["status"] for job in jobs] == ["queued"] * 3


class Unreachable:
    """A connection to a broker that is away."""

    connection_errors = (ConnectionError,)

    def ensure_connection(self, **_):
        raise OperationalError("refused")

    def release(self):
        pass


# Attempts that nothing runs


def claimed_here(app, job):
    row = app.store.job(job.id)
    values = {"publication": row["publication"], "worker_id": app.worker_id, "lease": app.lease}
    return app.store.claim(job.id, unknown=lambda: new_job(job.id), judge=None, max_deaths=3, **values).attempt


def half_written(folder, job, attempt):
    path = folder / f".media-tasks-{token_of(job.id, attempt)}-abc.part"
    path.touch()
    return path


def resize(producer, folder):
    return producer.task.image_resize.delay(folder / "in.jpg", folder / "out.webp", width=9)


def test_an_attempt_that_nothing_runs_is_closed_at_the_second_look_without_its_temp_files(
    producer, app, upkeep, tmp_path
):
    job = resize(producer, tmp_path)
    part = half_written(tmp_path, job, claimed_here(app, job))

    upkeep._close_unclaimed()
    assert (producer.row(job)["status"], part.exists()) == ("running", True)

    upkeep._close_unclaimed()
    row = producer.row(job)
    assert (row["status"], row["deaths"], part.exists()) == ("queued", 1, False)
    assert producer.events(job)[-1] == "lost"


@pytest.mark.parametrize("has", ["running", "reserved"])
def test_an_attempt_that_this_worker_has_is_left_alone(producer, app, upkeep, add, monkeypatch, has):
    job = add.delay(1, 1)
    claimed_here(app, job)
    monkeypatch.setattr(request, has, lambda: [SimpleNamespace(id=job.id) if has == "running" else job.id])

    upkeep._close_unclaimed()
    upkeep._close_unclaimed()

    assert (producer.row(job)["status"], producer.row(job)["deaths"]) == ("running", 0)


def test_an_attempt_that_nothing_runs_fails_when_it_was_one_death_too_many(producer, app, upkeep, tmp_path):
    job = resize(producer, tmp_path)
    claimed_here(app, job)
    change(app, job, deaths=2)

    upkeep._close_unclaimed()
    upkeep._close_unclaimed()

    row = producer.row(job)
    assert (row["status"], row["error_type"], row["deaths"]) == ("failed", "WorkerLost", 3)


def test_an_attempt_whose_time_went_by_in_an_outage_is_released_but_no_third_one_in_a_row(
    producer, app, upkeep, add, monkeypatch
):
    job = add.delay(1, 1)
    change(app, job, deaths=2)
    ends = []
    for _ in range(3):
        claimed_here(app, job)
        monkeypatch.setitem(request.out_of_time, job.id, JobTimeout("add ran longer than its hard time limit"))
        upkeep._close_unclaimed()
        upkeep._close_unclaimed()
        row = producer.row(job)
        ends.append((producer.events(job)[-1], row["status"], row["deaths"], request.out_of_time))

    assert ends == [("released", "queued", 2, {})] * 2 + [("failed", "failed", 2, {})]
    assert row["error_type"] == "JobTimeout"


# What a worker that stops waits for, while the word of its pool does not arrive


@pytest.fixture
def running(producer, app, upkeep, add, monkeypatch):
    """A job that this worker's pool has accepted, of a worker that was asked to stop."""
    stopping = threading.Event()
    stopping.set()
    monkeypatch.setattr(request, "stopping", stopping)
    upkeep._worker.pool, upkeep._worker.consumer = None, SimpleNamespace(call_soon=lambda *_: None)
    job = add.delay(1, 1)
    (message,) = messages(producer, "add")
    options = {"on_ack": lambda *_: None, "hostname": "h", "eventer": None, "body": message.body, "decoded": False}
    accepted = request.JobRequest(message, app=app, task=add, headers=message.headers, **options)
    monkeypatch.setattr(request.state, "active_requests", {accepted})
    return job


def is_waited_for(upkeep):
    upkeep.round()
    return bool(request.unfinished())


def test_it_waits_for_a_job_that_its_guard_has_not_claimed_yet_and_for_one_that_runs(app, upkeep, running):
    assert is_waited_for(upkeep)

    claimed_here(app, running)

    assert is_waited_for(upkeep)


@pytest.mark.parametrize(
    "end",
    [
        lambda store, job_id, attempt: store.complete(job_id, attempt, 2),
        lambda store, job_id, _: store.end(job_id, Status.FAILED, Failure(error_type="E", error_message="no")),
        lambda store, job_id, _: store.end(job_id, Status.CANCELLED, Failure(error_type="E", error_message="no")),
        lambda store, job_id, attempt: store.requeue(job_id, attempt=attempt, event=Event.RETRY, retry_count=1),
        lambda store, job_id, attempt: store.close(job_id, attempt, reason="it died"),
    ],
    ids=["completed", "failed", "cancelled", "retried", "closed"],
)
def test_it_does_not_wait_for_a_job_whose_row_says_that_it_is_over(app, upkeep, running, end):
    end(app.store, running.id, claimed_here(app, running))

    assert not is_waited_for(upkeep)


def test_it_does_not_wait_for_a_job_that_another_worker_has_taken_over(app, upkeep, running):
    claimed_here(app, running)
    claim(app.store, new_job(running.id), "another", liveness=Liveness.DEAD)

    assert not is_waited_for(upkeep)


def test_it_goes_on_waiting_while_the_database_does_not_answer_either(app, upkeep, running, monkeypatch):
    app.store.complete(running.id, claimed_here(app, running), 2)

    def away(_):
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(app.store, "jobs_by_id", away)
        with pytest.raises(DatabaseUnavailable):
            upkeep.round()
    assert request.unfinished()

    assert not is_waited_for(upkeep)
