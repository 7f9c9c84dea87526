"""Duties: of all workers that live one has each, and it passes on when that one is gone. Attempts that nothing runs."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest

from db.records import now
from tasks import request
from tasks.leases import Leases
from tasks.leftovers import token_of
from tasks.reconciler import Reconciler
from tasks.upkeep import DUTY, Upkeep
from tests.unit.jobs import ELSEWHERE, change, claimed_by, new_job, silent_for

STOPPED_FOR_S = 61


class Member:
    """A worker of the deployment, as far as duties go: a lease of its own on the real store."""

    def __init__(self, app, name):
        amqp = SimpleNamespace(queues=SimpleNamespace(consume_from={"add": None}))
        self.app = SimpleNamespace(store=app.store, settings=app.settings, amqp=amqp, worker_id=name, lease=None)
        self.app.leases = Leases(self.app)
        self.app.leases.take()
        self.upkeep = Upkeep(SimpleNamespace(app=self.app))
        self.upkeep._reconciler = Reconciler(self.app)
        self.upkeep._stopping, self.upkeep._threads = threading.Event(), []
        self.upkeep._seen_at = now()

    @property
    def has_duty(self):
        return self.upkeep.has_duty(DUTY)

    def die(self):
        """The kernel lets go of the lock; file and row stay."""
        self.app.leases._mine._close()

    def fall_silent(self, seconds):
        path = self.app.leases._directory / self.app.lease
        path.write_text(f"{float(path.read_text()) - seconds:020.3f}")

    def keep_house(self):
        """A round in which the reconciler's turn has come."""
        self.upkeep._reconcile_due = 0.0
        self.upkeep.keep_house()

    def leave(self):
        self.upkeep.stop(None)


@pytest.fixture
def members(app):
    members = [Member(app, f"w{number}") for number in (1, 2, 3)]
    yield members
    for member in members:
        member.app.leases._mine.release()


def with_duty(members):
    return [member.app.worker_id for member in members if member.has_duty]


def test_one_of_the_living_has_a_duty_and_keeps_it_whoever_asks(members):
    first, second, third = members

    assert with_duty([second, first, third]) == ["w2"]
    assert with_duty([third, first, second]) == ["w2"]
    assert first.app.store.duty_holder(DUTY) == second.app.lease


def test_each_duty_has_a_holder_of_its_own(members):
    first, second, _ = members

    assert first.upkeep.has_duty("reconciler")
    assert second.upkeep.has_duty("relay")
    assert not second.upkeep.has_duty("reconciler")
    assert not first.upkeep.has_duty("relay")


def test_a_duty_passes_on_at_once_when_its_holder_dies(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    first.die()

    assert with_duty([second, third]) == ["w2"]


def test_a_duty_passes_on_when_its_holder_leaves(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    first.leave()

    assert first.app.store.duty_holder(DUTY) is None
    assert with_duty([third, second]) == ["w3"]


def test_who_leaves_without_a_duty_takes_it_from_nobody(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    second.leave()

    assert with_duty([third, first]) == ["w1"]


def test_a_duty_passes_on_when_its_holder_is_stopped_for_a_minute(members, clock):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    clock.pass_s(60)  # the others have seen the database answer for long enough

    first.fall_silent(STOPPED_FOR_S - 10)
    assert with_duty([second, third]) == []
    first.fall_silent(10)
    assert with_duty([second, third]) == ["w2"]
    assert not first.has_duty


def test_two_that_find_a_dead_holder_at_once_do_not_both_get_its_duty(members, monkeypatch):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    first.die()
    take_duty = second.app.store.take_duty

    def overtaken(name, lease, *, after):
        monkeypatch.setattr(second.app.store, "take_duty", take_duty)
        assert third.has_duty
        return take_duty(name, lease, after=after)

    monkeypatch.setattr(second.app.store, "take_duty", overtaken)

    assert not second.has_duty
    assert with_duty([second, third]) == ["w3"]


@pytest.mark.parametrize("step_s", [60, -60])
def test_after_the_machine_slept_or_its_clock_was_set_silence_counts_anew(
    producer, add, members, clock, monkeypatch, step_s
):
    first, timeout_s = members[0], members[0].app.settings.lease_timeout_s
    job = add.delay(1, 1)
    claimed_by(producer.app, job, "asleep", host_id=ELSEWHERE)
    clock.pass_s(60)
    first.keep_house()
    silent_for(producer.app, 60, "asleep")

    monkeypatch.setattr("tasks.upkeep.now", lambda: now() + timedelta(seconds=step_s))
    first.keep_house()
    clock.pass_s(timeout_s - 5)
    first.keep_house()
    assert producer.row(job)["status"] == "running"

    clock.pass_s(5)
    first.keep_house()
    assert producer.row(job)["status"] == "queued"


# Attempts that nothing runs


@pytest.fixture
def upkeep(app):
    """The upkeep of this process, which holds a lease and runs nothing."""
    app.leases.take()
    upkeep = Upkeep(SimpleNamespace(app=app))
    upkeep._unclaimed = set()
    return upkeep


def claimed_here(app, job):
    row = app.store.job(job.id)
    values = {"publication": row["publication"], "worker_id": app.worker_id, "lease": app.lease, "is_loss": False}
    return app.store.claim(new_job(job.id), job_id=job.id, judge=None, max_deaths=3, **values).attempt


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


def test_an_attempt_that_nothing_runs_fails_when_it_was_one_death_too_many(producer, app, upkeep, tmp_path):
    job = resize(producer, tmp_path)
    claimed_here(app, job)
    change(app, job, deaths=2)

    upkeep._close_unclaimed()
    upkeep._close_unclaimed()

    row = producer.row(job)
    assert (row["status"], row["error_type"], row["deaths"]) == ("failed", "WorkerLost", 3)


def test_an_attempt_whose_time_went_by_in_an_outage_is_released(producer, app, upkeep, add, monkeypatch):
    job = add.delay(1, 1)
    claimed_here(app, job)
    change(app, job, deaths=2)
    monkeypatch.setattr(request, "spared", {job.id})

    upkeep._close_unclaimed()
    upkeep._close_unclaimed()

    row = producer.row(job)
    assert (row["status"], row["deaths"], request.spared) == ("queued", 2, set())
    assert producer.events(job)[-1] == "released"
