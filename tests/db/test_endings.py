"""Fences, ends, and the next attempt, on every database."""

import pytest

from db.records import Decision, Failure, Fence, Liveness, Publication, Status, now
from tests.db.conftest import LOST, WHEN, claim, events_of, new_job, row_of, running


class TestFences:
    """Whatever an attempt writes after it has lost its job changes nothing."""

    @pytest.fixture
    def zombie(self, store):
        """A job that a second attempt has taken over, and the attempt that does not know it yet."""
        job, attempt = running(store)
        claim(store, job, "worker-2", liveness=Liveness.DEAD)
        return job, attempt

    def test_an_old_attempt_does_not_own_the_job(self, store, zombie):
        job, attempt = zombie

        assert not store.owns(job.job_id, attempt)
        assert not store.owns(job.job_id, attempt + 1)
        assert store.owns(job.job_id, attempt + 2)

    @pytest.mark.parametrize(
        "write",
        [
            lambda store, job, attempt: store.progress(job.job_id, attempt, percent=50.0),
            lambda store, job, attempt: store.complete(job.job_id, attempt, {"output": "late"}),
            lambda store, job, attempt: store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=attempt)),
            lambda store, job, attempt: store.end(job.job_id, Status.CANCELLED, LOST, fence=Fence(attempt=attempt)),
            lambda store, job, attempt: store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1),
            lambda store, job, attempt: store.close(job.job_id, attempt, reason="late"),
        ],
        ids=["progress", "complete", "fail", "cancel", "requeue", "close"],
    )
    def test_a_late_write_changes_nothing(self, store, zombie, write):
        job, attempt = zombie
        before, events = row_of(store, job), events_of(store, job)

        assert not write(store, job, attempt)

        assert row_of(store, job) == before
        assert events_of(store, job) == events

    def test_an_end_by_message_is_fenced_by_its_publication(self, store):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)

        assert not store.end(job.job_id, Status.FAILED, LOST, fence=Fence(publication=1, may_run=True))
        assert row_of(store, job)["status"] == "queued"
        assert store.end(job.job_id, Status.FAILED, LOST, fence=Fence(publication=2, may_run=True))

    def test_an_end_by_a_message_that_waits_leaves_a_running_attempt_alone(self, store):
        job, attempt = running(store)

        assert not store.end(job.job_id, Status.FAILED, LOST, fence=Fence(publication=1))
        assert store.owns(job.job_id, attempt)
        assert store.end(job.job_id, Status.FAILED, LOST, fence=Fence(publication=1, may_run=True))

    def test_an_attempt_whose_row_is_gone_leaves_no_row(self, store):
        job = new_job()

        assert not store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=2), unknown=lambda: job)
        assert not store.complete(job.job_id, 2, {})

        assert store.job(job.job_id) is None

    def test_progress_of_a_job_that_has_ended_changes_nothing(self, store):
        job, attempt = running(store)
        store.complete(job.job_id, attempt, {})

        assert not store.progress(job.job_id, attempt, percent=10.0)
        assert row_of(store, job)["progress"] == 100.0

    def test_progress_does_not_fall_within_an_attempt_and_begins_anew_with_the_next(self, store):
        job, attempt = running(store)

        store.progress(job.job_id, attempt, percent=60.0, stage="encode")
        assert store.progress(job.job_id, attempt, percent=20.0, stage="again")
        assert (row_of(store, job)["progress"], row_of(store, job)["stage"]) == (60.0, "again")

        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)
        again = claim(store, job, publication=2).attempt
        store.progress(job.job_id, again, percent=20.0)
        assert row_of(store, job)["progress"] == 20.0


class TestEnds:
    def test_a_completed_job_holds_its_result(self, store):
        job, attempt = running(store, "worker-7")

        assert store.complete(job.job_id, attempt, {"output": "out.webp", "size_bytes": 7})

        row = row_of(store, job)
        assert (row["status"], row["progress"]) == ("completed", 100.0)
        assert row["result_data"] == {"output": "out.webp", "size_bytes": 7}
        assert row["completed_at"] >= row["started_at"]
        assert events_of(store, job)[-1] == "completed"
        assert store.logs(job.job_id)[-1]["worker_id"] == "worker-7"

    @pytest.mark.parametrize("result", [None, 0, "", [], False, "text", 1.5])
    def test_any_result_comes_back_as_it_was(self, store, result):
        job, attempt = running(store)

        store.complete(job.job_id, attempt, result)

        assert row_of(store, job)["result_data"] == result

    def test_completing_again_is_true_and_logged_once(self, store):
        job, attempt = running(store)

        assert store.complete(job.job_id, attempt, {"output": "a"})
        assert store.complete(job.job_id, attempt, {"output": "a"})

        assert events_of(store, job).count("completed") == 1

    @pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
    def test_ending_again_is_true_and_logged_once(self, store, status):
        job, attempt = running(store)

        assert store.end(job.job_id, status, LOST, fence=Fence(attempt=attempt))
        assert store.end(job.job_id, status, LOST, fence=Fence(attempt=attempt))

        assert events_of(store, job).count(status.value) == 1

    def test_an_end_never_overwrites_another(self, store):
        job, attempt = running(store)
        store.complete(job.job_id, attempt, {"output": "a"})

        assert not store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=attempt))
        assert not store.end(job.job_id, Status.CANCELLED, LOST)
        assert store.replay(job.job_id) is None

        assert events_of(store, job)[-1] == "completed"

    def test_a_failure_says_why(self, store):
        job, attempt = running(store)
        failure = Failure(
            error_type="CorruptMedia", error_message="in.jpg ends early", error_module="m", details={"traceback": "..."}
        )

        store.end(job.job_id, Status.FAILED, failure, fence=Fence(attempt=attempt))

        row, log = row_of(store, job), store.logs(job.job_id)[-1]
        assert (row["error_type"], row["error_message"], row["error_module"]) == (
            "CorruptMedia",
            "in.jpg ends early",
            "m",
        )
        assert (log["message"], log["details"]) == ("CorruptMedia: in.jpg ends early", {"traceback": "..."})

    def test_a_failure_may_name_files_that_are_no_text(self, store):
        job, attempt = running(store)
        store.progress(job.job_id, attempt, percent=1.0, stage="x" * 300 + "\udcff")
        failure = Failure(error_type="E" * 300, error_message="photo\udcff.jpg\x00 is broken")

        assert store.end(job.job_id, Status.FAILED, failure, fence=Fence(attempt=attempt))

        row = row_of(store, job)
        assert row["error_message"] == "photo\\udcff.jpg\\0 is broken"
        assert (row["stage"], row["error_type"]) == ("x" * 255, "E" * 255)

    @pytest.mark.parametrize("publication", [None, 1, 4])
    def test_a_job_without_a_row_gets_one_that_has_ended(self, store, publication):
        job = new_job()

        fence = Fence(publication=publication, may_run=True)
        assert store.end(job.job_id, Status.FAILED, LOST, fence=fence, unknown=lambda: job)

        assert row_of(store, job)["publication"] == (publication or 1)
        assert events_of(store, job) == ["created", "failed"]

    def test_a_job_without_a_row_stays_unknown_if_nobody_tells_of_it(self, store):
        job = new_job()

        assert not store.end(job.job_id, Status.FAILED, LOST)

        assert store.job(job.job_id) is None

    def test_the_row_of_a_job_is_made_only_where_there_is_none(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.end(job.job_id, Status.FAILED, LOST, unknown=lambda: pytest.fail("it has a row"))

    def test_a_queued_job_can_be_cancelled_and_never_starts(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.end(job.job_id, Status.CANCELLED, Failure(error_type="TaskRevokedError", error_message="revoked"))

        assert claim(store, job).decision is Decision.CANCELLED
        assert events_of(store, job) == ["created", "cancelled"]

    @pytest.mark.parametrize("attempt", [None, 1])
    def test_after_a_lost_commit_the_same_end_is_true_and_logged_once(self, store, lose_commit, unavailable, attempt):
        job, _attempt = running(store)
        lose_commit()
        with unavailable:
            store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=attempt))

        assert store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=attempt))

        assert events_of(store, job).count("failed") == 1
        assert store.end(job.job_id, Status.FAILED, LOST) is False  # somebody else's

    def test_after_a_lost_commit_completing_is_true_and_logged_once(self, store, lose_commit, unavailable):
        job, attempt = running(store)
        lose_commit()
        with unavailable:
            store.complete(job.job_id, attempt, {})

        assert store.complete(job.job_id, attempt, {})

        assert events_of(store, job).count("completed") == 1


def test_every_change_of_a_job_says_when_its_row_was_written(store):
    job = new_job()

    def requeue():
        store.requeue(job.job_id, attempt=row_of(store, job)["attempt"], event="retry", retry_count=1)

    def claim_again():
        claim(store, job, publication=row_of(store, job)["publication"])

    def close():
        store.close(job.job_id, row_of(store, job)["attempt"], reason="its worker died")

    steps = {
        "created": lambda: store.enqueue(job),
        "republished": lambda: store.republish(job.job_id, 1, "its message was lost"),
        "started": claim_again,
        "retry": requeue,
        "started again": claim_again,
        "lost": close,
        "failed": lambda: store.end(job.job_id, Status.FAILED, LOST),
        "replayed": lambda: store.replay(job.job_id),
        "started once more": claim_again,
        "completed": lambda: store.complete(job.job_id, row_of(store, job)["attempt"], {}),
    }
    for name, step in steps.items():
        before = now()
        step()
        assert before <= row_of(store, job)["updated_at"] <= now(), name
    assert row_of(store, job)["status"] == "completed"


class TestAgain:
    def test_a_retry_is_queued_under_the_next_publication(self, store):
        job, attempt = running(store, priority=9)
        store.progress(job.job_id, attempt, percent=60.0, stage="encode")

        publication = store.requeue(
            job.job_id, attempt=attempt, event="retry", retry_count=1, run_after_utc=WHEN, failure=LOST
        )

        assert publication == Publication(2, 9, is_resting=True, has_begun=True)
        row = row_of(store, job)
        assert (row["status"], row["retry_count"], row["run_after_utc"]) == ("queued", 1, WHEN)
        assert (row["error_type"], row["attempt"], row["published_at"]) == ("WorkerLost", attempt, None)
        assert (row["progress"], row["stage"]) == (0.0, None)
        assert not store.owns(job.job_id, attempt)
        assert events_of(store, job)[-1] == "retry"
        assert store.logs(job.job_id)[-1]["details"] == {"retry_count": 1, "run_after_utc": WHEN.isoformat()}

    def test_a_retry_at_once_does_not_rest(self, store):
        job, attempt = running(store)
        before = now()

        assert store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1) == Publication(
            2, 5, has_begun=True
        )

        row = row_of(store, job)
        assert row["run_after_utc"] is None
        assert row["published_at"] >= before

    def test_a_second_requeue_of_an_attempt_comes_too_late(self, store):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)

        assert store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1) is None

        assert row_of(store, job)["publication"] == 2

    @pytest.mark.parametrize("run_after_utc", [None, WHEN])
    def test_after_a_lost_commit_the_same_requeue_gives_its_publication(
        self, store, lose_commit, unavailable, run_after_utc
    ):
        job, attempt = running(store)
        lose_commit()
        with unavailable:
            store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1, run_after_utc=run_after_utc)

        again = store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1, run_after_utc=run_after_utc)

        assert again == Publication(2, 5, is_resting=run_after_utc is not None, has_begun=True)
        assert events_of(store, job).count("retry") == 1

    def test_a_completed_retry_forgets_the_error(self, store):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1, failure=LOST)

        store.complete(job.job_id, claim(store, job, publication=2).attempt, {})

        row = row_of(store, job)
        assert (row["error_type"], row["error_message"], row["retry_count"]) == (None, None, 1)

    @pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
    def test_a_dead_letter_can_be_replayed_as_new(self, store, status):
        job, _attempt = running(store)
        taken = claim(store, job, liveness=Liveness.DEAD)
        store.progress(job.job_id, taken.attempt, percent=30.0, stage="encoding")
        store.end(job.job_id, status, LOST, fence=Fence(attempt=taken.attempt))

        assert store.replay(job.job_id) == Publication(2, 5)

        row = row_of(store, job)
        assert (row["status"], row["deaths"], row["retry_count"], row["progress"]) == ("queued", 0, 0, 0.0)
        assert (row["error_type"], row["completed_at"], row["stage"]) == (None, None, None)
        assert events_of(store, job)[-1] == "replayed"
        assert claim(store, job, publication=2).attempt == taken.attempt + 1

    def test_only_a_dead_letter_can_be_replayed(self, store):
        queued = new_job()
        store.enqueue(queued)
        active, _attempt = running(store)

        assert [store.replay(job_id) for job_id in (queued.job_id, active.job_id, "unknown")] == [None, None, None]

    def test_after_a_lost_commit_the_same_replay_gives_its_publication(self, store, lose_commit, unavailable):
        job, attempt = running(store)
        store.end(job.job_id, Status.FAILED, LOST, fence=Fence(attempt=attempt))
        lose_commit()
        with unavailable:
            store.replay(job.job_id)

        assert store.replay(job.job_id) == Publication(2, 5)

        assert events_of(store, job).count("replayed") == 1
