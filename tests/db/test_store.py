"""One suite that the store has to pass on every database: enqueue, claim, fences, ends, and what can be read."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest

from db.records import PENDING, Decision, Failure, Heartbeat, Holder, Liveness, Publication, Status, now
from db.store.attempts import SUSPECT_DELIVERIES
from tests.db.conftest import claim, events_of, new_job, open_database, row_of, running

WHEN = datetime(2026, 3, 29, 1, 30, 15, 123456, tzinfo=UTC)
LOST = Failure(error_type="WorkerLost", error_message="three workers died", error_module="tasks.errors")


def beat(worker_id="worker-1", **values):
    defaults = {
        "hostname": "host",
        "pid": 1,
        "capabilities": ["image_resize"],
        "concurrency": 2,
        "status": "idle",
        "started_at": WHEN,
    }
    return Heartbeat(worker_id=worker_id, **{**defaults, **values})


class TestEnqueue:
    def test_a_new_job_is_queued_under_its_first_publication(self, store):
        job = new_job(priority=8)
        before = now()

        assert store.enqueue(job) == Publication(1, 8)

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["attempt"], row["deaths"]) == ("queued", 1, 0, 0)
        assert (row["progress"], row["retry_count"], row["claimed_by"]) == (0.0, 0, None)
        assert before <= row["created_at"] == row["updated_at"] == row["published_at"] <= now()
        assert events_of(store, job) == ["created"]

    def test_every_value_of_a_job_is_kept(self, store):
        job = new_job(
            parameters={"width": 800, "names": ["ü", "日本", "\N{SLIGHTLY SMILING FACE}", 'q"\\'], "none": None},
            priority=10,
            max_retries=2,
            retry_count=1,
            run_after_utc=WHEN,
            expires_at=WHEN + timedelta(days=1),
            root_id="root",
            parent_id="parent",
            group_id="group",
            group_index=4,
            in_chord=True,
            sequel=PENDING,
            unique_key="resize of in.jpg",
            unique_until=WHEN + timedelta(hours=1),
            message={"args": [1.5, True], "kwargs": {"nested": {"deep": [{}]}}},
        )

        store.enqueue(job)

        row = row_of(store, job)
        assert {name: row[name] for name in job.__slots__} == {name: getattr(job, name) for name in job.__slots__}

    def test_documents_keep_the_types_that_celery_sends(self, store):
        parameters = {
            "at": WHEN,
            "id": UUID("12345678-1234-5678-1234-567812345678"),
            "big": 2**70,
            "text": "line\n\ttab \u2028 \x00",
        }
        job = new_job(parameters=parameters)

        store.enqueue(job)
        attempt = claim(store, job).attempt
        store.complete(job.job_id, attempt, {"outputs": [parameters]})

        row = row_of(store, job)
        assert row["parameters"] == parameters
        assert row["result_data"] == {"outputs": [parameters]}

    def test_a_known_id_is_left_as_it_is(self, store):
        job = new_job(priority=3)
        store.enqueue(job)

        assert store.enqueue(new_job(job.job_id, priority=9, queue="other")) is None

        row = row_of(store, job)
        assert (row["priority"], row["queue"]) == (3, "image_resize")
        assert events_of(store, job) == ["created"]

    def test_times_come_back_in_utc_whatever_zone_they_went_in_with(self, store):
        job = new_job(run_after_utc=WHEN.astimezone(timezone(timedelta(hours=5, minutes=30))))

        store.enqueue(job)

        row = row_of(store, job)
        assert row["run_after_utc"] == WHEN
        assert row["run_after_utc"].utcoffset() == row["created_at"].utcoffset() == timedelta(0)
        assert store.logs(job.job_id)[0]["created_at"].utcoffset() == timedelta(0)

    def test_after_a_lost_commit_the_same_call_finds_its_own_row(self, store, lose_commit, unavailable):
        job = new_job(priority=7)
        lose_commit()
        with unavailable:
            store.enqueue(job)

        assert store.enqueue(job) == Publication(1, 7)

        assert store.enqueue(job) is None
        assert events_of(store, job) == ["created"]


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
                make,
                job_id=job.job_id,
                publication=1,
                worker_id="worker-1",
                lease=None,
                is_loss=False,
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
        lost = claim(store, job, publication=publication, is_loss=True, liveness=Liveness.DEAD)
        assert lost.decision is Decision.STALE

        assert row_of(store, job)["status"] == "queued"
        assert claim(store, job, publication=2).attempt == 2

    def test_a_stale_message_does_not_take_a_running_job(self, store):
        job, attempt = running(store)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)
        claim(store, job, publication=2)

        stale = claim(store, job, publication=1, is_loss=True, liveness=Liveness.DEAD)

        assert stale.decision is Decision.STALE
        assert row_of(store, job)["attempt"] == 2

    @pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
    def test_a_job_that_has_ended_is_not_run_again(self, store, status):
        job, attempt = running(store)
        if status is Status.COMPLETED:
            store.complete(job.job_id, attempt, {})
        else:
            store.end(job, status, LOST, attempt=attempt)
        before = row_of(store, job)

        for is_loss in (False, True):
            claimed = claim(store, job, "worker-2", is_loss=is_loss, liveness=Liveness.DEAD)
            assert claimed.decision == Decision(status.value)

        assert row_of(store, job) == before
        assert events_of(store, job) == ["created", "claimed", "started", status.value]

    @pytest.mark.parametrize(
        ("liveness", "is_loss"),
        [(Liveness.ALIVE, False), (Liveness.ALIVE, True), (Liveness.UNCERTAIN, False)],
        ids=["alive", "alive though redelivered", "uncertain"],
    )
    def test_a_worker_that_is_not_known_to_be_dead_holds_its_job(self, store, liveness, is_loss):
        job, attempt = running(store, "worker-1")
        before = row_of(store, job)

        held = claim(store, job, "worker-2", liveness=liveness, is_loss=is_loss)

        assert (held.decision, held.holder) == (Decision.HELD, "worker-1")
        assert row_of(store, job) == before
        assert store.owns(job.job_id, attempt)

    @pytest.mark.parametrize("is_loss", [False, True])
    def test_a_job_of_a_dead_worker_is_taken_over(self, store, is_loss):
        job, attempt = running(store, "worker-1")

        taken = claim(store, job, "worker-2", liveness=Liveness.DEAD, is_loss=is_loss)

        assert (taken.decision, taken.attempt, taken.deaths) == (Decision.RUN, attempt + 2, 1)
        assert taken.holder == "worker-1"
        row = row_of(store, job)
        assert (row["claimed_by"], row["deaths"], row["deliveries"], row["publication"]) == ("worker-2", 1, 2, 1)
        assert events_of(store, job) == ["created", "claimed", "started", "lost", "claimed", "started"]
        lost = store.logs(job.job_id)[3]
        assert (lost["worker_id"], lost["details"]) == ("worker-1", {"attempt": 1, "deaths": 1})

    def test_a_redelivered_message_takes_over_from_a_worker_that_can_t_be_looked_at(self, store):
        job, attempt = running(store, "worker-1")

        taken = claim(store, job, "worker-2", liveness=Liveness.UNCERTAIN, is_loss=True)

        assert (taken.decision, taken.attempt, taken.deaths) == (Decision.RUN, attempt + 2, 0)
        assert taken.holder == "worker-1"
        assert row_of(store, job)["claimed_by"] == "worker-2"
        assert events_of(store, job) == ["created", "claimed", "started", "lost", "claimed", "started"]
        lost = store.logs(job.job_id)[3]
        assert (lost["worker_id"], lost["details"]) == ("worker-1", {"attempt": 1, "deaths": 0})

    def test_a_lease_without_a_row_is_dead_and_nobody_is_asked(self, store):
        job = new_job()
        store.enqueue(job)
        asked = []
        claim(store, job, "worker-1", lease="never renewed")

        taken = claim(store, job, "worker-2", judge=asked.append)

        assert (taken.decision, taken.attempt, taken.deaths) == (Decision.RUN, 3, 1)
        assert asked == []

    def test_an_attempt_without_a_lease_is_uncertain(self, store):
        job = new_job()
        store.enqueue(job)
        claim(store, job, "worker-1", lease=None)

        assert claim(store, job, "worker-2", liveness=Liveness.DEAD).decision is Decision.HELD
        taken = claim(store, job, "worker-2", liveness=Liveness.DEAD, is_loss=True)
        assert (taken.decision, taken.deaths) == (Decision.RUN, 0)

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
        assert store.end(job, Status.FAILED, LOST, attempt=7)
        assert events_of(store, job)[-3:] == ["claimed", "started", "failed"]

    def test_a_message_that_comes_back_again_and_again_is_poison_in_the_end(self, store):
        job, _attempt = running(store)

        claims = [claim(store, job, liveness=Liveness.UNCERTAIN, is_loss=True) for _ in range(SUSPECT_DELIVERIES + 2)]

        assert [claimed.deaths for claimed in claims] == [0] * (SUSPECT_DELIVERIES - 1) + [1, 2, 3]
        assert {claimed.decision for claimed in claims[:-1]} == {Decision.RUN}
        assert claims[-1].decision is Decision.POISON

    def test_a_suspect_message_is_still_held_by_the_living(self, store):
        job, _attempt = running(store)
        for _ in range(SUSPECT_DELIVERIES):
            claim(store, job, liveness=Liveness.UNCERTAIN, is_loss=True)
        before = row_of(store, job)

        assert claim(store, job, is_loss=True).decision is Decision.HELD
        assert claim(store, job, liveness=Liveness.UNCERTAIN).decision is Decision.HELD

        assert row_of(store, job) == before

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
            lambda store, job, attempt: store.end(job, Status.FAILED, LOST, attempt=attempt),
            lambda store, job, attempt: store.end(job, Status.CANCELLED, LOST, attempt=attempt),
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

        assert not store.end(job, Status.FAILED, LOST, publication=1)
        assert row_of(store, job)["status"] == "queued"
        assert store.end(job, Status.FAILED, LOST, publication=2)

    def test_an_attempt_whose_row_is_gone_leaves_no_row(self, store):
        job = new_job()

        assert not store.end(job, Status.FAILED, LOST, attempt=2)
        assert not store.complete(job.job_id, 2, {})

        assert store.job(job.job_id) is None

    def test_progress_of_a_job_that_has_ended_changes_nothing(self, store):
        job, attempt = running(store)
        store.complete(job.job_id, attempt, {})

        assert not store.progress(job.job_id, attempt, percent=10.0)
        assert row_of(store, job)["progress"] == 100.0


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

        assert store.end(job, status, LOST, attempt=attempt)
        assert store.end(job, status, LOST, attempt=attempt)

        assert events_of(store, job).count(status.value) == 1

    def test_an_end_never_overwrites_another(self, store):
        job, attempt = running(store)
        store.complete(job.job_id, attempt, {"output": "a"})

        assert not store.end(job, Status.FAILED, LOST, attempt=attempt)
        assert not store.end(job, Status.CANCELLED, LOST)
        assert store.replay(job.job_id) is None

        assert events_of(store, job)[-1] == "completed"

    def test_a_failure_says_why(self, store):
        job, attempt = running(store)
        failure = Failure(
            error_type="CorruptMedia", error_message="in.jpg ends early", error_module="m", details={"traceback": "..."}
        )

        store.end(job, Status.FAILED, failure, attempt=attempt)

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

        assert store.end(job, Status.FAILED, failure, attempt=attempt)

        row = row_of(store, job)
        assert row["error_message"] == "photo\\udcff.jpg\\0 is broken"
        assert (row["stage"], row["error_type"]) == ("x" * 255, "E" * 255)

    @pytest.mark.parametrize("publication", [None, 1, 4])
    def test_a_job_without_a_row_gets_one_that_has_ended(self, store, publication):
        job = new_job()

        assert store.end(job, Status.FAILED, LOST, publication=publication)

        assert row_of(store, job)["publication"] == publication or publication is None
        assert events_of(store, job) == ["created", "failed"]

    def test_a_queued_job_can_be_cancelled_and_never_starts(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.end(job, Status.CANCELLED, Failure(error_type="TaskRevokedError", error_message="revoked"))

        assert claim(store, job).decision is Decision.CANCELLED
        assert events_of(store, job) == ["created", "cancelled"]

    @pytest.mark.parametrize("attempt", [None, 1])
    def test_after_a_lost_commit_the_same_end_is_true_and_logged_once(self, store, lose_commit, unavailable, attempt):
        job, _attempt = running(store)
        lose_commit()
        with unavailable:
            store.end(job, Status.FAILED, LOST, attempt=attempt)

        assert store.end(job, Status.FAILED, LOST, attempt=attempt)

        assert events_of(store, job).count("failed") == 1
        assert store.end(job, Status.FAILED, LOST) is False  # somebody else's

    def test_after_a_lost_commit_completing_is_true_and_logged_once(self, store, lose_commit, unavailable):
        job, attempt = running(store)
        lose_commit()
        with unavailable:
            store.complete(job.job_id, attempt, {})

        assert store.complete(job.job_id, attempt, {})

        assert events_of(store, job).count("completed") == 1


class TestAgain:
    def test_a_retry_is_queued_under_the_next_publication(self, store):
        job, attempt = running(store, priority=9)

        publication = store.requeue(
            job.job_id, attempt=attempt, event="retry", retry_count=1, run_after_utc=WHEN, failure=LOST
        )

        assert publication == Publication(2, 9, is_resting=True)
        row = row_of(store, job)
        assert (row["status"], row["retry_count"], row["run_after_utc"]) == ("queued", 1, WHEN)
        assert (row["error_type"], row["attempt"], row["published_at"]) == ("WorkerLost", attempt, None)
        assert not store.owns(job.job_id, attempt)
        assert events_of(store, job)[-1] == "retry"
        assert store.logs(job.job_id)[-1]["details"] == {"retry_count": 1, "run_after_utc": WHEN.isoformat()}

    def test_a_retry_at_once_does_not_rest(self, store):
        job, attempt = running(store)
        before = now()

        assert store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1) == Publication(2, 5)

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

        assert again == Publication(2, 5, is_resting=run_after_utc is not None)
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
        store.end(job, status, LOST, attempt=taken.attempt)

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
        store.end(job, Status.FAILED, LOST, attempt=attempt)
        lose_commit()
        with unavailable:
            store.replay(job.job_id)

        assert store.replay(job.job_id) == Publication(2, 5)

        assert events_of(store, job).count("replayed") == 1


class TestGroups:
    def chord(self, store, size):
        jobs = [new_job(group_id="g", group_index=index, in_chord=True) for index in reversed(range(size))]
        for job in jobs:
            store.enqueue(job)
        return jobs

    def complete(self, store, job):
        store.complete(job.job_id, claim(store, job).attempt, job.group_index)
        return store.chord_parts("g", None)

    def test_the_members_of_a_group_are_kept_until_forgotten(self, store):
        members = ["group", [["a", None], ["b", None]]]

        store.save_group("group", members)
        assert store.group("group") == members
        store.forget_group("group")

        assert store.group("group") is None
        assert store.group("unknown") is None

    def test_the_last_member_publishes_the_body_with_the_results_in_order(self, store):
        jobs = self.chord(store, 4)
        store.save_group("g", ["kept"])
        store.set_chord_size("g", 4)

        parts = [self.complete(store, job) for job in jobs]

        assert [part.is_mine for part in parts] == [False, False, False, True]
        assert list(parts[-1].results) == [0, 1, 2, 3]
        assert not parts[-1].is_failed
        assert store.group("g") == ["kept"]

    def test_the_body_is_published_once_however_often_members_are_delivered(self, store):
        jobs = self.chord(store, 2)
        store.set_chord_size("g", 2)
        assert [self.complete(store, job).is_mine for job in jobs] == [False, True]

        again = store.chord_parts("g", None)

        assert (again.is_mine, again.is_failed) == (False, False)

    def test_a_chord_waits_for_members_that_are_not_sent_yet(self, store):
        jobs = self.chord(store, 2)

        assert not any(self.complete(store, job).is_mine for job in jobs)
        store.set_chord_size("g", 3)
        assert not store.chord_parts("g", None).is_mine
        late = new_job(group_id="g", group_index=2, in_chord=True)
        store.enqueue(late)

        assert list(self.complete(store, late).results) == [0, 1, 2]

    def test_the_size_may_come_with_the_message(self, store):
        for job in self.chord(store, 2):
            self.complete(store, job)

        assert store.chord_parts("g", 2).is_mine

    def test_jobs_of_a_plain_group_do_not_count(self, store):
        (job,) = self.chord(store, 1)
        store.enqueue(new_job(group_id="g", in_chord=False))
        store.set_chord_size("g", 1)

        assert self.complete(store, job).is_mine

    @pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
    def test_the_first_failed_member_fails_the_chord_once(self, store, status):
        first, second, third = self.chord(store, 3)
        store.set_chord_size("g", 3)
        self.complete(store, first)
        store.end(second, status, LOST, attempt=claim(store, second).attempt)

        parts = [store.chord_parts("g", None), self.complete(store, third)]

        assert [(part.is_mine, part.is_failed) for part in parts] == [(True, True), (False, True)]
        assert parts[0].results is None

    def test_after_a_lost_commit_the_same_call_still_publishes_the_body(self, store, lose_commit, unavailable):
        (job,) = self.chord(store, 1)
        store.set_chord_size("g", 1)
        store.complete(job.job_id, claim(store, job).attempt, "result")
        lose_commit()
        with unavailable:
            store.chord_parts("g", None)

        again = store.chord_parts("g", None)

        assert (again.is_mine, list(again.results)) == (True, ["result"])
        assert not store.chord_parts("g", None).is_mine


class TestWorkers:
    def test_a_worker_shows_its_newest_state(self, store):
        store.heartbeat(beat("worker-1"))
        newest = {"current_tasks": ("a",), "reserved_tasks": ("b", "c"), "tasks_processed": 3, "lease": "lease-1"}
        store.heartbeat(beat("worker-1", status="busy", strategy="*=LIFO", **newest))

        (row,) = store.workers()
        assert (row["reserved_tasks"], row["lease"]) == (["b", "c"], "lease-1")
        assert (row["status"], row["current_tasks"], row["tasks_processed"]) == ("busy", ["a"], 3)
        assert (row["strategy"], row["capabilities"], row["started_at"]) == ("*=LIFO", ["image_resize"], WHEN)
        assert now() - row["last_heartbeat"] < timedelta(seconds=10)

    def test_live_workers_have_been_heard_of_and_have_not_stopped(self, store):
        store.heartbeat(beat("alive"))
        store.heartbeat(beat("stopped", status="stopped"))

        assert [row["worker_id"] for row in store.workers()] == ["alive", "stopped"]
        assert [row["worker_id"] for row in store.workers(heard_within_s=15.0)] == ["alive"]
        assert store.workers(heard_within_s=-1.0) == []

    def test_changes_that_belong_to_no_job_are_logged(self, store):
        store.log_worker("worker-1", "started", "worker started", {"pid": 1})
        store.log_worker("worker-1", "stopped", "worker stopped")

        with store.database.reading() as connection:
            rows = connection.exec_driver_sql(
                "SELECT job_id, worker_id, event_type, message FROM task_logs ORDER BY id"
            ).all()
        assert [tuple(row) for row in rows] == [
            (None, "worker-1", "started", "worker started"),
            (None, "worker-1", "stopped", "worker stopped"),
        ]


class TestReading:
    def test_unknown_jobs_have_no_rows(self, store):
        assert store.job("unknown") is None
        assert store.jobs_by_id(["unknown"]) == []
        assert store.jobs_by_id([]) == []
        assert store.logs("unknown") == []

    def test_many_rows_are_found_by_their_ids(self, store):
        jobs = [new_job() for _ in range(3)]
        for job in jobs:
            store.enqueue(job)
        ids = [job.job_id for job in jobs]

        found = store.jobs_by_id([*ids, *(f"unknown-{number}" for number in range(40_000))])

        assert sorted(row["job_id"] for row in found) == sorted(ids)

    def test_jobs_are_listed_newest_first_and_filtered(self, store):
        first, second, third = (new_job(task_type=name) for name in ("image_resize", "image_resize", "video_probe"))
        for job in (first, second, third):
            store.enqueue(job)
        claim(store, second)

        def listed(**filters):
            return [row["job_id"] for row in store.jobs(**filters)]

        assert listed() == [third.job_id, second.job_id, first.job_id]
        assert listed(limit=1) == [third.job_id]
        assert listed(status=Status.QUEUED) == [third.job_id, first.job_id]
        assert listed(task_type="image_resize") == [second.job_id, first.job_id]
        assert listed(task_type="image_resize", status=Status.RUNNING) == [second.job_id]

    def test_jobs_are_found_by_the_beginning_of_their_ids(self, store):
        for job_id in ("ab-1", "ab-2", "AB-3", "ab", "a", "abc%", "ab_", "b-ab", "ab\U0001f600", "äb"):
            store.enqueue(new_job(job_id))

        def found(prefix):
            return {row["job_id"] for row in store.jobs(id_prefix=prefix)}

        assert found("ab-") == {"ab-1", "ab-2"}
        assert found("ab") == {"ab-1", "ab-2", "ab", "abc%", "ab_", "ab\U0001f600"}
        assert found("abc%") == {"abc%"}
        assert found("ä") == {"äb"}
        assert found("nothing") == set()

    def test_jobs_are_counted_by_task_and_status(self, store):
        for task_type in ("image_resize", "image_resize", "video_probe"):
            store.enqueue(new_job(task_type=task_type))
        claim(store, new_job(task_type="video_probe"))

        assert store.counts() == {"image_resize": {"queued": 2}, "video_probe": {"queued": 1, "running": 1}}

    def test_what_has_not_ended_is_counted_by_queue_and_status(self, store):
        assert store.queue_counts() == {}
        for queue in ("image_resize", "image_resize", "video_probe"):
            store.enqueue(new_job(queue=queue))
        store.enqueue(new_job(queue="video_probe"), is_resting=True)
        running(store, queue="video_probe")
        done, attempt = running(store, queue="image_conversion")
        store.complete(done.job_id, attempt, {})
        store.end(new_job(), Status.CANCELLED, LOST)

        assert store.queue_counts() == {"image_resize": {"queued": 2}, "video_probe": {"queued": 2, "running": 1}}

    def test_jobs_ahead_are_those_that_are_claimed_before(self, store):
        jobs = [new_job(priority=priority) for priority in (5, 9, 5, 1, 5)]
        for job in jobs:
            store.enqueue(job)

        def ahead(job):
            row = row_of(store, job)
            return store.jobs_ahead(row["queue"], row["priority"], row["id"])

        assert [ahead(job) for job in jobs] == [1, 0, 2, 4, 3]
        claim(store, jobs[1])
        store.end(jobs[0], Status.CANCELLED, LOST)
        assert [ahead(job) for job in jobs[2:]] == [0, 2, 1]

    def test_jobs_of_other_queues_and_jobs_that_rest_are_not_ahead(self, store):
        store.enqueue(new_job(queue="video_probe", priority=10))
        store.enqueue(new_job(priority=10), is_resting=True)
        job = new_job()
        store.enqueue(job)

        assert store.jobs_ahead(job.queue, job.priority, row_of(store, job)["id"]) == 0

    def test_another_process_s_store_sees_it_at_once(self, store):
        job = new_job()
        other = type(store)(open_database(store.database.url.render_as_string(hide_password=False)))
        try:
            assert other.job(job.job_id) is None
            store.enqueue(job)

            assert other.job(job.job_id) is not None
        finally:
            other.database.close()


class TestViews:
    def rows(self, store, view):
        with store.database.reading() as connection:
            return [dict(row) for row in connection.exec_driver_sql(f"SELECT * FROM {view}").mappings()]

    def test_active_tasks_show_how_long_jobs_wait_and_run(self, store):
        queued = new_job()
        store.enqueue(queued)
        active, attempt = running(store)
        done, done_attempt = running(store)
        store.complete(done.job_id, done_attempt, {})
        store.progress(active.job_id, attempt, percent=25.0, stage="encoding")

        rows = {row["job_id"]: row for row in self.rows(store, "v_active_tasks")}

        assert set(rows) == {queued.job_id, active.job_id}
        assert rows[queued.job_id]["running_s"] is None
        assert 0 <= rows[queued.job_id]["waited_s"] < 60
        assert 0 <= rows[active.job_id]["waited_s"] < 60
        assert -0.01 < rows[active.job_id]["running_s"] < 60
        assert (rows[active.job_id]["progress"], rows[active.job_id]["stage"]) == (25.0, "encoding")

    def test_worker_status_shows_silence_and_load(self, store):
        store.heartbeat(beat("worker-1"))
        store.heartbeat(beat("worker-2"))
        running(store, "worker-1")
        done, attempt = running(store, "worker-1")
        store.complete(done.job_id, attempt, {})

        rows = {row["worker_id"]: row for row in self.rows(store, "v_worker_status")}

        assert {name: row["active_tasks"] for name, row in rows.items()} == {"worker-1": 1, "worker-2": 0}
        assert all(-0.01 < row["silent_s"] < 60 for row in rows.values())

    def test_task_stats_sum_up_each_task_and_status(self, store):
        for _ in range(2):
            job, attempt = running(store)
            store.complete(job.job_id, attempt, {})
        taken, _attempt = running(store)
        claim(store, taken, liveness=Liveness.DEAD)

        rows = {(row["task_type"], row["status"]): row for row in self.rows(store, "v_task_stats")}

        assert rows["image_resize", "completed"]["jobs"] == 2
        assert (
            0 <= rows["image_resize", "completed"]["avg_run_s"] <= rows["image_resize", "completed"]["max_run_s"] < 60
        )
        assert rows["image_resize", "running"]["deaths"] == 1
