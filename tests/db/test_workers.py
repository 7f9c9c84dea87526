"""Workers as their heartbeats show them, on every database."""

from datetime import timedelta

from db.records import now
from tests.db.conftest import WHEN, beat


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
        store.log_worker("worker-1", "started", "worker started")
        store.log_worker("worker-1", "stopped", "worker stopped")

        with store.database.reading() as connection:
            rows = connection.exec_driver_sql(
                "SELECT job_id, worker_id, event_type, message FROM task_logs ORDER BY id"
            ).all()
        assert [tuple(row) for row in rows] == [
            (None, "worker-1", "started", "worker started"),
            (None, "worker-1", "stopped", "worker stopped"),
        ]
