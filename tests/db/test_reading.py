"""What can be read of jobs, by the store and by SQL tools, on every database."""

import pytest

from db.records import Liveness, Status
from tests.db.conftest import LOST, beat, claim, new_job, open_database, row_of, running


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
        cancelled = new_job()
        store.enqueue(cancelled)
        store.end(cancelled.job_id, Status.CANCELLED, LOST)

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
        store.end(jobs[0].job_id, Status.CANCELLED, LOST)
        assert [ahead(job) for job in jobs[2:]] == [0, 2, 1]

    @pytest.mark.parametrize(
        ("order", "counts"), [("FIFO", [0, 1, 2]), ("LIFO", [2, 1, 0]), ("WEIGHTED_RANDOM", [2, 2, 2])]
    )
    def test_jobs_ahead_follow_the_claim_order(self, store, order, counts):
        jobs = [new_job(priority=priority) for priority in (1, 9, 5)]
        for job in jobs:
            store.enqueue(job)

        assert [store.jobs_ahead(job.queue, job.priority, row_of(store, job)["id"], order) for job in jobs] == counts

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
