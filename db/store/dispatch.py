"""Which queued jobs need a message: those that rest in their rows until they are due, and those whose one is lost."""

from collections.abc import Collection
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Select, func, select, type_coerce, update

from db.models import UTCDateTime, task_queue
from db.records import Event, Row, Status, now
from db.statements import ACTIVE, RESTING, is_one_of, is_paused, of_job
from db.store.base import Part, log

_job: Final = task_queue.c
_IS_QUEUED: Final = _job.status == Status.QUEUED


class Dispatch(Part):
    """A job rests while `published_at` is empty, and is due at `run_after_utc`."""

    def take_due(self, limit: int) -> list[Row]:
        """The jobs that are due, higher priorities first, now marked as published: the caller sends their messages.

        If it dies before that, their messages count as lost. Those of paused queues go on resting.
        """
        with self._writing("take_due") as (connection, at, _):
            due = (
                select(_job.id)
                .where(
                    _IS_QUEUED, _job.published_at.is_(None), _job.run_after_utc <= self._clock(), ~is_paused(_job.queue)
                )
                .order_by(_job.priority.desc(), _job.id)
                .limit(limit)
            )
            taking = (
                update(task_queue)
                .where(_job.id.in_(due.scalar_subquery()), _IS_QUEUED, _job.published_at.is_(None))
                .values(published_at=at)
                .returning(task_queue)
            )
            rows = list(connection.execute(taking, {"b_now": at}).mappings())
        return sorted(rows, key=lambda row: (-row["priority"], row["id"]))

    def next_due_s(self) -> float | None:
        """In how many seconds the next resting job is due, 0 or less if it is; None if there is none."""
        is_resting = _IS_QUEUED, _job.published_at.is_(None), ~is_paused(_job.queue)
        clock = type_coerce(self._clock(), UTCDateTime())
        with self._reading() as connection:
            first = select(func.min(_job.run_after_utc)).where(*is_resting).scalar_subquery()
            due, seen_at = connection.execute(select(first, clock), {"b_now": now()}).one()
            return (due - seen_at).total_seconds() if due is not None else None

    def published(self, before: datetime) -> dict[str, int]:
        """How many queued jobs of each queue were published before this time."""
        statement = select(_job.queue, func.count()).where(_IS_QUEUED, _job.published_at < before).group_by(_job.queue)
        with self._reading() as connection:
            return {queue: jobs for queue, jobs in connection.execute(statement)}  # noqa: C416 (dict() has no type here)

    def published_in(self, queue: str, before: datetime, *, after_id: int = 0, limit: int = 1000) -> list[Row]:
        """Queued jobs of one queue that were published before this time, by id; `after_id` pages on."""
        return self._rows(_published_in(queue, before).where(_job.id > after_id).order_by(_job.id).limit(limit))

    def published_first_in(self, queue: str, before: datetime, *, limit: int) -> list[Row]:
        """As `published_in`, those first whose message was sent first: who gets a new one goes to the end."""
        return self._rows(_published_in(queue, before).order_by(_job.published_at, _job.id).limit(limit))

    def newest_running(self, queue: str) -> dict[int, int]:
        """Of each priority, the id of the newest row of a queue that is running."""
        statement = select(_job.priority, func.max(_job.id)).where(_job.queue == queue, is_one_of(ACTIVE))
        with self._reading() as connection:
            return {priority: newest for priority, newest in connection.execute(statement.group_by(_job.priority))}  # noqa: C416 (dict() has no type here)

    def newest(self) -> int:
        """The id of the newest row."""
        with self._reading() as connection:
            return connection.execute(select(func.max(_job.id))).scalar() or 0

    def republish(self, job_id: str, publication: int, reason: str) -> bool:
        """Give a queued job the next publication, to be sent at once by the dispatcher; False if it has moved on."""
        with self._writing("republish", job_id, publication) as (connection, at, _), self.database.transaction():
            row = connection.execute(
                update(task_queue)
                .where(of_job, _IS_QUEUED, _job.publication == publication)
                .values(**RESTING, run_after_utc=self._clock(), updated_at=at, sequence=_job.sequence + 1)
                .returning(_job.job_id, _job.sequence),
                {"b_job_id": job_id},
            ).one_or_none()
            if row is None:
                return False
            log(connection, row.job_id, row.sequence, Event.REPUBLISHED, None, at, reason)
            return True

    def expired(self, limit: int = 1000) -> list[Row]:
        """Queued jobs whose time is over."""
        return self._rows(select(task_queue).where(_IS_QUEUED, _job.expires_at <= self._clock()).limit(limit))

    def queued_in(self, queue: str, limit: int = 1000) -> Collection[Row]:
        """Queued jobs of one queue, whatever they wait for."""
        statement = select(task_queue).where(_job.queue == queue, _IS_QUEUED).order_by(_job.id).limit(limit)
        return self._rows(statement)


def _published_in(queue: str, before: datetime) -> Select[Any]:
    columns = (_job.id, _job.job_id, _job.publication, _job.priority, _job.run_after_utc, _job.published_at)
    return select(*columns).where(_job.queue == queue, _IS_QUEUED, _job.published_at < before)
