"""Unique keys: of all submissions with one key there is one living job."""

import threading
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from db.records import Failure, Fence, Publication, Status, now
from db.store import submissions
from tests.db.conftest import claim, events_of, new_job, row_of, running
from tests.db.processes import in_processes

SOON = timedelta(hours=1)
FAILURE = Failure(error_type="E", error_message="m")


def unique(key="thumbnail of a.jpg", **values):
    return new_job(unique_key=key, **values)


class TestEnqueueUnique:
    def test_the_first_is_enqueued(self, store):
        job = unique(priority=8)

        assert store.enqueue_unique(job) == (job.job_id, Publication(1, 8))

        row = row_of(store, job)
        assert (row["status"], row["unique_key"]) == ("queued", "thumbnail of a.jpg")
        assert events_of(store, job) == ["created"]

    def test_the_first_may_rest(self, store):
        job = unique()

        assert store.enqueue_unique(job, is_resting=True) == (job.job_id, Publication(1, 5, is_resting=True))

        assert row_of(store, job)["published_at"] is None

    @pytest.mark.parametrize("is_running", [False, True])
    def test_the_second_gets_the_id_of_the_first(self, store, is_running):
        first, second = unique(), unique()
        store.enqueue_unique(first)
        if is_running:
            claim(store, first)
        before = row_of(store, first)

        assert store.enqueue_unique(second) == (first.job_id, None)

        assert store.job(second.job_id) is None
        assert row_of(store, first) == before
        assert store.living("thumbnail of a.jpg") == first.job_id

    def test_other_keys_do_not_matter(self, store):
        store.enqueue_unique(unique("a"))
        store.enqueue(new_job())
        other = unique("b")

        assert store.enqueue_unique(other) == (other.job_id, Publication(1, 5))

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
    def test_a_key_is_free_again_after_the_end(self, store, status):
        first, second = unique(), unique()
        store.enqueue_unique(first)
        attempt = claim(store, first).attempt
        if status is Status.COMPLETED:
            store.complete(first.job_id, attempt, {})
        else:
            store.end(first.job_id, status, FAILURE, fence=Fence(attempt=attempt))

        assert store.living("thumbnail of a.jpg") is None
        assert store.enqueue_unique(second) == (second.job_id, Publication(1, 5))
        assert store.living("thumbnail of a.jpg") == second.job_id

    def test_a_key_is_kept_over_a_retry(self, store):
        first = unique()
        store.enqueue_unique(first)
        store.requeue(first.job_id, attempt=claim(store, first).attempt, event="retry", retry_count=1)

        assert store.enqueue_unique(unique()) == (first.job_id, None)

    def test_a_key_is_free_again_when_its_time_is_over(self, store):
        first, second = unique(unique_until=now()), unique()
        store.enqueue_unique(first)

        assert store.enqueue_unique(second) == (second.job_id, Publication(1, 5))

        assert (row_of(store, first)["status"], row_of(store, first)["unique_key"]) == ("queued", None)
        assert store.living("thumbnail of a.jpg") == second.job_id
        assert claim(store, first).attempt == 1

    def test_a_key_is_kept_until_its_time_is_over(self, store):
        first = unique(unique_until=now() + SOON)
        store.enqueue_unique(first)

        assert store.enqueue_unique(unique()) == (first.job_id, None)

    def test_a_known_id_is_left_as_it_is(self, store):
        job = unique()
        store.enqueue_unique(job)
        store.end(job.job_id, Status.FAILED, FAILURE)

        assert store.enqueue_unique(job) == (job.job_id, None)

        assert row_of(store, job)["status"] == "failed"

    def test_after_a_lost_commit_the_same_call_still_publishes_it(self, store, lose_commit, unavailable):
        job = unique()
        lose_commit()
        with unavailable:
            store.enqueue_unique(job)

        assert store.enqueue_unique(job) == (job.job_id, Publication(1, 5))

        assert store.enqueue_unique(job) == (job.job_id, None)
        assert events_of(store, job) == ["created"]

    def test_a_plain_enqueue_of_a_taken_key_makes_no_second_row(self, store):
        store.enqueue_unique(unique())

        with pytest.raises(IntegrityError):
            store.enqueue(unique())

        assert len(store.jobs()) == 1


class TestManyAtOnce:
    def test_of_many_threads_one_makes_the_row(self, store):
        answers, go = [], threading.Barrier(8)

        def submit(job):
            go.wait(10)
            answers.append(store.enqueue_unique(job))

        threads = [threading.Thread(target=submit, args=(unique(),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        (row,) = store.jobs()
        assert [job_id for job_id, _publication in answers] == [row["job_id"]] * 8
        assert [publication for _job_id, publication in answers if publication] == [Publication(1, 5)]

    def test_of_many_processes_one_makes_the_row_after_the_time_of_an_older_one(self, store):
        store.enqueue_unique(unique(unique_until=now()))

        answers = in_processes(6, lambda number: store.enqueue_unique(unique(job_id=f"job-of-{number}")))

        assert len(store.jobs()) == 2
        assert {job_id for job_id, _publication in answers} == {store.living("thumbnail of a.jpg")}
        assert len([publication for _job_id, publication in answers if publication]) == 1

    def test_keys_that_are_taken_and_given_up_all_the_time_refuse_nobody(self, store):
        rounds = 25

        def submit(number):
            mine = 0
            for index in range(rounds):
                job = unique(job_id=f"churn-{number}-{index}")
                job_id, publication = store.enqueue_unique(job)
                if publication is not None:
                    assert job_id == job.job_id
                    assert store.end(job.job_id, Status.CANCELLED, FAILURE)
                    mine += 1
            return mine

        made = in_processes(6, submit)

        assert len(store.jobs(limit=1000)) == sum(made)
        assert store.living("thumbnail of a.jpg") is None

    def test_a_key_given_up_between_refusal_and_look_is_taken(self, store, monkeypatch):
        """Another submission was faster, and its job has ended by the time that it is looked for."""
        other, job = unique(), unique()
        store.enqueue(other)
        looks = []

        def not_seen_at_first(look):
            def seen(*args):
                looks.append(args)
                if len(looks) == 1:
                    return None
                store.end(other.job_id, Status.CANCELLED, FAILURE)
                return look(*args)

            return seen

        monkeypatch.setattr("db.store.submissions._holder_of_key", not_seen_at_first(submissions._holder_of_key))
        monkeypatch.setattr(store, "living", not_seen_at_first(store.living))

        assert store.enqueue_unique(job) == (job.job_id, Publication(1, 5))


class TestReplay:
    def dead(self, store, **values):
        job = new_job(**values)
        store.enqueue(job)
        store.end(job.job_id, Status.FAILED, FAILURE)
        return job

    def test_a_replayed_job_may_rest(self, store):
        job = self.dead(store, run_after_utc=now() + SOON, expires_at=now())

        assert store.replay(job.job_id, is_resting=True) == Publication(2, 5, is_resting=True)

        row = row_of(store, job)
        assert (row["status"], row["published_at"], row["expires_at"]) == ("queued", None, None)
        assert [due["job_id"] for due in store.take_due(10)] == [job.job_id]

    def test_one_that_does_not_rest_is_the_callers_to_send(self, store):
        job = self.dead(store, run_after_utc=now() + SOON, expires_at=now())
        before = now()

        assert store.replay(job.job_id) == Publication(2, 5)

        row = row_of(store, job)
        assert (row["run_after_utc"], row["expires_at"]) == (None, None)
        assert row["published_at"] >= before
        assert store.take_due(10) == []

    def test_only_a_job_that_was_never_sent_is_replayed_if_so_asked(self, store):
        unsent = new_job()
        store.end(unsent.job_id, Status.FAILED, FAILURE, unknown=lambda: unsent, was_sent=False)
        cancelled_in_time = new_job()
        store.enqueue(cancelled_in_time)
        store.end(cancelled_in_time.job_id, Status.CANCELLED, FAILURE)
        cancelled_at_rest = new_job()
        store.enqueue(cancelled_at_rest, is_resting=True)
        store.end(cancelled_at_rest.job_id, Status.CANCELLED, FAILURE)
        started, attempt = running(store)
        store.end(started.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))

        assert store.replay(unsent.job_id, only_unsent=True) == Publication(2, 5)
        for sent in (cancelled_in_time, cancelled_at_rest, started):
            assert store.replay(sent.job_id, only_unsent=True) is None
            assert events_of(store, sent)[-1] in ("failed", "cancelled")

    def test_deliveries_count_from_nothing(self, store):
        job, attempt = running(store)
        store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt))

        store.replay(job.job_id)

        assert row_of(store, job)["deliveries"] == 0

    def test_a_key_that_lives_in_another_job_stops_a_replay(self, store):
        dead = self.dead(store, unique_key="k")
        living = unique("k")
        store.enqueue_unique(living)
        before, events = row_of(store, dead), events_of(store, dead)

        with pytest.raises(IntegrityError):
            store.replay(dead.job_id)

        assert row_of(store, dead) == before
        assert events_of(store, dead) == events
        store.end(living.job_id, Status.CANCELLED, FAILURE)
        assert store.replay(dead.job_id) == Publication(2, 5)
        assert store.living("k") == dead.job_id

    def test_after_a_lost_commit_the_same_resting_replay_gives_its_publication(self, store, lose_commit, unavailable):
        job = self.dead(store)
        lose_commit()
        with unavailable:
            store.replay(job.job_id, is_resting=True)

        assert store.replay(job.job_id, is_resting=True) == Publication(2, 5, is_resting=True)

        assert events_of(store, job).count("replayed") == 1
