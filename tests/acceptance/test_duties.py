"""One worker keeps house for all; when it is killed another one does, within seconds."""

from datetime import timedelta

import pytest
from sqlalchemy import select

from db.models import duties
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow
GET = {"timeout": 20}


def holder_of(own):
    """The worker that has the reconciler's duty, if it is one that holds a lease."""
    holders = {holder.lease: holder.worker_id for holder in own.app.store.holders()}
    return holders.get(own.app.store.duty_holder("reconciler"))


def taken_at_of(own):
    with own.app.store.database.reading() as connection:
        return connection.execute(select(duties.c.since).where(duties.c.name == "reconciler")).scalar_one()


def beat_of(own, worker_id):
    return next(row["last_heartbeat"] for row in own.app.store.workers() if row["worker_id"] == worker_id)


@pytest.fixture
def own_env():
    return {"LEASE_RENEW_S": 0.5, "LEASE_TIMEOUT_S": 60}  # it is the lock that tells of a death


def test_of_two_workers_one_reconciles_and_the_other_takes_over_when_it_is_killed(own, task, tmp_path):
    first = own.start_worker("--concurrency=1")
    assert eventually(lambda: holder_of(own), 5) == "w1"
    own.start_worker("--concurrency=1")
    begin, taken_at = beat_of(own, "w2"), taken_at_of(own)
    # It has gone round a few times meanwhile, and so has seen that the duty is taken.
    eventually(lambda: beat_of(own, "w2") - begin > timedelta(seconds=3), 15)
    assert (holder_of(own), taken_at_of(own)) == ("w1", taken_at)

    first.kill9_everything()

    eventually(lambda: holder_of(own) == "w2", 4)
    assert task.recover.delay(str(tmp_path / "runs")).get(**GET) == 2  # a retry that only the holder publishes


def test_a_worker_that_is_stopped_in_order_leaves_the_duty_to_the_other_one(own):
    first = own.start_worker("--concurrency=1")
    assert eventually(lambda: holder_of(own), 5) == "w1"
    own.start_worker("--concurrency=1")

    first.terminate()

    eventually(lambda: holder_of(own) == "w2", 8)
    assert first.wait() == 0
    assert holder_of(own) == "w2"
