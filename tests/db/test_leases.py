"""Leases, which say who holds attempts; duties, which one worker at a time has; workers that are lost."""

import threading
from datetime import timedelta

import pytest

from db.records import Decision, Holder, Status, now
from tests.db.conftest import LOST, beat, claim, new_job, row_of, running
from tests.db.processes import in_processes


class TestLeases:
    def test_a_lease_is_shown_and_renewed(self, store):
        before = now()
        store.renew_lease("lease-1", "worker-1", "host-1")
        (first,) = store.holders()

        store.renew_lease("lease-1", "worker-1", "host-1")

        (second,) = store.holders()
        assert first == Holder("lease-1", "worker-1", "host-1", first.renewed_at, first.seen_at)
        assert before <= first.renewed_at < second.renewed_at <= now()
        assert 0 <= first.silent_s < 5

    def test_a_host_whose_clock_is_wrong_is_as_alive_as_the_others(self, store, monkeypatch):
        if store.database.is_sqlite:
            pytest.skip("SQLite has one host, and its clock")
        monkeypatch.setattr("db.store.base.now", lambda: now() - timedelta(seconds=100))
        store.renew_lease("lease-1", "worker-1", "host-1")
        store.heartbeat(beat("worker-1"))
        monkeypatch.undo()

        (holder,) = store.holders()
        assert holder.silent_s < 5
        assert [worker["worker_id"] for worker in store.workers(heard_within_s=15)] == ["worker-1"]

    def test_a_worker_s_leases_are_found_by_its_name(self, store):
        for lease, worker_id in (("a", "worker-1"), ("b", "worker-2"), ("c", "worker-1")):
            store.renew_lease(lease, worker_id, "host-1")

        assert {holder.lease for holder in store.holders()} == {"a", "b", "c"}
        assert {holder.lease for holder in store.holders(worker_id="worker-1")} == {"a", "c"}
        assert store.holders(worker_id="unknown") == []

    def test_a_lease_holds_its_running_attempts(self, store):
        mine, other = running(store, "worker-1")[0], running(store, "worker-2")[0]
        done, attempt = running(store, "worker-1")
        store.complete(done.job_id, attempt, {})
        closed, attempt = running(store, "worker-1")
        store.close(closed.job_id, attempt, reason="dead")
        (holder,) = store.holders(worker_id="worker-1")
        (another,) = store.holders(worker_id="worker-2")

        assert [row["job_id"] for row in store.held_by(holder.worker_id, holder.lease)] == [mine.job_id]
        assert [dict(row) for row in store.held_by(another.worker_id, another.lease)] == [row_of(store, other)]

    def test_an_older_lease_of_the_same_worker_holds_what_it_claimed(self, store):
        old, new = new_job(), new_job()
        for job, lease in ((old, "old"), (new, "new")):
            store.renew_lease(lease, "worker-1", "host-1")
            store.enqueue(job)
            claim(store, job, "worker-1", lease=lease)

        held = {holder.lease: store.held_by(holder.worker_id, holder.lease) for holder in store.holders()}

        assert [row["job_id"] for row in held["old"]] == [old.job_id]
        assert [row["job_id"] for row in held["new"]] == [new.job_id]

    def test_a_lease_that_holds_an_attempt_is_not_forgotten(self, store):
        job, attempt = running(store, "worker-1")
        running(store, "worker-2")

        store.forget_lease("lease of worker-1")
        assert len(store.holders()) == 2
        store.complete(job.job_id, attempt, {})
        store.forget_lease("lease of worker-1")
        store.forget_lease("unknown")

        assert [holder.lease for holder in store.holders()] == ["lease of worker-2"]

    def test_a_lease_of_a_worker_that_holds_attempts_under_another_one_is_forgotten(self, store):
        store.renew_lease("older", "worker-1", "host-1")
        running(store, "worker-1")

        store.forget_lease("older")

        assert [holder.lease for holder in store.holders()] == ["lease of worker-1"]

    def test_a_dead_worker_s_attempts_are_closed_and_its_lease_is_forgotten(self, store):
        """What the reconciler does."""
        jobs = [running(store, "worker-1")[0] for _ in range(2)]
        (holder,) = store.holders()

        for row in store.held_by(holder.worker_id, holder.lease):
            assert store.close(row["job_id"], row["attempt"], reason="dead")
        store.forget_lease(holder.lease)

        assert store.holders() == []
        assert {row["job_id"] for row in store.take_due(10)} == {job.job_id for job in jobs}
        assert claim(store, jobs[0], "worker-2", publication=2).decision is Decision.RUN

    def test_a_renewed_lease_is_there_again_after_it_was_forgotten(self, store):
        store.renew_lease("lease-1", "worker-1", "host-1")
        store.forget_lease("lease-1")

        store.renew_lease("lease-1", "worker-1", "host-1")

        assert [holder.lease for holder in store.holders()] == ["lease-1"]

    def test_cancelled_jobs_are_found_among_those_that_run(self, store):
        cancelled, failed, active = new_job(), new_job(), running(store)[0]
        for job in (cancelled, failed):
            store.enqueue(job)
        store.end(cancelled.job_id, Status.CANCELLED, LOST)
        store.end(failed.job_id, Status.FAILED, LOST)

        found = store.cancelled_of([cancelled.job_id, failed.job_id, active.job_id, "unknown"])

        assert found == {cancelled.job_id}
        assert store.cancelled_of([]) == set()

    def test_jobs_that_were_cancelled_under_a_lease_are_found(self, store):
        jobs = {name: new_job() for name in ("cancelled", "of another lease", "failed", "never ran")}
        for name, job in jobs.items():
            store.enqueue(job)
            if name != "never ran":
                lease = "another" if name == "of another lease" else "lease"
                store.renew_lease(lease, "worker-1", "host-1")
                claim(store, job, "worker-1", lease=lease)
            status = Status.FAILED if name == "failed" else Status.CANCELLED
            store.end(job.job_id, status, LOST)
        active = new_job()
        store.enqueue(active)
        claim(store, active, "worker-1", lease="lease")

        assert [row["job_id"] for row in store.cancelled_under("worker-1", "lease")] == [jobs["cancelled"].job_id]


class TestLostWorkers:
    def test_a_lost_worker_is_shown_without_its_tasks(self, store):
        store.heartbeat(beat("worker-1", status="busy", lease="a", current_tasks=["x"], reserved_tasks=["y"]))
        store.heartbeat(beat("worker-2", status="busy", lease="b", current_tasks=["z"]))

        store.worker_lost("worker-1", "a")

        rows = {row["worker_id"]: row for row in store.workers()}
        assert rows["worker-1"]["status"] == "lost"
        assert (rows["worker-1"]["current_tasks"], rows["worker-1"]["reserved_tasks"]) == ([], [])
        assert (rows["worker-2"]["status"], rows["worker-2"]["current_tasks"]) == ("busy", ["z"])
        assert [row["worker_id"] for row in store.workers(heard_within_s=15.0)] == ["worker-2"]

    def test_another_worker_of_its_name_that_has_shown_itself_is_not_lost(self, store):
        store.heartbeat(beat("worker-1", lease="old"))
        store.heartbeat(beat("worker-1", lease="new"))

        store.worker_lost("worker-1", "old")

        assert [row["status"] for row in store.workers()] == ["idle"]

    def test_a_worker_that_stopped_is_not_lost(self, store):
        store.heartbeat(beat("worker-1", lease="a", status="stopped"))

        store.worker_lost("worker-1", "a")

        assert [row["status"] for row in store.workers()] == ["stopped"]

    def test_one_that_shows_itself_again_is_there(self, store):
        store.heartbeat(beat("worker-1", lease="a"))
        store.worker_lost("worker-1", "a")

        store.heartbeat(beat("worker-1", lease="a"))

        assert [row["status"] for row in store.workers(heard_within_s=15.0)] == ["idle"]


class TestDuties:
    def test_a_duty_that_nobody_has_is_taken(self, store):
        assert store.duty_holder("reconciler") is None

        assert store.take_duty("reconciler", "lease-1", after=None)

        assert store.duty_holder("reconciler") == "lease-1"
        assert store.duty_holder("relay") is None

    def test_a_duty_is_not_taken_from_the_living(self, store):
        store.take_duty("reconciler", "lease-1", after=None)

        assert not store.take_duty("reconciler", "lease-2", after=None)
        assert not store.take_duty("reconciler", "lease-2", after="lease-3")

        assert store.duty_holder("reconciler") == "lease-1"

    def test_a_duty_is_taken_over_from_the_dead(self, store):
        store.take_duty("reconciler", "dead", after=None)

        assert store.take_duty("reconciler", "lease-2", after="dead")
        assert not store.take_duty("reconciler", "lease-3", after="dead")

        assert store.duty_holder("reconciler") == "lease-2"

    @pytest.mark.parametrize("after", [None, "dead"])
    def test_taking_it_again_is_true(self, store, after):
        if after:
            store.take_duty("reconciler", after, after=None)
        assert store.take_duty("reconciler", "lease-1", after=after)

        assert store.take_duty("reconciler", "lease-1", after=after)

        assert store.duty_holder("reconciler") == "lease-1"

    def test_a_duty_is_left_to_the_next(self, store):
        store.take_duty("reconciler", "lease-1", after=None)

        store.leave_duty("reconciler", "lease-1")

        assert store.duty_holder("reconciler") is None
        assert store.take_duty("reconciler", "lease-2", after=None)

    def test_only_its_holder_leaves_it(self, store):
        store.take_duty("reconciler", "lease-1", after=None)

        store.leave_duty("reconciler", "lease-2")
        store.leave_duty("relay", "lease-1")

        assert store.duty_holder("reconciler") == "lease-1"

    @pytest.mark.parametrize("state", ["never taken", "left", "of the dead"])
    def test_one_of_many_gets_it(self, store, state):
        if state != "never taken":
            store.take_duty("reconciler", "dead", after=None)
        if state == "left":
            store.leave_duty("reconciler", "dead")
        after = "dead" if state == "of the dead" else None

        taken = in_processes(6, lambda number: store.take_duty("reconciler", f"lease-{number}", after=after))

        assert sorted(taken) == [False] * 5 + [True]
        assert store.duty_holder("reconciler") == f"lease-{taken.index(True)}"

    def test_one_of_many_threads_gets_it(self, store):
        taken = []

        def take(number):
            taken.append(store.take_duty("reconciler", f"lease-{number}", after=None))

        threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert sorted(taken) == [False] * 5 + [True]
