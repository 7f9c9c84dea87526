"""Who may run a job: the guard's claim, on every database."""

import pytest

from db.records import Decision, Fence, Holder, Liveness, Status
from tests.db.conftest import LOST, claim, events_of, new_job, row_of, running


class TestClaim:
    def test_a_queued_job_runs(self, store):
        job = new_job()
        store.enqueue(job)

        claimed = claim(store, job, "worker-7")

        assert (claimed.decision, claimed.attempt, claimed.deaths) == (Decision.RUN, 1, 0)
        row = row_of(store, job)
        assert (row["status"], row["claimed_by"], row["attempt"], row["deliveries"]) == ("running", "worker-7", 1, 1)
        assert row["claimed_at"] == row["started_at"] >= row["created_at"]
        assert events_of(store, job) == ["created", "claimed", "started"]
        assert [log["worker_id"] for log in store.logs(job.job_id)] == [None, "worker-7", "worker-7"]
        assert [log["details"] for log in store.logs(job.job_id)[1:]] == [{"attempt": 1}, {"attempt": 1}]

    def test_a_message_without_a_row_gets_one(self, store):
        job = new_job()

        claimed = claim(store, job, publication=3)

        assert (claimed.decision, claimed.attempt) == (Decision.RUN, 1)
        assert row_of(store, job)["publication"] == 3
        assert events_of(store, job) == ["created", "claimed", "started"]
        assert claim(store, job, "worker-2", publication=3, liveness=Liveness.DEAD).decision is Decision.RUN

    def test_the_row_of_a_message_is_made_only_where_there_is_none(self, store):
        job = new_job()
        store.enqueue(job)

        def claim_by(make):
            return store.claim(
                job.job_id,
                unknown=make,
                publication=1,
                worker_id="worker-1",
                lease=None,
                judge=lambda _: Liveness.ALIVE,
                max_deaths=3,
            )

        assert claim_by(lambda: pytest.fail("it has a row")).decision is Decision.RUN
        other, job = job, new_job()
        assert claim_by(lambda: job).decision is Decision.RUN
        assert events_of(store, job) == events_of(store, other) == ["created", "claimed", "started"]

    def test_a_claim_is_made_under_the_worker_s_lease(self, store):
        job, _attempt = running(store, "worker-7")

        assert row_of(store, job)["lease"] == "lease of worker-7"
        claim(store, job, "worker-8", liveness=Liveness.DEAD)
        assert row_of(store, job)["lease"] == "lease of worker-8"

    @pytest.mark.parametrize("publication", [1, 3])
    def test_a_message_of_another_publication_is_stale(self, store, publication):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)

        assert claim(store, job, publication=publication).decision is Decision.STALE
        lost = claim(store, job, publication=publication, liveness=Liveness.DEAD)
        assert lost.decision is Decision.STALE

        assert row_of(store, job)["status"] == "queued"
        assert claim(store, job, publication=2).attempt == 2

    def test_a_stale_message_does_not_take_a_running_job(self, store):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)
        claim(store, job, publication=2)

        stale = claim(store, job, publication=1, liveness=Liveness.DEAD)

        assert stale.decision is Decision.STALE
        assert row_of(store, job)["attempt"] == 2

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
    def test_a_job_that_has_ended_is_not_run_again(self, store, status):
        job, attempt = running(store)
        if status is Status.COMPLETED:
            store.complete(job.job_id, attempt, {})
        else:
            store.end(job.job_id, status, LOST, fence=Fence(attempt=attempt))
        before = row_of(store, job)

        assert claim(store, job, "worker-2", liveness=Liveness.DEAD).decision == Decision(status.value)

        assert row_of(store, job) == before
        assert events_of(store, job) == ["created", "claimed", "started", status.value]

    @pytest.mark.parametrize(
        ("liveness", "decision"), [(Liveness.ALIVE, Decision.HELD), (Liveness.UNCERTAIN, Decision.UNCERTAIN)]
    )
    def test_a_worker_that_is_not_known_to_be_dead_holds_its_job(self, store, liveness, decision):
        job, attempt = running(store, "worker-1")
        before = row_of(store, job)

        held = claim(store, job, "worker-2", liveness=liveness)

        assert (held.decision, held.holder) == (decision, "worker-1")
        assert row_of(store, job) == before
        assert store.owns(job.job_id, attempt)

    def test_a_job_of_a_dead_worker_is_taken_over(self, store):
        job, attempt = running(store, "worker-1")

        taken = claim(store, job, "worker-2", liveness=Liveness.DEAD)

        assert (taken.decision, taken.attempt, taken.deaths) == (Decision.RUN, attempt + 2, 1)
        assert taken.holder == "worker-1"
        row = row_of(store, job)
        assert (row["claimed_by"], row["deaths"], row["deliveries"], row["publication"]) == ("worker-2", 1, 2, 1)
        assert events_of(store, job) == ["created", "claimed", "started", "lost", "claimed", "started"]
        lost = store.logs(job.job_id)[3]
        assert (lost["worker_id"], lost["details"]) == ("worker-1", {"attempt": 1, "deaths": 1})

    def test_a_lease_without_a_row_is_dead_and_nobody_is_asked(self, store):
        job = new_job()
        store.enqueue(job)
        asked = []
        claim(store, job, "worker-1", lease="never renewed")

        taken = claim(store, job, "worker-2", judge=asked.append)

        assert (taken.decision, taken.attempt, taken.deaths) == (Decision.RUN, 3, 1)
        assert asked == []

    def test_an_attempt_without_a_lease_keeps_its_job(self, store):
        job = new_job()
        store.enqueue(job)
        claim(store, job, "worker-1", lease=None)

        assert claim(store, job, "worker-2", liveness=Liveness.DEAD).decision is Decision.HELD

    def test_the_holder_is_judged_by_its_lease_s_row(self, store):
        job, _attempt = running(store, "worker-1")
        asked = []

        def judge(holder):
            asked.append(holder)
            return Liveness.ALIVE

        assert claim(store, job, "worker-2", judge=judge).decision is Decision.HELD

        (holder,) = store.holders(worker_id="worker-1")
        assert asked[0].renewed_at == holder.renewed_at
        assert asked[0] == Holder("lease of worker-1", "worker-1", "this host", holder.renewed_at, asked[0].seen_at)

    def test_a_job_that_kills_its_workers_is_poison(self, store):
        job, _attempt = running(store)

        decisions = [claim(store, job, liveness=Liveness.DEAD, max_deaths=3).decision for _ in range(3)]

        assert decisions == [Decision.RUN, Decision.RUN, Decision.POISON]
        row = row_of(store, job)
        assert (row["deaths"], row["attempt"], row["status"]) == (3, 7, "running")
        assert store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=7))
        assert events_of(store, job)[-3:] == ["claimed", "started", "failed"]

    def test_a_new_attempt_starts_without_the_progress_of_the_last(self, store):
        job, attempt = running(store)
        store.progress(job.job_id, attempt, percent=60.0, stage="encoding")

        claim(store, job, liveness=Liveness.DEAD)

        row = row_of(store, job)
        assert (row["progress"], row["stage"]) == (0.0, None)

    def test_after_a_lost_commit_the_same_claim_runs_and_is_no_death(self, store, lose_commit, unavailable):
        job = new_job()
        store.enqueue(job)
        lose_commit()
        with unavailable:
            claim(store, job)

        again = claim(store, job)

        assert (again.decision, again.attempt, again.deaths) == (Decision.RUN, 1, 0)
        assert events_of(store, job) == ["created", "claimed", "started"]
        assert claim(store, job).decision is Decision.HELD  # a second delivery, not a repetition

    def test_after_a_lost_commit_a_second_delivery_to_another_worker_is_still_held(
        self, store, lose_commit, unavailable
    ):
        job = new_job()
        store.enqueue(job)
        lose_commit()
        with unavailable:
            claim(store, job, "worker-1")

        assert claim(store, job, "worker-2").decision is Decision.HELD

    def test_a_lost_takeover_is_counted_once(self, store, lose_commit, unavailable):
        job, _attempt = running(store)
        lose_commit()
        with unavailable:
            claim(store, job, "worker-2", liveness=Liveness.DEAD)

        again = claim(store, job, "worker-2", liveness=Liveness.DEAD)

        assert (again.decision, again.attempt, again.deaths) == (Decision.RUN, 3, 1)
        assert events_of(store, job).count("lost") == 1
