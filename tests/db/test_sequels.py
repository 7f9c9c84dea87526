"""What follows from the end of a job: due with the end, told afterwards, pending again with a replay."""

from datetime import timedelta

import pytest

from db.records import Failure, Fence, Sequel, Status, now
from tests.db.conftest import claim, events_of, new_job, row_of, running

FAILURE = Failure(error_type="E", error_message="m")


def untold(store, **options):
    return [row["job_id"] for row in store.unsettled(now(), **options)]


def member(store, **values):
    """A running member of a chord."""
    return running(store, group_id="g", in_chord=True, sequel=Sequel.PENDING, **values)


class TestDue:
    def test_a_completed_member_of_a_chord_is_due(self, store):
        job, attempt = member(store)
        assert untold(store) == []

        store.complete(job.job_id, attempt, {})

        assert row_of(store, job)["sequel"] == Sequel.DUE
        assert untold(store) == [job.job_id]

    def test_a_completed_job_of_no_chord_is_not(self, store):
        job, attempt = running(store, sequel=Sequel.PENDING)

        store.complete(job.job_id, attempt, {})

        assert row_of(store, job)["sequel"] is None
        assert untold(store) == []

    @pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
    @pytest.mark.parametrize(
        "make", [member, lambda store: running(store, sequel=Sequel.PENDING)], ids=["chord", "chain"]
    )
    def test_an_unsuccessful_job_is_due_if_something_follows(self, store, status, make):
        job, attempt = make(store)

        store.end(job.job_id, status, FAILURE, fence=Fence(attempt=attempt))

        assert row_of(store, job)["sequel"] == Sequel.DUE
        assert untold(store) == [job.job_id]

    @pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
    def test_one_from_which_nothing_follows_is_not(self, store, status):
        job, attempt = running(store)

        store.end(job.job_id, status, FAILURE, fence=Fence(attempt=attempt))

        assert row_of(store, job)["sequel"] is None
        assert untold(store) == []

    def test_a_queued_job_that_is_cancelled_is_due(self, store):
        job = new_job(sequel=Sequel.PENDING)
        store.enqueue(job)

        store.end(job.job_id, Status.CANCELLED, FAILURE)

        assert untold(store) == [job.job_id]

    def test_a_job_without_a_row_that_is_ended_is_due(self, store):
        job = new_job(sequel=Sequel.PENDING)

        store.end(job.job_id, Status.FAILED, FAILURE, unknown=lambda: job)

        assert untold(store) == [job.job_id]

    def test_a_retry_is_no_end(self, store):
        job, attempt = member(store)

        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)

        assert row_of(store, job)["sequel"] == Sequel.PENDING
        assert untold(store) == []

    def test_a_closed_attempt_is_no_end(self, store):
        job, attempt = member(store)

        store.close(job.job_id, attempt, reason="dead")

        assert row_of(store, job)["sequel"] == Sequel.PENDING

    def test_a_late_end_makes_nothing_due(self, store):
        job, attempt = running(store, sequel=Sequel.PENDING)
        store.complete(job.job_id, attempt, {})

        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))

        assert untold(store) == []


class TestTold:
    def test_what_was_told_is_told_once(self, store):
        job, attempt = member(store)
        store.complete(job.job_id, attempt, {})
        events = events_of(store, job)

        for _ in range(2):
            store.settle(job.job_id)

            assert row_of(store, job)["sequel"] == Sequel.TOLD
            assert untold(store) == []
            assert events_of(store, job) == events

    def test_completing_again_is_not_told_again(self, store):
        job, attempt = member(store)
        store.complete(job.job_id, attempt, {})
        store.settle(job.job_id)

        assert store.complete(job.job_id, attempt, {})

        assert untold(store) == []

    @pytest.mark.parametrize("sequel", [None, Sequel.PENDING])
    def test_what_is_not_due_is_not_told(self, store, sequel):
        job, _attempt = running(store, sequel=sequel)

        store.settle(job.job_id)
        store.settle("unknown")

        assert row_of(store, job)["sequel"] == sequel

    def test_a_replay_makes_it_pending_again(self, store):
        job, attempt = member(store)
        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))
        store.settle(job.job_id)

        store.replay(job.job_id)

        assert row_of(store, job)["sequel"] == Sequel.PENDING
        assert untold(store) == []
        again = claim(store, job, publication=2).attempt
        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=again))
        assert untold(store) == [job.job_id]

    def test_a_replay_before_it_was_told_makes_it_pending_too(self, store):
        job, attempt = member(store)
        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))

        store.replay(job.job_id)
        store.settle(job.job_id)  # by the one who was about to tell of the first end

        assert row_of(store, job)["sequel"] == Sequel.PENDING

    def test_a_replay_of_a_job_from_which_nothing_follows_changes_nothing(self, store):
        job, attempt = running(store)
        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))

        store.replay(job.job_id)

        assert row_of(store, job)["sequel"] is None


class TestUnsettled:
    def test_the_first_that_ended_comes_first_and_a_page_at_a_time(self, store):
        members = [member(store) for _ in range(3)]
        for job, attempt in reversed(members):
            store.complete(job.job_id, attempt, {})

        first_of_all = [job.job_id for job, _attempt in reversed(members)]
        assert untold(store) == first_of_all
        assert untold(store, limit=2) == first_of_all[:2]

    def test_those_that_ended_of_late_are_still_being_told(self, store):
        job, attempt = member(store)
        store.complete(job.job_id, attempt, {})

        assert store.unsettled(row_of(store, job)["completed_at"]) == []
        assert store.unsettled(now() - timedelta(seconds=60)) == []
