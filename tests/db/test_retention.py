"""What is old enough is removed, in small batches; what is not, or has not ended, stays."""

import pytest
from sqlalchemy import text

from db.records import Failure, Status, now
from tests.db.conftest import beat, claim, new_job, row_of, running

FAILURE = Failure(error_type="E", error_message="m")


def completed(store, **values):
    job, attempt = running(store, **values)
    store.complete(job.job_id, attempt, {})
    return job


def count(store, table):
    with store.database.reading() as connection:
        return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


class TestJobs:
    def test_jobs_that_ended_are_removed_with_their_changes(self, store):
        completed(store)
        for status in (Status.FAILED, Status.CANCELLED):
            job = new_job()
            store.enqueue(job)
            store.end(job.job_id, status, FAILURE)

        assert store.prune(now()) == 3

        assert store.jobs() == []
        assert count(store, "task_logs") == 0

    def test_jobs_that_have_not_ended_stay(self, store):
        queued, resting, active = new_job(), new_job(), running(store)[0]
        store.enqueue(queued)
        store.enqueue(resting, is_resting=True)

        assert store.prune(now()) == 0

        assert {row["job_id"] for row in store.jobs()} == {queued.job_id, resting.job_id, active.job_id}
        assert len(store.logs(active.job_id)) == 3

    def test_jobs_that_ended_of_late_stay(self, store):
        old = completed(store)
        slow, attempt = running(store)
        between = now()
        store.complete(slow.job_id, attempt, {})  # created before, ended after
        new = completed(store)

        assert store.prune(between) == 1

        assert store.job(old.job_id) is None
        assert {row["job_id"] for row in store.jobs()} == {slow.job_id, new.job_id}

    def test_a_replayed_job_stays(self, store):
        job = new_job()
        store.enqueue(job)
        store.end(job.job_id, Status.FAILED, FAILURE)
        store.replay(job.job_id)

        assert store.prune(now()) == 0

        assert row_of(store, job)["status"] == "queued"

    def test_many_are_removed_by_a_number_of_calls(self, store):
        at = "'2026-01-01 00:00:00.000000+00:00'"
        if store.database.is_sqlite:
            at = "'2026-01-01 00:00:00.000000'"
        with store.database.transaction() as connection:
            for number in range(1100):
                connection.execute(
                    text(
                        "INSERT INTO task_queue (job_id, task_type, queue, parameters, status, created_at, updated_at,"
                        f" completed_at) VALUES ('old-{number}', 't', 't', '{{}}', 'completed', {at}, {at}, {at})"
                    )
                )
        store.enqueue(new_job("kept"))
        removed = []

        while not removed or removed[-1]:
            removed.append(store.prune(now()))

        assert sum(removed) == 1100
        assert len(removed) > 2
        assert [row["job_id"] for row in store.jobs()] == ["kept"]


class TestTheRest:
    def test_workers_that_have_long_been_silent_are_removed_with_their_changes(self, store):
        store.heartbeat(beat("old"))
        store.log_worker("old", "started", "worker started")
        between = now()
        store.heartbeat(beat("new"))
        store.log_worker("new", "started", "worker started")

        store.prune(between)

        assert [row["worker_id"] for row in store.workers()] == ["new"]
        assert count(store, "task_logs") == 1

    def test_leases_duties_and_pauses_stay(self, store):
        store.renew_lease("lease-1", "worker-1", "host-1")
        store.take_duty("reconciler", "lease-1", after=None)
        store.pause("a")

        store.prune(now())

        assert len(store.holders()) == 1
        assert store.duty_holder("reconciler") == "lease-1"
        assert set(store.paused_queues()) == {"a"}

    def test_old_groups_are_removed(self, store):
        store.save_group("old", ["a"])
        between = now()
        store.save_group("new", ["b"])

        store.prune(between)

        assert (store.group("old"), store.group("new")) == (None, ["b"])

    def test_a_chord_that_has_not_ended_still_fires(self, store):
        job = new_job(group_id="g", in_chord=True)
        store.enqueue(job)
        store.set_chord_size("g", 1)

        store.prune(now())

        store.complete(job.job_id, claim(store, job).attempt, "result")
        assert store.chord_parts("g", None).is_mine

    def test_a_chord_counts_members_that_ended_long_before_the_last_one(self, store):
        early = completed(store, group_id="g", in_chord=True)
        late = new_job(group_id="g", in_chord=True)
        store.enqueue(late)
        store.set_chord_size("g", 2)
        assert not store.chord_parts("g", None).is_mine

        assert store.prune(now()) == 0

        store.complete(late.job_id, claim(store, late).attempt, "late")
        assert store.chord_parts("g", None).results == ({}, "late")
        assert store.prune(now()) == 2
        assert store.job(early.job_id) is None

    def test_a_chord_that_has_fired_does_not_fire_again(self, store):
        job, attempt = running(store, group_id="g", in_chord=True)
        store.set_chord_size("g", 1)
        between = now()
        store.complete(job.job_id, attempt, "result")
        assert store.chord_parts("g", 1).is_mine

        store.prune(between)

        assert not store.chord_parts("g", 1).is_mine  # a second delivery, say

    @pytest.mark.parametrize("times", [1, 2])
    def test_an_empty_store_is_pruned_too(self, store, times):
        assert [store.prune(now()) for _ in range(times)] == [0] * times
