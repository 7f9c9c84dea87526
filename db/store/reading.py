"""What people and programs ask of the job tables; nothing here writes."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Text, cast, func, select

from db import statements
from db.models import task_logs, task_queue
from db.records import Row, Status, now
from db.statements import UNFINISHED, is_one_of
from db.store.base import Part

IDS_IN_ONE_QUERY: Final = 1000
LAST_CHARACTER: Final = chr(0x10FFFF)


class Reading(Part):
    """Rows and counts."""

    def job(self, job_id: str) -> Row | None:
        """The task_queue row of a job."""
        with self._reading() as connection:
            return connection.execute(statements.JOB, {"b_job_id": job_id}).mappings().one_or_none()

    def jobs_by_id(self, job_ids: Sequence[str]) -> list[Row]:
        """The rows of several jobs, without order; ids that have none are missing."""
        found: list[Row] = []
        for start in range(0, len(job_ids), IDS_IN_ONE_QUERY):
            some = job_ids[start : start + IDS_IN_ONE_QUERY]
            found += self._rows(select(task_queue).where(task_queue.c.job_id.in_(some)))
        return found

    def jobs(
        self, *, status: Status | None = None, task_type: str | None = None, id_prefix: str = "", limit: int = 50
    ) -> list[Row]:
        """The newest rows first."""
        statement = select(task_queue).order_by(task_queue.c.id.desc()).limit(limit)
        if status is not None:
            statement = statement.where(task_queue.c.status == status)
        if task_type is not None:
            statement = statement.where(task_queue.c.task_type == task_type)
        if id_prefix:
            # Not LIKE, which could not use the index.
            job_id = task_queue.c.job_id
            statement = statement.where(job_id >= id_prefix, job_id < id_prefix + LAST_CHARACTER)
        return self._rows(statement)

    def unfinished_that_name(self, job_id: str) -> list[Row]:
        """Unfinished jobs whose messages hold this id anywhere, as they hold those of the steps that follow. It may
        stand there as a mere argument: look what it is. Reads all that is unfinished.
        """
        names_it = cast(task_queue.c.message, Text).contains(job_id, autoescape=True)
        return self._rows(select(task_queue).where(is_one_of(UNFINISHED), names_it).order_by(task_queue.c.id))

    def logs(self, job_id: str) -> list[Row]:
        """A job's changes, in order."""
        return self._rows(select(task_logs).where(task_logs.c.job_id == job_id).order_by(task_logs.c.sequence))

    def counts(self) -> dict[str, dict[str, int]]:
        """{task_type: {status: jobs}}. Reads every row: seconds for millions."""
        statement = select(task_queue.c.task_type, task_queue.c.status, func.count()).group_by(
            task_queue.c.task_type, task_queue.c.status
        )
        counts: dict[str, dict[str, int]] = {}
        with self._reading() as connection:
            for task_type, status, jobs in connection.execute(statement):
                counts.setdefault(task_type, {})[status] = jobs
        return counts

    def queue_counts(self) -> dict[str, dict[str, int]]:
        """{queue: {status: jobs}} of what has not ended yet."""
        statement = (
            select(task_queue.c.queue, task_queue.c.status, func.count())
            .where(statements.is_one_of(statements.UNFINISHED))
            .group_by(task_queue.c.queue, task_queue.c.status)
        )
        counts: dict[str, dict[str, int]] = {}
        with self._reading() as connection:
            for queue, status, jobs in connection.execute(statement):
                counts.setdefault(queue, {})[status] = jobs
        return counts

    def overdue(self, by_s: float) -> list[Row]:
        """Resting jobs, of queues that are not paused, that were due longer than so many seconds ago; oldest first.

        Returns: job_id, queue and run_after_utc of each.
        """
        c = task_queue.c
        is_resting = c.status == Status.QUEUED, c.published_at.is_(None), ~statements.is_paused(c.queue)
        statement = select(c.job_id, c.queue, c.run_after_utc).where(*is_resting, c.run_after_utc < self._clock(by_s))
        return self._rows(statement.order_by(c.run_after_utc, c.id), {"b_now": now()})

    def jobs_ahead(self, queue: str, priority: int, row_id: int, order: str = "PRIORITY") -> int:
        """How many published jobs of this queue are claimed before this one, by the queue's claim order.

        FIFO and LIFO are told by the order of submission, whatever was published again since. In WEIGHTED_RANDOM each
        of the others may be.
        """
        c = task_queue.c
        is_ahead = {
            "PRIORITY": (c.priority > priority) | ((c.priority == priority) & (c.id < row_id)),
            "FIFO": c.id < row_id,
            "LIFO": c.id > row_id,
            "WEIGHTED_RANDOM": c.id != row_id,
        }
        statement = select(func.count()).where(
            c.queue == queue, c.status == Status.QUEUED, c.published_at.is_not(None), is_ahead[order]
        )
        with self._reading() as connection:
            return int(connection.execute(statement).scalar_one())
