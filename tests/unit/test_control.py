"""What people do to jobs and queues."""

from datetime import timedelta

import pytest
from celery import chain, chord

from db.records import Status, now
from tasks import control, story
from tasks.errors import CorruptMedia, InvalidArguments, UnknownJob, UnknownQueue
from tasks.request import JobRequest
from tasks.rows import describe, request_of_row
from tests.unit.jobs import beat_of, change, claim, claimed_by, messages, new_job, publications, run, run_message


def failed(producer, job):
    """Fail a job as a worker does, with what waits for it."""
    row = producer.row(job)
    request = request_of_row(row)
    producer.app.backend.mark_as_failure(job.id, CorruptMedia("the file is broken"), request=request)


def statuses(producer, *jobs):
    return [producer.row(job)["status"] for job in jobs]


# List, show


def test_jobs_are_listed_newest_first_and_chosen_by_status_task_and_number(producer, app, add):
    waiting, running = add.delay(1, 1), add.delay(2, 2)
    other = producer.task.quiet.delay(1)
    claimed_by(app, running)

    def ids(**choice):
        return [job["job_id"] for job in control.jobs(**choice)]

    assert ids() == [other.id, running.id, waiting.id]
    assert ids(status="running") == [running.id]
    assert ids(task="add", status=Status.QUEUED) == [waiting.id]
    assert ids(limit=1) == [other.id]
    assert ids(task="nothing") == []


def test_a_listed_job_is_a_plain_mapping_of_its_row(producer, add):
    job = add.delay(1, y=2)

    (listed,) = control.jobs()

    assert type(listed) is dict
    assert listed == dict(producer.row(job))
    assert (listed["parameters"], listed["created_at"].tzinfo is not None) == ({"x": 1, "y": 2}, True)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"status": "done"}, "'done' is no status; choose one of queued, claimed, running"),
        ({"status": ""}, "'' is no status"),
        ({"limit": 0}, "limit=0: give a whole number from 1"),
        ({"limit": -1}, "limit=-1: give a whole number from 1"),
        ({"limit": 10**30}, "give a whole number from 1 to 2,147,483,647"),
        ({"limit": "x"}, "limit='x': give a whole number"),
    ],
)
def test_a_choice_that_can_not_be_meant_is_refused(producer, choice, said):
    with pytest.raises(InvalidArguments, match=said):
        control.jobs(**choice)


def test_a_job_is_shown_with_all_its_changes_in_order(producer, app, add):
    job = add.delay(1, 1)
    claimed_by(app, job, "w1")

    shown = control.show(job.id)

    logs = shown.pop("logs")
    assert shown == dict(producer.row(job))
    assert [(log["event_type"], log["worker_id"]) for log in logs] == [
        ("created", None),
        ("claimed", "w1"),
        ("started", "w1"),
    ]
    assert {type(log) for log in logs} == {dict}


# Cancel


def test_a_queued_job_that_is_cancelled_never_starts_and_says_why(producer, add):
    job = add.delay(1, 1)

    assert control.cancel(job.id, reason="the upload was deleted")

    assert producer.row(job)["error_message"] == "cancelled: the upload was deleted"
    assert run(add, job.id, 1, 1, publication=1) == "IGNORED"
    assert producer.events(job) == ["created", "cancelled"]
    assert job.state == "REVOKED"


def test_a_resting_job_that_is_cancelled_is_never_sent(producer, dispatcher, add):
    job = add.apply_async((1, 1), countdown=60)
    control.cancel(job.id)
    change(producer.app, job, run_after_utc=now())

    assert (dispatcher.publish_due(10), messages(producer, "add")) == (0, [])


def test_a_running_job_that_is_cancelled_loses_its_attempt(producer, app, add):
    job = add.delay(1, 1)
    attempt = claimed_by(app, job)

    assert control.cancel(job.id)

    assert app.store.cancelled_of([job.id]) == {job.id}
    assert not app.store.owns(job.id, attempt)
    assert not app.store.complete(job.id, attempt, 2)


def cancel(job):
    assert control.cancel(job.id)


@pytest.mark.parametrize("end", [cancel, lambda job: job.revoke()], ids=["cancel", "revoke"])
def test_a_step_that_was_not_sent_yet_can_be_cancelled_and_takes_with_it_what_follows(producer, add, end):
    last = chain(add.si(1, 1), add.s(2), add.s(3)).delay()
    first, middle = last.parent.parent, last.parent

    end(middle)

    assert statuses(producer, first, middle, last) == ["queued", "cancelled", "cancelled"]
    assert run_message(producer, add) == 2
    assert statuses(producer, first, middle, last) == ["completed", "cancelled", "cancelled"]
    assert messages(producer, "add") == []


def test_the_body_of_a_chord_can_be_cancelled_before_its_members_have_ended(producer, add):
    body = chord([add.si(1, 1)], producer.task.total.s()).delay()

    assert control.cancel(body.id)

    assert run_message(producer, add) == 2
    assert statuses(producer, body) == ["cancelled"]
    assert messages(producer, "total") == []


def test_a_step_is_not_sent_by_a_job_that_was_cancelled_in_its_last_moment(producer, add, monkeypatch):
    """After it was asked whether it still owns its job, before it has sent what follows."""
    last = chain(add.si(1, 1), add.s(2)).delay()
    monkeypatch.setattr(add, "confirm", lambda: control.cancel(last.parent.id))

    run_message(producer, add)

    assert statuses(producer, last.parent, last) == ["cancelled", "cancelled"]
    assert messages(producer, "add") == []


@pytest.fixture
def claimed_meanwhile(producer, app, monkeypatch):
    """A job is claimed by a worker between the look of somebody else and what follows from that."""

    def claimed_meanwhile(job, look):
        original = getattr(app.store, look)

        def looked(*args, **kwargs):
            rows = original(*args, **kwargs)
            if producer.row(job)["status"] == Status.QUEUED:
                claimed_by(app, job)
            return rows

        monkeypatch.setattr(app.store, look, looked)

    return claimed_meanwhile


def test_a_job_that_is_claimed_while_its_queue_is_purged_goes_on(producer, add, claimed_meanwhile):
    job = add.delay(1, 1)
    claimed_meanwhile(job, "queued_in")

    assert control.purge("add") == 0
    assert statuses(producer, job) == ["running"]


def test_a_job_that_is_claimed_while_it_is_revoked_goes_on(producer, add, claimed_meanwhile):
    job = add.delay(1, 1)
    claimed_meanwhile(job, "jobs_by_id")

    job.revoke()

    assert statuses(producer, job) == ["running"]


def test_a_running_job_whose_revoke_says_terminate_is_cancelled(producer, app, add):
    job = add.delay(1, 1)
    claimed_by(app, job)

    job.revoke(terminate=True)

    assert statuses(producer, job) == ["cancelled"]


def test_a_second_delivery_after_its_expiry_leaves_a_running_job_alone(producer, app, add):
    job = add.apply_async((1, 1), expires=60)
    attempt = claimed_by(app, job)
    (message,) = messages(producer, "add")
    message.headers["expires"] = (now() - timedelta(seconds=1)).isoformat()
    request = JobRequest(
        message,
        on_ack=lambda *_: None,
        app=app,
        task=add,
        headers=message.headers,
        hostname="h",
        eventer=None,
        body=message.body,
        decoded=False,
    )

    request.revoked()

    assert app.store.owns(job.id, attempt)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_a_job_that_has_ended_is_not_cancelled(producer, app, add, status):
    job = add.delay(1, 1)
    if status is Status.COMPLETED:
        app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, 2)
    else:
        app.store.end(job.id, status, describe(ValueError("no")))

    assert not control.cancel(job.id)
    assert statuses(producer, job) == [status]


def test_what_waits_for_a_cancelled_job_is_cancelled_too(producer, add):
    last = chain(add.s(1, 1), add.s(2), add.s(3))()

    control.cancel(last.parent.parent.id)

    assert statuses(producer, last.parent.parent, last.parent, last) == ["cancelled"] * 3


def test_a_chord_fails_when_a_member_is_cancelled(producer, add):
    body = chord([add.s(1, 1), add.s(2, 2)], producer.task.total.s())()
    member = body.parent.results[0]

    control.cancel(member.id)

    assert statuses(producer, member, body) == ["cancelled", "failed"]
    assert member.id in producer.row(body)["error_message"]


@pytest.mark.parametrize("do", [control.cancel, control.replay, control.retry, control.explain, control.show])
def test_an_unknown_job_is_refused_by_its_id(producer, do):
    with pytest.raises(UnknownJob, match="no job has the id nobody"):
        do("nobody")


@pytest.mark.parametrize("job_id", [None, 7, ["a"]])
@pytest.mark.parametrize("do", [control.cancel, control.replay, control.retry, control.explain, control.show])
def test_what_is_no_id_is_refused(producer, do, job_id):
    with pytest.raises(UnknownJob, match="is no job's id, which is a text"):
        do(job_id)


# Replay, retry


@pytest.mark.parametrize(
    ("do", "end"), [(control.replay, "failed"), (control.replay, "cancelled"), (control.retry, "failed")]
)
def test_a_job_that_ended_badly_runs_again_as_new(producer, app, dispatcher, add, do, end):
    job = add.delay(1, 1)
    messages(producer, "add")
    change(app, job, deaths=2, retry_count=2)
    failed(producer, job) if end == "failed" else control.cancel(job.id)

    assert do(job.id)

    row = producer.row(job)
    assert (row["status"], row["deaths"], row["retry_count"], row["error_type"]) == ("queued", 0, 0, None)
    assert producer.events(job) == ["created", end, "replayed"]
    assert dispatcher.publish_due(10) == 1
    assert publications(producer, "add") == [(job.id, 2)]
    assert run(add, job.id, 1, 1, publication=2) == 2


@pytest.mark.parametrize("do", [control.replay, control.retry])
def test_a_job_that_waits_or_works_is_not_run_again(producer, app, add, do):
    waiting, working, done = add.delay(1, 1), add.delay(1, 1), add.delay(1, 1)
    claimed_by(app, working)
    app.store.complete(done.id, claim(app.store, new_job(done.id)).attempt, 2)

    assert [do(job.id) for job in (waiting, working, done)] == [False] * 3
    assert statuses(producer, waiting, working, done) == ["queued", "running", "completed"]


def test_a_cancelled_job_is_run_again_by_a_replay_only(producer, add):
    job = add.delay(1, 1)
    control.cancel(job.id)

    with pytest.raises(InvalidArguments, match=f"{job.id} was cancelled; `jobs replay` runs it again"):
        control.retry(job.id)

    assert statuses(producer, job) == ["cancelled"]


def test_a_job_that_rests_until_its_retry_can_be_run_at_once(producer, app, dispatcher, add):
    job = add.delay(1, 1)
    messages(producer, "add")
    attempt = claimed_by(app, job)
    due = now() + timedelta(seconds=600)
    app.store.requeue(job.id, attempt=attempt, event="retry", retry_count=1, run_after_utc=due)
    assert dispatcher.publish_due(10) == 0

    assert control.retry(job.id)

    assert dispatcher.publish_due(10) == 1
    assert publications(producer, "add") == [(job.id, producer.row(job)["publication"])]
    assert producer.row(job)["retry_count"] == 1


def test_what_failed_with_a_job_follows_its_replay(producer, dispatcher, add):
    last = chain(add.s(1, 1), add.s(2))()
    failed(producer, last.parent)
    assert statuses(producer, last.parent, last) == ["failed", "failed"]
    messages(producer, "add")

    control.replay(last.parent.id)
    dispatcher.publish_due(10)
    (message,) = messages(producer, "add")
    chain_of_it = message.payload[2]["chain"]
    assert run(add, last.parent.id, 1, 1, publication=2, chain=chain_of_it) == 2

    assert statuses(producer, last.parent, last) == ["completed", "queued"]


def test_a_job_whose_key_another_one_has_taken_is_not_replayed(producer, add):
    first = add.apply_async((1, 1), unique_key="k")
    control.cancel(first.id)
    second = add.apply_async((1, 1), unique_key="k")

    with pytest.raises(InvalidArguments, match=f"{second.id} lives, with the same unique_key"):
        control.replay(first.id)
    assert statuses(producer, first, second) == ["cancelled", "queued"]


# Explain


def why(job):
    """The reasons for which a job waits."""
    return [chapter.text for chapter in control.explain(job.id) if chapter.event == "waits"]


def test_a_job_waits_because_no_worker_serves_its_queue(app, add):
    app.store.heartbeat(beat_of("w1", capabilities=["addd"]))

    assert why(add.delay(1, 1))[0] == "no worker serves add; did you mean addd?"


@pytest.fixture
def served(app):
    app.store.heartbeat(beat_of("w1"))


def test_a_job_waits_because_its_queue_is_paused(app, add, served):
    job = add.delay(1, 1)
    control.pause("add", "maintenance", for_s=60)

    assert why(job)[0].startswith("add is paused until 20")
    assert why(job)[0].endswith(" UTC: maintenance")


def test_a_job_waits_until_it_is_due(app, add, served):
    job = add.apply_async((1, 1), countdown=60)
    assert why(job)[0].startswith("is due at ")

    change(app, job, retry_count=2)
    assert why(job)[0].startswith("retry 2 is due at ")

    change(app, job, run_after_utc=now())
    assert why(job) == ["due, and about to be published"]


def test_a_job_that_is_due_while_there_is_no_worker_waits_for_one(app, add):
    job = add.apply_async((1, 1), countdown=60)
    change(app, job, run_after_utc=now())

    assert why(job) == ["no worker serves add", "due; a worker publishes it"]


def test_a_job_waits_behind_others_of_its_priority_or_a_higher_one(add, served):
    add.apply_async((1, 1), priority=5)
    add.apply_async((1, 1), priority=9)
    add.apply_async((1, 1), priority=1)
    job = add.apply_async((1, 1), priority=5)
    add.apply_async((1, 1), priority=5)

    assert why(job) == ["behind 2 other jobs of add"]


@pytest.mark.parametrize(
    ("order", "reasons"),
    [
        ("FIFO", ["it is the next one", "behind 1 other job of add, by FIFO", "behind 2 other jobs of add, by FIFO"]),
        ("LIFO", ["behind 2 other jobs of add, by LIFO", "behind 1 other job of add, by LIFO", "it is the next one"]),
        ("WEIGHTED_RANDOM", ["drawn by chance, with 2 other jobs of add"] * 3),
    ],
)
def test_a_job_waits_by_the_claim_order_of_its_queue(app, add, served, order, reasons, monkeypatch):
    monkeypatch.setitem(app.settings.queue_strategy, "add", order)
    jobs = [add.apply_async((1, 1), priority=priority) for priority in (1, 9, 5)]

    assert [why(job) for job in jobs] == [[reason] for reason in reasons]


def test_a_job_is_the_next_one_or_all_workers_are_busy(app, add, served):
    job = add.delay(1, 1)
    assert why(job) == ["it is the next one"]

    app.store.heartbeat(beat_of("w1", current_tasks=["another"]))
    assert why(job) == ["it is the next one; all workers of its queue are busy"]


def test_the_story_of_a_job_names_attempts_workers_errors_and_deaths(producer, app, reconciler, add):
    job = add.delay(1, 1)
    claimed_by(app, job, "dead")
    for finding in list(reconciler.dead_holders()):
        finding.mend()
    failed(producer, job)

    story = control.explain(job.id)

    assert [chapter.event for chapter in story] == ["created", "claimed", "started", "lost", "failed"]
    assert (story[1].worker, story[1].text) == ("dead", "attempt 1")
    assert "its worker died" in story[3].text
    assert "1 of its workers have died" in story[3].text
    assert story[4].text == "CorruptMedia: the file is broken"
    assert [chapter.at for chapter in story] == sorted(chapter.at for chapter in story)


def test_a_running_job_says_who_has_it_and_how_far_it_is(app, add, served, monkeypatch):
    job = add.delay(1, 1)
    app.store.progress(job.id, claimed_by(app, job, "w1"), percent=40, stage="reading")
    (worker,) = app.store.workers()
    monkeypatch.setattr(story, "now", lambda: worker["last_heartbeat"] + timedelta(seconds=7))

    last = control.explain(job.id)[-1]

    assert (last.event, last.worker) == ("runs", "w1")
    assert last.text == "40 % (reading), attempt 1, heard of 7 s ago"


# Queues


def queue_named(name):
    return {queue.name: queue for queue in control.queues()}[name]


def test_a_queue_says_what_waits_and_runs_in_it_and_who_serves_it(app, add, served):
    jobs = [add.delay(n, n) for n in range(3)]
    claimed_by(app, jobs[0], "w1")

    queue = queue_named("add")

    assert (queue.queued, queue.running, list(queue.workers), queue.is_paused) == (2, 1, ["w1"], False)
    assert queue_named("total").workers == []


def test_a_pause_is_shown_with_its_reason_and_end_until_it_is_resumed(producer):
    control.pause("add", "maintenance", for_s=60)

    queue = queue_named("add")
    assert (queue.is_paused, queue.reason) == (True, "maintenance")
    assert 55 < (queue.paused_until - now()).total_seconds() <= 60
    assert (control.resume("add"), control.resume("add")) == (True, False)
    assert not queue_named("add").is_paused


def test_a_pause_ends_by_itself(app, add):
    control.pause("add", for_s=60)
    app.store.pause("add", until=now() - timedelta(seconds=1))

    assert not queue_named("add").is_paused
    assert run(add, add.delay(1, 1).id, 1, 1, publication=1) == 2


@pytest.mark.parametrize("for_s", [0, -1, float("inf"), float("nan"), "x", True])
def test_a_pause_of_no_time_is_refused(producer, for_s):
    with pytest.raises(InvalidArguments, match="give seconds above 0"):
        control.pause("add", for_s=for_s)


def test_no_queue_at_all_is_refused_with_all_that_are_known(producer):
    with pytest.raises(UnknownQueue, match=r"no queue is called None; known: .*add, .*image_conversion"):
        control.pause(None)


@pytest.mark.parametrize("do", [control.pause, control.purge])
def test_an_unknown_queue_is_refused_with_the_nearest_known(producer, do):
    with pytest.raises(UnknownQueue, match=r"no queue is called aad; did you mean add\?"):
        do("aad")


def test_a_purge_cancels_what_waits_in_one_queue_and_nothing_else(producer, app, add):
    waiting, resting, running = add.delay(1, 1), add.apply_async((1, 1), countdown=60), add.delay(1, 1)
    elsewhere = producer.task.quiet.delay(1)
    claimed_by(app, running)

    assert control.purge("add") == 2

    assert statuses(producer, waiting, resting, running, elsewhere) == ["cancelled", "cancelled", "running", "queued"]
    assert producer.row(waiting)["error_message"] == "the queue add was purged"
    assert control.purge("add") == 0


# Celery's own remote control


@pytest.mark.parametrize("revoke", [lambda job: job.revoke(), lambda job: job.app.control.revoke([job.id])])
def test_a_revoke_is_written_down_though_no_worker_runs(producer, add, revoke):
    job = add.delay(1, 1)

    revoke(job)

    assert statuses(producer, job) == ["cancelled"]


@pytest.mark.parametrize(("terminate", "status"), [(False, "running"), (True, "cancelled")])
def test_a_revoke_ends_a_running_job_only_if_it_says_so(producer, app, add, terminate, status):
    job = add.delay(1, 1)
    claimed_by(app, job)

    job.revoke(terminate=terminate)

    assert statuses(producer, job) == [status]


def test_a_revoke_of_what_is_unknown_or_has_ended_changes_nothing(producer, app, add):
    job = add.delay(1, 1)
    app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, 2)

    app.control.revoke([job.id, "nobody"])

    assert statuses(producer, job) == ["completed"]
    assert app.store.job("nobody") is None
