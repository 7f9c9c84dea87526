"""Groups and chords: members are counted by their rows, on every database."""

import pytest

from db.records import Fence, Status
from tests.db.conftest import LOST, claim, new_job


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
        store.end(second.job_id, status, LOST, fence=Fence(attempt=claim(store, second).attempt))

        parts = [store.chord_parts("g", None), self.complete(store, third)]

        assert [(part.is_mine, part.is_failed) for part in parts] == [(True, True), (False, True)]
        assert parts[0].results is None

    def test_a_chord_fails_for_the_member_that_ended_badly_first(self, store):
        first, second, third = self.chord(store, 3)
        assert store.failed_member("g") is None
        outside = new_job(group_id="g", in_chord=False)
        store.enqueue(outside)
        for job, status in ((outside, Status.FAILED), (third, Status.CANCELLED), (second, Status.FAILED)):
            store.end(job.job_id, status, LOST)
        self.complete(store, first)

        assert store.failed_member("g")["job_id"] == third.job_id

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
