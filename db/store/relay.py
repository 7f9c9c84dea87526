"""What is told onward of the job tables: the log in the order of its ids, and how far running jobs are.

A row can become visible after one with a higher id: PostgreSQL numbers a row when it is written, and shows it when its
transaction ends. So who reads on from a position comes back for the numbers that were missing, until nobody is left
who could show them (`log_writers`). In SQLite writers come one after the other.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from sqlalchemy import ColumnElement, Text, bindparam, case, cast, false, func, or_, select, text, update

from db.models import duties, task_logs, task_queue
from db.records import Event, Row, now
from db.statements import ACTIVE, is_one_of
from db.store.base import Part

_log: Final = task_logs.c
_job: Final = task_queue.c
_result: Final = cast(_job.result_data, Text)
_is_completed: Final = _log.event_type == Event.COMPLETED
_is_short: Final = func.length(_result) < bindparam("b_result_bytes")
_CHANGES: Final = (
    select(
        _log.id,
        _log.job_id,
        _log.sequence,
        _log.worker_id,
        _log.event_type,
        _log.message,
        _log.details,
        _log.created_at,
        _job.task_type,
        _job.root_id,
        _job.progress,
        _job.sequence.label("last_sequence"),
        case((_is_completed & _is_short, _result)).label("result"),
        (_is_completed & ~_is_short).label("is_truncated"),
    )
    .select_from(task_logs.outerjoin(task_queue, task_queue.c.job_id == _log.job_id))
    .order_by(_log.id)
    .limit(bindparam("b_limit"))
)
_CHANGES_AFTER: Final = _CHANGES.where(_log.id > bindparam("b_after"))
# Thousands of ranges are one statement of one length, and one look into the index each.
_CHANGES_OR_LATE: Final = _CHANGES.where(
    _log.id.in_(
        text(
            "SELECT late.id FROM unnest(CAST(:b_firsts AS bigint[]), CAST(:b_lasts AS bigint[])) AS range (first, last)"
            " CROSS JOIN LATERAL (SELECT id FROM task_logs WHERE id BETWEEN range.first AND range.last"
            " ORDER BY id LIMIT :b_limit) AS late"
            " UNION ALL (SELECT id FROM task_logs WHERE id > CAST(:b_after AS bigint) ORDER BY id LIMIT :b_limit)"
        ).columns(_log.id)
    )
)
_LAST: Final = select(func.max(_log.id))
# The others name the worker of the attempt, whoever writes them: a command, or a reconciler, perhaps of a worker that
# is just starting.
_LAST_OF_A_WORKER: Final = (
    select(_log.id)
    .where(
        _log.job_id.is_not(None),
        _log.worker_id.is_not(None),
        _log.event_type.not_in((Event.LOST, Event.FAILED, Event.CANCELLED)),
    )
    .order_by(_log.id.desc())
    .limit(1)
)
_RISING: Final = select(
    _job.job_id,
    _job.task_type,
    _job.root_id,
    _job.claimed_by,
    _job.attempt,
    _job.sequence,
    _job.progress,
    _job.stage,
    _job.updated_at,
).where(is_one_of(ACTIVE), _job.progress > 0)
# A writer holds this lock from before it takes a number until after its rows can be seen.
_WRITERS: Final = text(
    "SELECT virtualtransaction FROM pg_locks WHERE relation = 'task_logs'::regclass AND mode = 'RowExclusiveLock'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class Relaying(Part):
    """Reads for a relay, and its place in the log, which is kept with its duty."""

    def begin_relay(self, duty: str) -> None:
        """Fix where the log is told from, at the very first time: behind the last row that a worker wrote on a job.

        So what was submitted before the first worker is told from its first change on, and the history of workers that
        told nothing (BROADCAST_TYPE=noop) is not told. What still waited then, older than their last change, is told
        from its next change on: its first number is above 1.

        It has to come before a worker that relays can claim a job. That first time it reads the log backwards to the
        last row of a worker: all of it, if there is none.
        """
        position = select(duties.c.position).where(duties.c.name == duty)
        with self._reading() as connection:
            if connection.scalar(position) is not None:
                return
            begin = connection.scalar(_LAST_OF_A_WORKER) or 0
        new = self._insert(duties).values(name=duty, position=begin, since=now())
        is_first = duties.c.position.is_(None)
        with self._changing() as connection:
            connection.execute(
                new.on_conflict_do_update(index_elements=["name"], set_={"position": begin}, where=is_first)
            )

    def relay_position(self, duty: str, lease: str) -> int | None:
        """The id of the last log row that was told; None if the lease does not hold the duty."""
        is_mine = (duties.c.name == duty) & (duties.c.holder == lease)
        with self._reading() as connection:
            return connection.execute(select(duties.c.position).where(is_mine)).scalar()

    def relay_reached(self, duty: str, lease: str, position: int) -> bool:
        """Keep how far the log is told, never less than before; False if the lease does not hold the duty."""
        further = case((duties.c.position > position, duties.c.position), else_=position)
        moved = update(duties).where(duties.c.name == duty, duties.c.holder == lease).values(position=further)
        with self._changing() as connection:
            return connection.execute(moved).rowcount == 1

    def changes(
        self, after: int | None, missing: Sequence[tuple[int, int]], *, limit: int, result_bytes: int
    ) -> list[Row]:
        """Log rows after a position, if one is given, and those that are to be seen in the `missing` ranges of ids, in
        order.

        Rows of workers have no job_id. `result` is the JSON text of a completed job's result; empty, with
        `is_truncated`, if it is longer than `result_bytes`.
        """
        bound = {"b_limit": limit, "b_result_bytes": result_bytes}
        if not missing and after is not None:
            return self._rows(_CHANGES_AFTER, {**bound, "b_after": after})
        if not self.database.is_sqlite:
            firsts, lasts = [first for first, _ in missing], [last for _, last in missing]
            return self._rows(_CHANGES_OR_LATE, {**bound, "b_after": after, "b_firsts": firsts, "b_lasts": lasts})
        wanted: list[ColumnElement[bool]] = [_log.id.between(first, last) for first, last in missing]
        if after is not None:
            wanted.append(_log.id > after)
        return self._rows(_CHANGES.where(or_(false(), *wanted)), bound)

    def news(self) -> object:
        """What differs from the last answer if log rows were committed since.

        In SQLite that is a look at a file, which changes with every commit; one within a few milliseconds of an answer
        may not show: look again after a change. In PostgreSQL it is the last id that can be seen: the numbers of
        progress, and rows that come late, do not change it. There is no LISTEN for it, since a NOTIFY in each
        transaction would let them commit only one after the other. None where it can't be told.
        """
        path = self.database.path
        if path is None:
            with self._reading() as connection:
                return connection.scalar(_LAST) or 0
        try:
            status = os.stat(f"{path}-wal")  # noqa: PTH116 (called many times a second)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    @contextmanager
    def kept_connection(self) -> Iterator[None]:
        """Let this thread do all that it does in the block on one connection, instead of one of the pool each time.

        That is most of what a small read from PostgreSQL costs. SQLite has one connection, and a lock around each use.
        """
        if self.database.is_sqlite:
            yield
            return
        with self._reading():
            yield

    def log_writers(self) -> frozenset[str]:
        """The transactions that may have written log rows which can't be seen yet."""
        with self._reading() as connection:
            return frozenset(connection.execute(_WRITERS).scalars())

    def rising(self) -> list[Row]:
        """The running jobs that have said how far they are."""
        return self._rows(_RISING)
