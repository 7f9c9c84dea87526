"""Duties: of all workers that live one has each, and it passes on when that one is gone."""

from types import SimpleNamespace

import pytest

from tasks.duty import Duty
from tasks.leases import Leases
from tests.unit.jobs import ELSEWHERE, silent_for

NAME = "reconciler"
STOPPED_FOR_S = 61


class Member:
    """A worker of the deployment, as far as duties go: a lease of its own on the real store."""

    def __init__(self, app, name):
        self.app = SimpleNamespace(store=app.store, settings=app.settings, worker_id=name, lease=None)
        self.app.leases = Leases(self.app)
        self.app.leases.take()
        self.duty = Duty(self.app, NAME)

    def die(self):
        """The kernel lets go of the lock; file and row stay."""
        self.app.leases._mine._close()

    def fall_silent(self, seconds):
        path = self.app.leases._directory / self.app.lease
        path.write_text(f"{float(path.read_text()) - seconds:020.3f}")


@pytest.fixture
def members(app):
    members = [Member(app, f"w{number}") for number in (1, 2, 3)]
    yield members
    for member in members:
        member.app.leases._mine.release()


def with_duty(members):
    return [member.app.worker_id for member in members if member.duty.is_held()]


def test_one_of_the_living_has_a_duty_and_keeps_it_whoever_asks(members):
    first, second, third = members

    assert with_duty([second, first, third]) == ["w2"]
    assert with_duty([third, first, second]) == ["w2"]
    assert first.app.store.duty_holder(NAME) == second.app.lease


def test_each_duty_has_a_holder_of_its_own(members):
    first, second, _ = members

    assert first.duty.is_held()
    assert Duty(second.app, "relay").is_held()
    assert not second.duty.is_held()
    assert not Duty(first.app, "relay").is_held()


def test_a_duty_passes_on_at_once_when_its_holder_dies(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    first.die()

    assert with_duty([second, third]) == ["w2"]


def test_a_duty_passes_on_at_once_when_its_holder_has_no_lease_any_more(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    first.app.store.forget_lease(first.app.lease)

    assert with_duty([second, third]) == ["w2"]


def test_a_duty_passes_on_when_its_holder_leaves(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    first.duty.leave()

    assert first.app.store.duty_holder(NAME) is None
    assert with_duty([third, second]) == ["w3"]


def test_who_leaves_without_a_duty_takes_it_from_nobody(members):
    first, second, third = members
    assert with_duty(members) == ["w1"]

    second.duty.leave()

    assert with_duty([third, first]) == ["w1"]


def test_a_duty_passes_on_when_its_holder_is_stopped_for_a_minute(members, clock):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    clock.pass_s(60)  # the others have seen the database answer for long enough

    first.fall_silent(STOPPED_FOR_S - 10)
    assert with_duty([second, third]) == []
    first.fall_silent(10)
    assert with_duty([second, third]) == ["w2"]
    assert not first.duty.is_held()


@pytest.mark.parametrize("silent_s", [14, 16])
def test_a_duty_that_two_may_do_at_once_passes_on_when_its_holder_is_silent_dead_or_not(members, silent_s):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    silent_for(first.app, silent_s, "w1")

    assert not third.duty.is_held()
    assert Duty(second.app, NAME, passes_from_silent=True).is_held() is (silent_s > 15)


def test_after_an_outage_a_duty_stays_with_who_could_not_renew(members, clock):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    first.app.store.renew_lease("far", "far", ELSEWHERE)
    first.app.store.take_duty(NAME, "far", after=first.app.lease)
    silent_for(first.app, 60, "far")
    clock.pass_s(60)

    second.app.leases.interrupted()

    assert with_duty([second]) == []
    assert with_duty([third]) == ["w3"]  # which has seen no outage


def test_two_that_find_a_dead_holder_at_once_do_not_both_get_its_duty(members, monkeypatch):
    first, second, third = members
    assert with_duty(members) == ["w1"]
    first.die()
    take_duty = second.app.store.take_duty

    def overtaken(name, lease, *, after):
        monkeypatch.setattr(second.app.store, "take_duty", take_duty)
        assert third.duty.is_held()
        return take_duty(name, lease, after=after)

    monkeypatch.setattr(second.app.store, "take_duty", overtaken)

    assert not second.duty.is_held()
    assert with_duty([second, third]) == ["w3"]
