"""What is old enough is removed: jobs that have ended, with their changes; groups, workers and their changes."""

from datetime import datetime
from typing import Final

from sqlalchemy import delete, exists, select

from db.models import task_groups, task_logs, task_queue, worker_heartbeats
from db.records import TERMINAL
from db.statements import is_one_of
from db.store.base import Part

_BATCH: Final = 500


class Retention(Part):
    """Removes in small batches, so that nobody waits long for the write lock."""

    def prune(self, before: datetime) -> int:
        """Remove what ended before this time; a number of calls may be needed. Returns the jobs removed.

        Members of a chord that waits for others stay: they are to be counted.
        """
        c = task_queue.c
        has_fired = exists().where(task_groups.c.group_id == c.group_id, task_groups.c.fired_at.is_not(None))
        old = (
            select(c.id)
            .where(c.created_at < before, is_one_of(sorted(TERMINAL)), c.completed_at < before, ~c.in_chord | has_fired)
            .order_by(c.created_at)
            .limit(_BATCH)
        )
        with self._changing() as connection:
            removed = connection.execute(delete(task_queue).where(c.id.in_(old.scalar_subquery()))).rowcount
            if removed < _BATCH:
                has_members = exists().where(c.group_id == task_groups.c.group_id)
                connection.execute(delete(task_groups).where(task_groups.c.created_at < before, ~has_members))
                connection.execute(delete(worker_heartbeats).where(worker_heartbeats.c.last_heartbeat < before))
                of_workers = task_logs.c.job_id.is_(None), task_logs.c.created_at < before
                connection.execute(delete(task_logs).where(*of_workers))
            return int(removed)
