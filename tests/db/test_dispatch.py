"""Which queued jobs need a message: those that rest until they are due, those whose message is lost, those expired."""

import threading
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest

from db.records import Decision, Failure, Publication, Status, now
from tests.db.conftest import claim, events_of, new_job, row_of, running
from tests.db.processes import in_processes

SOON = timedelta(hours=1)
FAILURE = Failure(error_type="E", error_message="m")


def rest(store, job_id=None, *, due_in_s=-1.0, **values):
    """A job that rests, due `due_in_s` from now."""
    job = new_job(job_id, run_after_utc=now() + timedelta(seconds=due_in_s), **values)
    store.enqueue(job, is_resting=True)
    return job


def ids(rows):
    return [row["job_id"] for row in rows]


class TestResting:
    def test_a_resting_job_is_not_published_yet(self, store):
        job = new_job(priority=7, run_after_utc=now() + SOON)

        assert store.enqueue(job, is_resting=True) == Publication(1, 7, is_resting=True)

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["published_at"]) == ("queued", 1, None)
        assert row["run_after_utc"] == job.run_after_utc
        assert events_of(store, job) == ["created"]

    def test_one_without_a_time_is_due_at_once(self, store):
        job = new_job()
        store.enqueue(job, is_resting=True)

        row = row_of(store, job)
        assert abs(row["run_after_utc"] - row["created_at"]) < timedelta(seconds=5)  # each by its own clock
        assert ids(store.take_due(10)) == [job.job_id]

    def test_a_known_id_is_left_as_it_is(self, store):
        job = new_job()
        store.enqueue(job)
        before = row_of(store, job)

        assert store.enqueue(job, is_resting=True) is None

        assert row_of(store, job) == before

    def test_after_a_lost_commit_the_same_call_finds_its_own_row(self, store, lose_commit, unavailable):
        job = new_job()
        lose_commit()
        with unavailable:
            store.enqueue(job, is_resting=True)

        assert store.enqueue(job, is_resting=True) == Publication(1, 5, is_resting=True)

    def test_a_requeued_job_rests_until_its_time(self, store):
        job, attempt = running(store)
        due = now() + SOON

        publication = store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1, run_after_utc=due)

        assert publication == Publication(2, 5, is_resting=True, has_begun=True)
        assert (row_of(store, job)["published_at"], row_of(store, job)["run_after_utc"]) == (None, due)
        assert store.next_due_s() == pytest.approx(3600, abs=5)
        assert store.take_due(10) == []
        assert claim(store, job, publication=1).decision is Decision.STALE

    def test_a_job_whose_message_could_not_be_sent_rests_due_at_once(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.rest(job.job_id, 1)

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["published_at"]) == ("queued", 2, None)
        assert events_of(store, job) == ["created"]
        assert ids(store.take_due(10)) == [job.job_id]

    def test_a_message_that_arrived_in_spite_of_an_error_is_stale(self, store):
        job = new_job()
        store.enqueue(job)
        store.rest(job.job_id, 1)

        assert claim(store, job, publication=1).decision is Decision.STALE

    def test_a_job_that_has_moved_on_does_not_rest(self, store):
        job, attempt = running(store)
        assert not store.rest(job.job_id, 1)
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)
        before = row_of(store, job)

        assert not store.rest(job.job_id, 1)
        assert not store.rest(job.job_id, 3)
        assert not store.rest("unknown", 1)

        assert row_of(store, job) == before

    def test_a_job_that_has_ended_does_not_rest(self, store):
        job = new_job()
        store.enqueue(job)
        store.end(job.job_id, Status.CANCELLED, FAILURE)

        assert not store.rest(job.job_id, 1)

        assert store.take_due(10) == []


class TestTakeDue:
    def test_what_is_due_is_taken_in_the_order_of_priorities_then_of_submission(self, store):
        jobs = [rest(store, priority=priority) for priority in (5, 1, 10, 5, 10, 1)]

        taken = store.take_due(10)

        assert ids(taken) == [jobs[index].job_id for index in (2, 4, 0, 3, 1, 5)]

    def test_no_more_than_asked_for_are_taken_and_the_rest_next_time(self, store):
        jobs = [rest(store, priority=priority) for priority in (1, 9, 5, 7)]

        assert [ids(store.take_due(3)), ids(store.take_due(3)), ids(store.take_due(3))] == [
            [jobs[1].job_id, jobs[3].job_id, jobs[2].job_id],
            [jobs[0].job_id],
            [],
        ]

    def test_a_job_that_is_taken_is_published_and_keeps_its_number(self, store):
        job = rest(store)
        before = now()

        (taken,) = store.take_due(10)

        assert dict(taken) == row_of(store, job)
        assert (taken["publication"], taken["status"]) == (1, "queued")
        assert before <= taken["published_at"] <= now()
        assert claim(store, job, publication=1).decision is Decision.RUN

    def test_it_brings_what_is_needed_to_send_its_message(self, store):
        message = {"args": ["a"], "kwargs": {"width": 1}, "options": {"headers": {"x": None}}}
        rest(store, message=message, retry_count=2, expires_at=now() + SOON)

        (taken,) = store.take_due(10)

        assert (taken["message"], taken["retry_count"]) == (message, 2)

    def test_only_what_is_due_is_taken(self, store):
        rest(store, due_in_s=3600)
        due = rest(store)

        assert ids(store.take_due(10)) == [due.job_id]

    def test_published_running_and_ended_jobs_are_left_alone(self, store):
        store.enqueue(new_job())
        running(store)
        cancelled = rest(store)
        store.end(cancelled.job_id, Status.CANCELLED, FAILURE)

        assert store.take_due(10) == []

    def test_a_published_job_with_a_time_is_not_published_again(self, store):
        store.enqueue(new_job(run_after_utc=now() - SOON))

        assert store.take_due(10) == []
        assert store.next_due_s() is None

    def test_paused_queues_are_passed_over(self, store):
        paused = [rest(store, queue="video_probe", priority=10) for _ in range(3)]
        due = rest(store)
        store.pause("video_probe")

        assert ids(store.take_due(2)) == [due.job_id]
        assert store.take_due(10) == []

        store.resume("video_probe")
        assert ids(store.take_due(10)) == [job.job_id for job in paused]

    def test_a_pause_that_has_ended_holds_nothing_back(self, store):
        due = rest(store)
        store.pause(due.queue, until=now())

        assert ids(store.take_due(10)) == [due.job_id]

    def test_a_job_whose_sender_died_counts_as_published(self, store, lose_commit, unavailable):
        job = rest(store)
        lose_commit()
        with unavailable:
            store.take_due(10)

        assert store.take_due(10) == []
        assert store.published(now()) == {job.queue: 1}

    def test_of_many_processes_that_take_at_once_each_job_goes_to_one(self, store):
        jobs = [rest(store, priority=1 + number % 10) for number in range(120)]

        def take_all(_number):
            taken = []
            while store.next_due_s() is not None:
                taken += ids(store.take_due(7))
            return taken

        taken = Counter(job_id for some in in_processes(6, take_all) for job_id in some)

        assert taken == Counter(job.job_id for job in jobs)

    def test_of_many_threads_that_take_at_once_each_job_goes_to_one(self, store):
        jobs, taken, errors = [rest(store, priority=1 + number % 10) for number in range(60)], [], []
        go = threading.Barrier(6)

        def take_all():
            try:
                go.wait(10)
                while store.next_due_s() is not None:
                    taken.extend(ids(store.take_due(5)))
            except Exception as exc:
                errors.append(exc)

        threads = [threading.Thread(target=take_all) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert errors == []
        assert Counter(taken) == Counter(job.job_id for job in jobs)

    def test_jobs_are_claimed_cancelled_and_taken_at_the_same_time_without_an_error(self, store):
        """Rows are locked in other orders by others; nobody is refused, and nothing is taken twice."""
        jobs = [rest(store, f"mixed-{number}", priority=1 + number % 10) for number in range(90)]

        def work(number):
            if number % 2:
                for job in reversed(jobs[number * 15 : number * 15 + 15]):
                    store.end(job.job_id, Status.CANCELLED, FAILURE)
                return []
            taken = []
            while store.next_due_s() is not None:
                for row in store.take_due(5):
                    if row["publication"] == 1:
                        store.rest(row["job_id"], row["publication"])
                    taken.append((row["job_id"], row["publication"]))
            return taken

        taken = Counter(entry for some in in_processes(6, work) for entry in some)

        assert set(taken.values()) <= {1}
        cancelled = {job.job_id for number in (1, 3, 5) for job in jobs[number * 15 : number * 15 + 15]}
        others = {job.job_id for job in jobs} - cancelled
        assert {(job_id, publication) for job_id in others for publication in (1, 2)} <= set(taken)


class TestClocks:
    @pytest.mark.parametrize("ahead_s", [-100, 100])
    def test_what_is_due_at_once_is_so_by_the_clock_of_the_server_and_not_of_a_host(self, store, monkeypatch, ahead_s):
        if store.database.is_sqlite:
            pytest.skip("SQLite has one host, and its clock")
        closed, attempt = running(store)
        lost, refused = new_job(), new_job()
        store.enqueue(lost)
        store.enqueue(refused)
        for module in ("base", "attempts", "dispatch"):
            monkeypatch.setattr(f"db.store.{module}.now", lambda: now() + timedelta(seconds=ahead_s))
        store.close(closed.job_id, attempt, reason="dead")
        store.republish(lost.job_id, 1, "its message was lost")
        store.rest(refused.job_id, 1)
        written = new_job()
        store.enqueue(written, is_resting=True)  # ENQUEUE=outbox
        if ahead_s > 0:  # the host that dispatches is another one
            monkeypatch.undo()

        assert store.next_due_s() <= 0
        assert set(ids(store.take_due(10))) == {closed.job_id, lost.job_id, refused.job_id, written.job_id}

    @pytest.mark.parametrize("ahead_s", [-3600, 3600])
    def test_a_delay_counts_by_the_clock_of_the_server_and_a_time_stays_as_it_is(self, store, monkeypatch, ahead_s):
        if store.database.is_sqlite:
            pytest.skip("SQLite has one host, and its clock")
        (retried, attempt), (timed, its_attempt) = running(store), running(store)
        replayed, delayed, unique = new_job(), new_job(delay_s=60.0), new_job(delay_s=60.0, unique_key="k")
        store.enqueue(replayed)
        store.end(replayed.job_id, Status.FAILED, FAILURE)
        eta = now() + timedelta(seconds=60)
        for module in ("base", "attempts"):
            monkeypatch.setattr(f"db.store.{module}.now", lambda: now() + timedelta(seconds=ahead_s))

        store.requeue(retried.job_id, attempt=attempt, event="retry", retry_count=1, delay_s=60.0)
        store.requeue(timed.job_id, attempt=its_attempt, event="retry", retry_count=1, run_after_utc=eta)
        store.enqueue(delayed, is_resting=True)
        store.enqueue_unique(unique, is_resting=True)
        store.replay(replayed.job_id, job=replace(replayed, delay_s=60.0), is_resting=True)

        for job in (retried, delayed, unique, replayed):
            due_at = store.job(job.job_id)["run_after_utc"]
            assert abs((due_at - eta).total_seconds()) < 10
        assert store.job(timed.job_id)["run_after_utc"] == eta


class TestNextDue:
    def test_it_is_the_time_of_the_first_resting_job(self, store):
        assert store.next_due_s() is None
        later, sooner = rest(store, due_in_s=7200), rest(store, due_in_s=3600)

        assert sooner.run_after_utc < later.run_after_utc
        assert store.next_due_s() == pytest.approx(3600, abs=5)

    def test_it_may_be_in_the_past(self, store):
        rest(store, due_in_s=-3600)

        assert store.next_due_s() == pytest.approx(-3600, abs=5)

    def test_published_and_ended_jobs_do_not_count(self, store):
        store.enqueue(new_job(run_after_utc=now() + SOON))
        cancelled = rest(store)
        store.end(cancelled.job_id, Status.CANCELLED, FAILURE)
        rest(store)
        store.take_due(1)

        assert store.next_due_s() is None

    def test_paused_queues_do_not_count(self, store):
        rest(store, queue="video_probe")
        rest(store, due_in_s=3600)
        store.pause("video_probe")

        assert store.next_due_s() == pytest.approx(3600, abs=5)


class TestPublished:
    def test_queued_jobs_that_were_published_are_counted_by_queue(self, store):
        for queue in ("image_resize", "image_resize", "video_probe"):
            store.enqueue(new_job(queue=queue))
        rest(store)
        running(store)
        ended = new_job()
        store.end(ended.job_id, Status.FAILED, FAILURE)

        assert store.published(now()) == {"image_resize": 2, "video_probe": 1}

    def test_those_of_late_do_not_count(self, store):
        store.enqueue(new_job())
        between = now()
        store.enqueue(new_job())

        assert store.published(between) == {"image_resize": 1}
        assert store.published(between - SOON) == {}

    def test_the_jobs_of_one_queue_are_listed_in_pages(self, store):
        jobs = [new_job(priority=priority) for priority in (1, 9, 5, 7, 3)]
        for job in jobs:
            store.enqueue(job)
        store.enqueue(new_job(queue="video_probe"))
        rest(store)
        running(store)

        first = store.published_in("image_resize", now(), limit=3)
        second = store.published_in("image_resize", now(), after_id=first[-1]["id"], limit=3)

        assert ids(first + second) == [job.job_id for job in jobs]
        assert (first[0]["publication"], first[0]["published_at"]) == (1, row_of(store, jobs[0])["published_at"])
        assert store.published_in("image_resize", now(), after_id=second[-1]["id"]) == []

    def test_the_jobs_of_late_are_not_listed(self, store):
        old = new_job()
        store.enqueue(old)
        between = now()
        store.enqueue(new_job())

        assert ids(store.published_in("image_resize", between)) == [old.job_id]

    def test_the_newest_running_job_of_each_priority_and_the_newest_row_are_known(self, store):
        assert (store.newest(), store.newest_running("image_resize")) == (0, {})
        _, nine, five = [running(store, priority=priority)[0] for priority in (5, 9, 5)]
        store.enqueue(new_job())
        last, _ = running(store, queue="video_probe")

        ids_of = [row_of(store, job)["id"] for job in (five, nine, last)]
        assert store.newest_running("image_resize") == dict(zip((5, 9), ids_of, strict=False))
        assert store.newest() == ids_of[-1]

    def test_all_queued_jobs_of_a_queue_can_be_listed(self, store):
        resting, published = rest(store, due_in_s=3600), new_job()
        store.enqueue(published)
        store.enqueue(new_job(queue="video_probe"))
        running(store)

        assert ids(store.queued_in("image_resize")) == [resting.job_id, published.job_id]
        assert ids(store.queued_in("image_resize", limit=1)) == [resting.job_id]


class TestRepublish:
    def test_a_lost_message_is_replaced_by_one_of_the_next_number(self, store):
        job = new_job()
        store.enqueue(job)

        assert store.republish(job.job_id, 1, "the broker lost it")

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["published_at"]) == ("queued", 2, None)
        assert events_of(store, job) == ["created", "republished"]
        assert store.logs(job.job_id)[-1]["message"] == "the broker lost it"
        assert [due["publication"] for due in store.take_due(10)] == [2]
        assert claim(store, job, publication=1).decision is Decision.STALE
        assert claim(store, job, publication=2).decision is Decision.RUN

    def test_one_that_has_moved_on_is_left_alone(self, store):
        job, attempt = running(store)
        assert not store.republish(job.job_id, 1, "it runs")
        store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1)
        before, events = row_of(store, job), events_of(store, job)

        assert not store.republish(job.job_id, 1, "an older one")
        assert not store.republish("unknown", 1, "no row")

        assert row_of(store, job) == before
        assert events_of(store, job) == events

    def test_of_many_who_notice_one_publishes_it_again(self, store):
        job = new_job()
        store.enqueue(job)

        done = in_processes(4, lambda _number: store.republish(job.job_id, 1, "lost"))

        assert sorted(done) == [False, False, False, True]
        assert events_of(store, job) == ["created", "republished"]


class TestExpired:
    @pytest.mark.parametrize("is_resting", [False, True])
    def test_queued_jobs_whose_time_is_over_are_found(self, store, is_resting):
        over, later, never = (new_job(expires_at=at) for at in (now(), now() + SOON, None))
        for job in (over, later, never):
            store.enqueue(job, is_resting=is_resting)

        assert ids(store.expired()) == [over.job_id]
        assert store.expired(limit=0) == []

    def test_those_that_run_or_have_ended_do_not_expire(self, store):
        running(store, expires_at=now())
        ended = new_job(expires_at=now())
        store.enqueue(ended)
        store.end(ended.job_id, Status.CANCELLED, FAILURE)

        assert store.expired() == []

    def test_a_replayed_job_does_not_expire_again(self, store):
        job = new_job(expires_at=now())
        store.enqueue(job)
        store.end(job.job_id, Status.CANCELLED, FAILURE)

        store.replay(job.job_id)

        assert store.expired() == []
