"""How jobs come to be queued: submitted, once for each unique key, or replayed; each a single atomic change."""

from collections.abc import Collection
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, String, case, exists, literal, null, select, update
from sqlalchemy.exc import IntegrityError

from db import statements
from db.models import task_queue
from db.records import Event, NewJob, Publication, Sequel, Status
from db.statements import RETURNED, UNSUCCESSFUL, is_one_of, of_job
from db.store.base import Part, failure_columns, log, publication_at, standing_of

UNIQUE_TRIES: Final = 20
_SUBMITTED: Final = ("task_type", "queue", "parameters", "priority", "max_retries", "expires_at", "message")


class Submissions(Part):
    """New jobs, and old ones again."""

    def enqueue(self, job: NewJob, *, is_resting: bool = False) -> Publication | None:
        """Write a new job as queued; None if its id is there already: the row stays as it is and needs no message.

        A resting one is published later, by a dispatcher, when it is due.
        """
        with self._writing("enqueue", job.job_id) as (connection, at, earlier):
            return self._enqueued(connection, job, at, earlier, is_resting=is_resting)

    def _enqueued(
        self,
        connection: Connection,
        job: NewJob,
        at: datetime,
        earlier: Collection[datetime],
        *,
        is_resting: bool,
    ) -> Publication | None:
        if self._insert_job(connection, job, None, at, is_resting=is_resting):
            return Publication(1, job.priority, is_resting)
        standing = standing_of(connection, job.job_id) if earlier else None
        is_mine = standing is not None and standing["created_at"] in earlier
        return Publication(1, job.priority, is_resting) if is_mine else None

    def enqueue_unique(self, job: NewJob, *, is_resting: bool = False) -> tuple[str, Publication | None]:
        """As `enqueue`, unless a job with the same `unique_key` lives: then its id, and None.

        A key is free again when its job has ended, or at its `unique_until`.
        """
        for tries_left in reversed(range(UNIQUE_TRIES)):
            try:
                with (
                    self._writing("enqueue", job.job_id) as (_, at, earlier),
                    self.database.transaction() as connection,
                ):
                    living = _holder_of_key(connection, job, at)
                    if living is not None and living != job.job_id:
                        return living, None
                    return job.job_id, self._enqueued(connection, job, at, earlier, is_resting=is_resting)
            except IntegrityError:  # another submission was faster; it is found now, or its job has ended already
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def living(self, unique_key: str) -> str | None:
        """The id of the unfinished job with this key."""
        with self._reading() as connection:
            return _living(connection, unique_key)

    def replay(
        self,
        job_id: str,
        *,
        job: NewJob | None = None,
        is_resting: bool = False,
        only_unsent: bool = False,
    ) -> Publication | None:
        """Queue a failed or cancelled job again, as new; None if it is neither.

        Args:
            job: What is submitted now: a step of a chain, say, whose arguments hold the new result before it.
            only_unsent: Only a job that was never sent: it ended with the one that it waited for, which lives again.

        Raises:
            sqlalchemy.exc.IntegrityError: Another job with its `unique_key` lives.
        """
        c = task_queue.c
        delay_s = job.delay_s if job is not None else 0.0
        fences: list[Any] = []
        if only_unsent:
            parent = task_queue.alias()
            is_over = parent.c.status.in_(UNSUCCESSFUL)
            fences = [c.published_at.is_(None), c.run_after_utc.is_(None)]
            fences += [~exists().where(parent.c.job_id == job.parent_id, is_over)] if job and job.parent_id else []
        with self._writing("replay", job_id) as (connection, at, earlier), self.database.transaction():
            row = connection.execute(
                update(task_queue)
                .where(of_job, is_one_of(UNSUCCESSFUL), *fences)
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=0,
                    deaths=0,
                    deliveries=0,
                    progress=0.0,
                    stage=None,
                    run_after_utc=((job and job.run_after_utc) or self._clock(-delay_s)) if is_resting else None,
                    completed_at=None,
                    published_at=None if is_resting else at,
                    updated_at=at,
                    sequel=case((task_queue.c.sequel.is_not(None), literal(Sequel.PENDING, String)), else_=null()),
                    sequence=task_queue.c.sequence + 1,
                    **failure_columns(None),
                    **({name: getattr(job, name) for name in _SUBMITTED} if job is not None else {"expires_at": None}),
                )
                .returning(*RETURNED),
                {"b_job_id": job_id},
            ).one_or_none()
            if row is None:
                return publication_at(connection, job_id, earlier, is_resting)
            log(connection, job_id, row.sequence, Event.REPLAYED, None, at)
            return Publication(row.publication, row.priority, is_resting)


def _living(connection: Connection, unique_key: str) -> str | None:
    statement = select(task_queue.c.job_id).where(task_queue.c.unique_key == unique_key, statements.HOLDS_KEY)
    return connection.execute(statement).scalar()


def _holder_of_key(connection: Connection, job: NewJob, at: datetime) -> str | None:
    """The job that has the key, whose time may be over: then it gives the key up."""
    c = task_queue.c
    over = update(task_queue).where(c.unique_key == job.unique_key, statements.HOLDS_KEY, c.unique_until <= at)
    connection.execute(over.values(unique_key=None))
    return _living(connection, job.unique_key or "")
