"""Attempts that are found dead or given back: close; and what a paused queue does to a claim."""

import pytest

from db.records import Claim, Closed, Decision, Failure, Fence, Liveness, Status, now
from tests.db.conftest import claim, events_of, new_job, row_of, running

FAILURE = Failure(error_type="E", error_message="m")


class TestClose:
    def test_a_closed_attempt_rests_until_it_is_published_anew(self, store):
        job, attempt = running(store, "worker-7", priority=8)
        store.progress(job.job_id, attempt, percent=60.0, stage="encoding")
        before = now()

        closed = store.close(job.job_id, attempt, reason="its worker died")

        assert closed == Closed(attempt=attempt + 1, publication=2, deaths=1)
        row = row_of(store, job)
        assert (row["status"], row["attempt"], row["publication"], row["deaths"]) == ("queued", 2, 2, 1)
        assert (row["progress"], row["stage"], row["published_at"]) == (0.0, None, None)
        assert before <= row["updated_at"] <= row["run_after_utc"] <= now()
        assert claim(store, job, publication=1).decision is Decision.STALE
        assert [due["job_id"] for due in store.take_due(10)] == [job.job_id]
        assert claim(store, job, publication=2).attempt == 3

    def test_its_change_says_who_held_it_and_why_it_ended(self, store):
        job, attempt = running(store, "worker-7")

        store.close(job.job_id, attempt, event="released", reason="worker stops", is_death=False)

        assert events_of(store, job) == ["created", "claimed", "started", "released"]
        change = store.logs(job.job_id)[-1]
        assert (change["worker_id"], change["message"]) == ("worker-7", "worker stops")
        assert change["details"] == {"attempt": attempt, "deaths": 0}

    def test_a_job_that_is_given_back_counts_no_death(self, store):
        job, attempt = running(store)

        closed = store.close(job.job_id, attempt, reason="worker stops", is_death=False)

        assert closed.deaths == row_of(store, job)["deaths"] == 0

    def test_an_attempt_is_closed_once(self, store):
        job, attempt = running(store)
        store.close(job.job_id, attempt, reason="first")
        before, events = row_of(store, job), events_of(store, job)

        assert store.close(job.job_id, attempt, reason="second") is None
        assert store.close(job.job_id, attempt + 1, reason="it is queued") is None

        assert row_of(store, job) == before
        assert events_of(store, job) == events

    def test_a_closed_attempt_owns_nothing(self, store):
        job, attempt = running(store)
        store.close(job.job_id, attempt, reason="dead")

        assert not store.owns(job.job_id, attempt)
        assert not store.progress(job.job_id, attempt, percent=1.0)
        assert not store.complete(job.job_id, attempt, {})
        assert not store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))
        assert store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1) is None
        assert row_of(store, job)["status"] == "queued"

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
    def test_a_job_that_has_ended_is_not_closed(self, store, status):
        job, attempt = running(store)
        if status is Status.COMPLETED:
            store.complete(job.job_id, attempt, {})
        else:
            store.end(job.job_id, status, FAILURE, fence=Fence(attempt=attempt))

        assert store.close(job.job_id, attempt, reason="late") is None

        assert row_of(store, job)["status"] == status

    def test_a_job_that_is_unknown_or_never_started_is_not_closed(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.close(job.job_id, 0, reason="it never ran") is None
        assert store.close("unknown", 1, reason="no row") is None

        assert events_of(store, job) == ["created"]

    def test_after_a_lost_commit_the_same_close_gives_what_it_wrote(self, store, lose_commit, unavailable):
        job, attempt = running(store)
        lose_commit()
        with unavailable:
            store.close(job.job_id, attempt, reason="dead")

        again = store.close(job.job_id, attempt, reason="dead")

        assert again == Closed(attempt=2, publication=2, deaths=1)
        assert events_of(store, job).count("lost") == 1
        assert store.close(job.job_id, attempt, reason="dead") is None  # somebody else's

    def test_after_a_lost_commit_a_job_that_moved_on_is_left_alone(self, store, lose_commit, unavailable):
        job, attempt = running(store)
        lose_commit()
        with unavailable:
            store.close(job.job_id, attempt, reason="dead")
        moved_on = claim(store, job, "worker-2", publication=2).attempt

        assert store.close(job.job_id, attempt, reason="dead") is None

        assert store.owns(job.job_id, moved_on)

    def test_deaths_that_were_closed_by_others_make_the_next_claim_poison(self, store):
        job = new_job()
        store.enqueue(job)
        claims = []
        for _ in range(3):
            claims.append(claim(store, job, publication=len(claims) + 1))
            store.close(job.job_id, claims[-1].attempt, reason="dead")
            store.take_due(1)

        assert [claimed.decision for claimed in claims] == [Decision.RUN] * 3
        last = claim(store, job, publication=4)
        assert (last.decision, last.attempt, last.deaths) == (Decision.POISON, 7, 3)


class TestClaimInAPausedQueue:
    def test_the_job_rests(self, store):
        job = new_job()
        store.enqueue(job)
        store.pause(job.queue)

        assert claim(store, job) == Claim(Decision.PAUSED)

        row = row_of(store, job)
        assert (row["status"], row["attempt"], row["deliveries"], row["claimed_by"]) == ("queued", 0, 0, None)
        assert (row["publication"], row["published_at"]) == (2, None)
        assert row["run_after_utc"] <= now()
        assert events_of(store, job) == ["created"]

    def test_it_is_published_when_the_queue_is_resumed(self, store):
        job = new_job()
        store.enqueue(job)
        store.pause(job.queue)
        claim(store, job)

        assert store.take_due(10) == []
        store.resume(job.queue)

        assert [row["publication"] for row in store.take_due(10)] == [2]
        assert claim(store, job, publication=1).decision is Decision.STALE
        assert claim(store, job, publication=2).decision is Decision.RUN

    def test_a_second_delivery_of_its_message_is_stale(self, store):
        job = new_job()
        store.enqueue(job)
        store.pause(job.queue)
        claim(store, job)

        assert claim(store, job).decision is Decision.STALE

        assert row_of(store, job)["publication"] == 2

    def test_a_message_without_a_row_gets_one_that_rests(self, store):
        job = new_job()
        store.pause(job.queue)

        assert claim(store, job, publication=3).decision is Decision.PAUSED

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["published_at"]) == ("queued", 4, None)

    def test_other_queues_are_claimed(self, store):
        job = new_job(queue="video_probe")
        store.enqueue(job)
        store.pause("image_resize")

        assert claim(store, job).decision is Decision.RUN

    def test_a_pause_that_has_ended_stops_nothing(self, store):
        job = new_job()
        store.enqueue(job)
        store.pause(job.queue, until=now())

        assert claim(store, job).decision is Decision.RUN

    def test_a_running_job_goes_on_and_is_held(self, store):
        job, attempt = running(store)
        store.pause(job.queue)

        assert claim(store, job, "worker-2").decision is Decision.HELD

        assert store.complete(job.job_id, attempt, {})

    def test_the_job_of_a_dead_worker_is_closed_and_rests(self, store):
        job, _attempt = running(store)
        store.pause(job.queue)

        taken = claim(store, job, "worker-2", liveness=Liveness.DEAD)

        assert taken.decision is Decision.PAUSED
        row = row_of(store, job)
        assert (row["status"], row["attempt"], row["deaths"], row["published_at"]) == ("queued", 2, 1, None)
        assert events_of(store, job) == ["created", "claimed", "started", "lost"]
        store.resume(job.queue)
        (due,) = store.take_due(10)
        assert claim(store, job, publication=due["publication"]).decision is Decision.RUN

    def test_after_a_lost_commit_the_message_is_no_longer_needed(self, store, lose_commit, unavailable):
        job = new_job()
        store.enqueue(job)
        store.pause(job.queue)
        lose_commit()
        with unavailable:
            claim(store, job)

        assert claim(store, job).decision in {Decision.STALE, Decision.PAUSED}

        store.resume(job.queue)
        assert len(store.take_due(10)) == 1
