"""What the reconciler finds of the dead, of the ended and of the old; messages are in test_reconciler_messages.py."""

import os
from datetime import timedelta

import pytest
from celery import chain, chord
from sqlalchemy import delete

from db.models import worker_leases
from db.records import EAGER, Fence, Status, now
from tasks import control
from tasks.errors import CorruptMedia
from tasks.leftovers import token_of
from tasks.rows import describe
from tests.unit.jobs import (
    beat_of,
    change,
    claim,
    claimed_by,
    leave_lock,
    mend,
    messages,
    new_job,
    publications,
    silent_for,
)

LONG_AGO = timedelta(seconds=10)


def worker_status(app, worker_id):
    return {worker["worker_id"]: worker["status"] for worker in app.store.workers()}[worker_id]


# Dead holders


def test_a_job_of_a_dead_worker_is_queued_again_under_the_next_publication(producer, reconciler, dispatcher, add):
    job = add.delay(1, 1)
    attempt = claimed_by(producer.app, job)
    messages(producer, "add")

    assert mend(reconciler.dead_holders()) == [job.id, "dead"]

    row = producer.row(job)
    assert (row["status"], row["publication"], row["attempt"], row["deaths"]) == ("queued", 2, attempt + 1, 1)
    assert producer.events(job)[-1] == "lost"
    assert dispatcher.publish_due(10) == 1
    assert publications(producer, "add") == [(job.id, 2)]


def test_a_job_that_kills_its_workers_fails_after_the_third_and_says_why(producer, reconciler, dispatcher, add):
    job = add.delay(1, 1)

    for deaths in (1, 2, 3):
        claimed_by(producer.app, job)
        mend(reconciler.dead_holders())
        assert producer.row(job)["deaths"] == deaths

    row = producer.row(job)
    assert (row["status"], row["error_type"]) == ("failed", "WorkerLost")
    assert row["error_message"].startswith("3 workers died while running this job")
    assert dispatcher.publish_due(10) == 0


def test_a_job_whose_caller_ran_it_and_died_fails_and_never_runs_again(producer, app, reconciler, tmp_path):
    job = producer.task.image_resize.delay(tmp_path / "in.jpg", tmp_path / "out.webp", width=9)
    lease = f"{EAGER}1"
    leave_lock(app, lease)
    app.store.renew_lease(lease, "caller", app.leases.host_id)
    attempt = claim(app.store, new_job(job.id), "caller", lease=lease).attempt
    part = tmp_path / f".media-tasks-{token_of(job.id, attempt)}-abc.part"
    part.touch()

    assert job.id in mend(reconciler.dead_holders())

    row = producer.row(job)
    assert (row["status"], row["error_type"], row["attempt"], part.exists()) == ("failed", "WorkerLost", attempt, False)
    assert "apply()" in row["error_message"]
    assert lease not in {holder.lease for holder in app.store.holders()}


def test_an_attempt_under_a_lease_that_is_gone_is_closed_after_a_while(producer, app, reconciler, add):
    """Its worker was taken for dead, woke, claimed it, and died before it could renew."""
    job, other = add.delay(1, 1), add.delay(2, 2)
    for one, worker_id in ((job, "dead"), (other, "living")):
        claim(app.store, new_job(one.id), worker_id)
    with app.store.database.transaction() as connection:
        connection.execute(delete(worker_leases).where(worker_leases.c.worker_id == "dead"))

    assert mend(reconciler.dead_holders()) == []
    for one in (job, other):
        change(app, one, claimed_at=now() - timedelta(seconds=app.settings.lease_timeout_s + 1))
    assert mend(reconciler.dead_holders()) == [job.id]

    assert (producer.row(job)["status"], producer.row(job)["deaths"]) == ("queued", 1)
    assert producer.row(other)["status"] == "running"


def test_only_the_temp_files_of_the_dead_attempt_are_removed(producer, reconciler, tmp_path):
    job = producer.task.image_resize.delay(tmp_path / "in.jpg", tmp_path / "out.webp", width=9)
    attempt = claimed_by(producer.app, job)
    mine = tmp_path / f".media-tasks-{token_of(job.id, attempt)}-abc.part"
    kept = [tmp_path / f".media-tasks-{token_of(job.id, attempt + 1)}-abc.part", tmp_path / ".media-tasks-x.1-abc.part"]
    for path in (mine, *kept, tmp_path / "out.webp"):
        path.touch()

    mend(reconciler.dead_holders())

    assert not mine.exists()
    assert all(path.exists() for path in kept)
    assert (tmp_path / "out.webp").exists()


def test_a_job_that_was_cancelled_after_its_worker_died_leaves_no_temp_file(producer, reconciler, tmp_path):
    job = producer.task.image_resize.delay(tmp_path / "in.jpg", tmp_path / "out.webp", width=9)
    attempt = claimed_by(producer.app, job)
    control.cancel(job.id)
    part = tmp_path / f".media-tasks-{token_of(job.id, attempt)}-abc.part"
    part.touch()

    mend(reconciler.dead_holders())

    assert not part.exists()


def test_a_dead_worker_is_shown_as_lost_and_its_lease_forgotten(app, reconciler):
    leave_lock(app, "lease of dead")
    app.store.renew_lease("lease of dead", "dead", app.leases.host_id)
    app.store.heartbeat(beat_of("dead", lease="lease of dead"))

    mend(reconciler.dead_holders())

    assert worker_status(app, "dead") == "lost"
    assert app.store.holders() == []


def test_a_new_worker_of_the_same_name_is_not_shown_as_lost(app, reconciler):
    leave_lock(app, "lease of dead")
    app.store.renew_lease("lease of dead", "w", app.leases.host_id)
    app.store.heartbeat(beat_of("w", lease="another lease"))

    mend(reconciler.dead_holders())

    assert worker_status(app, "w") == "idle"


def test_to_look_changes_nothing(producer, app, reconciler, add):
    jobs = [add.delay(1, 1), add.delay(2, 2), add.apply_async((3, 3), expires=60)]
    claimed_by(app, jobs[0])
    app.store.heartbeat(beat_of("dead", lease="lease of dead"))
    change(app, jobs[1], published_at=now() - LONG_AGO)
    change(app, jobs[2], expires_at=now() - LONG_AGO)
    messages(producer, "add")
    before = [dict(producer.row(job)) for job in jobs]

    parts = [finding.part for finding in reconciler.findings()]

    assert parts == ["dead holders", "dead holders", "expired jobs", "lost messages"]
    assert [dict(producer.row(job)) for job in jobs] == before
    assert worker_status(app, "dead") == "idle"
    assert [holder.worker_id for holder in app.store.holders()] == ["dead"]


def test_the_living_are_left_alone(producer, app, reconciler, add):
    app.leases.take()
    job = add.delay(1, 1)
    app.store.claim(
        job.id,
        unknown=lambda: new_job(job.id),
        publication=1,
        worker_id=app.worker_id,
        lease=app.lease,
        judge=app.leases.judge,
        max_deaths=3,
    )
    lease, app.lease = app.lease, "another worker's"
    try:
        assert list(reconciler.dead_holders()) == []
    finally:
        app.lease = lease


def test_a_worker_elsewhere_is_judged_only_when_the_database_was_there_for_a_while(app, reconciler, clock, add):
    claimed_by(app, add.delay(1, 1), "far", host_id="another host")
    silent_for(app, 16, "far")

    assert list(reconciler.dead_holders()) == []
    clock.pass_s(16)
    assert len(list(reconciler.dead_holders())) == 2
    app.leases.interrupted()
    assert list(reconciler.dead_holders()) == []


def test_a_lock_that_was_let_go_needs_no_steady_time(app, reconciler, add):
    claimed_by(app, add.delay(1, 1), "near")
    app.leases.interrupted()

    assert len(list(reconciler.dead_holders())) == 2


def test_a_job_that_ended_while_its_worker_was_found_dead_stays_ended(producer, app, reconciler, add):
    job = add.delay(1, 1)
    attempt = claimed_by(app, job)
    findings = list(reconciler.dead_holders())
    app.store.complete(job.id, attempt, 2)

    mend(findings)

    assert (producer.row(job)["status"], producer.row(job)["deaths"]) == ("completed", 0)


def test_what_can_not_be_mended_does_not_keep_the_rest_from_it(producer, app, reconciler, add, monkeypatch):
    first, second = add.delay(1, 1), add.delay(2, 2)
    claimed_by(app, first), claimed_by(app, second)
    close = app.store.close

    def close_but_the_first(job_id, *args, **options):
        if job_id == first.id:
            raise RuntimeError("not now")
        return close(job_id, *args, **options)

    monkeypatch.setattr(app.store, "close", close_but_the_first)

    reconciler.round()

    assert [producer.row(job)["status"] for job in (first, second)] == ["running", "queued"]


# Untold ends


def test_a_chord_whose_last_member_died_before_it_published_the_body_publishes_it(
    producer, app, reconciler, dispatcher, add
):
    body = chord([add.s(1, 1), add.s(2, 2)], producer.task.total.s())()
    for job, value in zip(body.parent.results, (2, 4), strict=True):
        app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, value)
        change(app, job, completed_at=now() - LONG_AGO)

    assert set(mend(reconciler.untold_ends())) == {job.id for job in body.parent.results}
    assert publications(producer, "total") == [], "this thread leaves the broker to the dispatcher"
    assert dispatcher.publish_due(10) == 1

    assert publications(producer, "total") == [(body.id, 1)]
    assert producer.row(body)["parameters"] == {"numbers": [2, 4]}
    assert list(reconciler.untold_ends()) == []


def test_later_steps_of_a_chain_hear_of_a_failure_that_was_not_told(producer, app, reconciler, add):
    last = chain(add.s(1, 1), add.s(2), add.s(3))()
    first = last.parent.parent
    row = app.store.job(first.id)
    app.store.end(first.id, Status.FAILED, failure(), fence=Fence(publication=row["publication"], may_run=True))
    change(app, first, completed_at=now() - LONG_AGO)
    assert app.store.job(last.id) is None

    assert mend(reconciler.untold_ends()) == [first.id]

    assert [producer.row(job)["status"] for job in (last.parent, last)] == ["failed", "failed"]
    assert "the file is broken" in producer.row(last)["error_message"]
    assert list(reconciler.untold_ends()) == []


@pytest.mark.parametrize(("status", "is_called"), [(Status.FAILED, True), (Status.CANCELLED, False)])
def test_an_errback_hears_of_a_failure_that_was_not_told_and_of_no_cancellation(
    producer, app, reconciler, add, tmp_path, status, is_called
):
    job = add.apply_async((1, 1), link_error=producer.task.note_error.s(file=str(tmp_path / "errors")))
    app.store.end(job.id, status, failure())
    change(app, job, completed_at=now() - LONG_AGO)

    assert mend(reconciler.untold_ends()) == [job.id]

    assert (tmp_path / "errors").exists() is is_called
    assert list(reconciler.untold_ends()) == []


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
def test_a_chord_hears_of_a_member_that_ended_badly_and_was_not_told(producer, app, reconciler, add, status):
    body = chord([add.s(1, 1), add.s(2, 2)], producer.task.total.s())()
    member = body.parent.results[0]
    app.store.end(member.id, status, failure())
    change(app, member, completed_at=now() - LONG_AGO)

    assert mend(reconciler.untold_ends()) == [member.id]

    assert producer.row(body)["status"] == "failed"
    assert "the file is broken" in producer.row(body)["error_message"]
    assert list(reconciler.untold_ends()) == []


def test_a_chord_fails_though_the_process_that_had_to_fail_it_died(producer, app, reconciler, add):
    body = chord([add.s(1, 1), add.s(2, 2)], producer.task.total.s())()
    member = body.parent.results[0]
    app.store.end(member.id, Status.FAILED, failure())
    change(app, member, completed_at=now() - LONG_AGO)
    assert app.store.chord_parts(producer.row(member)["group_id"], None).is_mine  # ... and this process dies

    mend(reconciler.untold_ends())

    assert producer.row(body)["status"] == "failed"


def test_a_chord_fails_when_a_member_expires(producer, app, reconciler, add):
    body = chord([add.s(1, 1).set(expires=60), add.s(2, 2)], producer.task.total.s())()
    member = body.parent.results[0]
    change(app, member, expires_at=now() - LONG_AGO)

    assert mend(reconciler.expired_jobs()) == [member.id]

    assert producer.row(body)["status"] == "failed"
    assert producer.row(member)["sequel"] == "told"


def test_a_chord_fails_when_a_member_kills_its_workers(producer, app, reconciler, add):
    body = chord([add.s(1, 1), add.s(2, 2)], producer.task.total.s())()
    member = body.parent.results[0]
    claimed_by(app, member)
    change(app, member, deaths=2)

    mend(reconciler.dead_holders())

    assert [producer.row(job)["error_type"] for job in (member, body)] == ["WorkerLost", "ChordError"]


@pytest.mark.parametrize("status", [Status.FAILED, Status.COMPLETED])
def test_an_end_that_can_never_be_told_keeps_no_other_from_being_told(producer, app, reconciler, add, caplog, status):
    job = add.delay(1, 1)
    options = {"chain": ["no signature"], "chord": "no signature either"}
    change(app, job, message={"args": [1, 1], "kwargs": {}, "options": options}, in_chord=True, sequel="pending")
    if status is Status.COMPLETED:
        app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, 2)
    else:
        app.store.end(job.id, status, failure())
    change(app, job, completed_at=now() - LONG_AGO)

    assert mend(reconciler.untold_ends()) == [job.id]

    assert f"{job.id}: what waits for its end can't be told" in caplog.text
    assert list(reconciler.untold_ends()) == []


def test_an_end_that_may_still_be_told_is_left_alone(app, reconciler, add):
    first = chain(add.s(1, 1), add.s(2))().parent
    app.store.end(first.id, Status.FAILED, failure())

    assert list(reconciler.untold_ends()) == []


def failure():
    return describe(CorruptMedia("the file is broken"))


# Expired jobs, retention


def test_a_queued_job_whose_time_is_over_is_cancelled_with_what_waits_for_it(producer, app, reconciler, add):
    last = chain(add.s(1, 1).set(expires=60), add.s(2))()
    change(app, last.parent, expires_at=now() - LONG_AGO)

    assert mend(reconciler.expired_jobs()) == [last.parent.id]

    assert [producer.row(job)["status"] for job in (last.parent, last)] == ["cancelled", "cancelled"]
    assert producer.row(last.parent)["error_message"] == "expired"


def test_a_running_job_and_one_with_time_left_do_not_expire(app, reconciler, add):
    running = add.apply_async((1, 1), expires=60)
    add.apply_async((2, 2), expires=60)
    claimed_by(app, running)
    change(app, running, expires_at=now() - LONG_AGO)

    assert list(reconciler.expired_jobs()) == []


def test_what_ended_longer_ago_than_the_retention_is_removed_and_nothing_else(producer, app, reconciler, clock, add):
    old, recent, waiting = add.delay(1, 1), add.delay(2, 2), add.delay(3, 3)
    for job in (old, recent):
        app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, 1)
    app.store.forget_lease("lease of w1")
    for job in (old, waiting):
        change(app, job, created_at=now() - timedelta(days=31))
    change(app, old, completed_at=now() - timedelta(days=30, minutes=1))
    app.store.pause("add", until=now() - LONG_AGO)
    leave_lock(app, "of a worker long dead")
    os.utime(producer.server_dir / "leases" / "of a worker long dead", (0, 0))

    reconciler.round()
    reconciler.round()

    with app.store.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM queue_pauses").scalar_one() == 0
    assert not (producer.server_dir / "leases" / "of a worker long dead").exists()
    assert app.store.job(old.id) is None
    assert app.store.logs(old.id) == []
    assert [producer.row(job)["status"] for job in (recent, waiting)] == ["completed", "queued"]


def test_what_has_become_too_old_is_removed_within_an_hour(app, reconciler, clock, add):
    job = add.delay(1, 1)
    app.store.complete(job.id, claim(app.store, new_job(job.id)).attempt, 1)
    app.store.forget_lease("lease of w1")
    reconciler.round()
    change(app, job, completed_at=now() - timedelta(days=31), created_at=now() - timedelta(days=31))

    reconciler.round()
    assert app.store.job(job.id) is not None  # it does not look at each round
    clock.pass_s(3600)
    reconciler.round()

    assert app.store.job(job.id) is None
