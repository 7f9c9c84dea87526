"""The store: every read and write of the job tables, as single atomic statements that carry their fence.

What flows in are plain values, what flows out frozen records. Each transition writes its `task_logs` row in the same
transaction, numbered per job. A write that comes too late (another publication, another attempt, a terminal row)
changes nothing and returns None, False or a decision; none raises for it. Every method is safe to repeat.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from importlib import import_module
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, RowMapping, Select, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from db import schema, statements
from db.engine import Database
from db.models import task_groups, task_logs, task_queue, worker_heartbeats
from db.records import ChordParts, Claim, Decision, Failure, Heartbeat, NewJob, Publication, Status, now
from db.statements import RETURNED, UNFINISHED, UNSUCCESSFUL, is_one_of, of_attempt, of_job

STOPPED: Final = "stopped"
IDS_IN_ONE_QUERY: Final = 1000
LAST_CHARACTER: Final = chr(0x10FFFF)
UNCONFIRMED_KEPT: Final = 1000


class _Write(NamedTuple):
    """One try of a write: its time is how a repeated call recognises a commit whose answer was lost."""

    connection: Connection
    at: datetime
    earlier: Collection[datetime]


class Store:
    """All reads and writes of the job tables.

    Args:
        database: Where they are. Its schema is checked (SQLite: made) at the first use by each process.
    """

    def __init__(self, database: Database) -> None:
        self.database: Final = database
        dialect = import_module(f"sqlalchemy.dialects.{'sqlite' if database.is_sqlite else 'postgresql'}")
        self._insert: Final = dialect.insert
        self._enqueue: Final = statements.enqueue(dialect)
        self._unconfirmed: Final[dict[tuple[str | int | None, ...], set[datetime]]] = {}

    # Jobs: submitted

    def enqueue(self, job: NewJob, *, worker_id: str | None = None) -> Publication | None:
        """Write a new job as queued; None if its id is there already: the row stays as it is and needs no message."""
        with self._writing("enqueue", job.job_id) as (connection, at, earlier):
            if self._enqueue_in(connection, job, worker_id, at):
                return Publication(1, job.priority)
            standing = _standing(connection, job.job_id) if earlier else None
            return Publication(1, job.priority) if standing and standing["created_at"] in earlier else None

    def _enqueue_in(
        self, connection: Connection, job: NewJob, worker_id: str | None, at: datetime, publication: int = 1
    ) -> bool:
        values = {f"b_{name}": getattr(job, name) for name in job.__slots__}
        bound = values | {"b_publication": publication, "b_worker": worker_id, "b_now": at}
        return self._enqueue.execute(connection, bound) is not None

    def requeue(
        self,
        job_id: str,
        *,
        attempt: int,
        event: str,
        retry_count: int,
        run_after_utc: datetime | None = None,
        failure: Failure | None = None,
    ) -> Publication | None:
        """End `attempt` and queue the job again under the next publication; None if it came too late."""
        with self._writing("requeue", job_id, attempt) as (connection, at, earlier), self.database.transaction():
            row = connection.execute(
                update(task_queue)
                .where(of_attempt)
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=retry_count,
                    run_after_utc=run_after_utc,
                    published_at=at,
                    updated_at=at,
                    sequence=task_queue.c.sequence + 1,
                    **_failure_columns(failure),
                )
                .returning(*RETURNED),
                {"b_job_id": job_id, "b_attempt": attempt},
            ).one_or_none()
            if row is None:
                return _published(connection, job_id, earlier)
            details = {"retry_count": retry_count, "run_after_utc": run_after_utc and run_after_utc.isoformat()}
            _log_failure(connection, job_id, row.sequence, event, row.claimed_by, at, failure, details)
            return Publication(row.publication, row.priority)

    def replay(self, job_id: str) -> Publication | None:
        """Queue a failed or cancelled job again, as new; None if it is neither."""
        with self._writing("replay", job_id) as (connection, at, earlier), self.database.transaction():
            row = connection.execute(
                update(task_queue)
                .where(of_job, is_one_of(UNSUCCESSFUL))
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=0,
                    deaths=0,
                    progress=0.0,
                    stage=None,
                    run_after_utc=None,
                    completed_at=None,
                    published_at=at,
                    updated_at=at,
                    sequence=task_queue.c.sequence + 1,
                    **_failure_columns(None),
                )
                .returning(*RETURNED),
                {"b_job_id": job_id},
            ).one_or_none()
            if row is None:
                return _published(connection, job_id, earlier)
            _log(connection, job_id, row.sequence, "replayed", None, at)
            return Publication(row.publication, row.priority)

    # Jobs: claimed, running, ended

    def claim(
        self,
        job: NewJob,
        *,
        publication: int,
        worker_id: str,
        is_redelivered: bool,
        holder_timeout_s: float,
        max_deaths: int,
    ) -> Claim:
        """Claim the job for one attempt, in one atomic step: queued -> claimed + running.

        A job without a row (its message came from another Celery client) gets one first. A row that is already running
        is taken over when the broker redelivered its message (RabbitMQ and the embedded broker do so only after a
        loss), or when its holder has not been heard of for `holder_timeout_s`; the attempt found dead counts as a
        death, and from `max_deaths` on the claim is POISON: claimed, to be failed by the caller.
        """
        job_id = job.job_id
        with self._writing("claim", job_id, publication, worker_id) as (connection, at, earlier):
            bound = {"b_job_id": job_id, "b_publication": publication, "b_worker": worker_id, "b_now": at}
            row = statements.CLAIM.execute(connection, bound)
            if row is None and _standing(connection, job_id) is None:
                self._enqueue_in(connection, job, worker_id, at, publication)
                row = statements.CLAIM.execute(connection, bound)
            if row is not None:
                return _running(row.attempt, row.deaths, max_deaths)
            standing = connection.execute(statements.STANDING, bound).mappings().one()
            is_dead = is_redelivered or not _is_alive(standing, at, holder_timeout_s)
            return self._claim_standing(connection, standing, bound, is_dead, max_deaths, earlier)

    def _claim_standing(
        self,
        connection: Connection,
        standing: RowMapping,
        bound: dict[str, Any],
        is_dead: bool,
        max_deaths: int,
        earlier: Collection[datetime],
    ) -> Claim:
        """Decide on a row that is not queued under this publication."""
        status, holder = Status(standing["status"]), standing["claimed_by"]
        if status.is_terminal:
            return Claim(Decision(status.value))
        if standing["publication"] != bound["b_publication"] or status is Status.QUEUED:
            return Claim(Decision.STALE)
        if standing["claimed_at"] in earlier:
            return _running(standing["attempt"], standing["deaths"], max_deaths)
        if not is_dead:
            return Claim(Decision.HELD, holder=holder)
        with self.database.transaction():
            row = statements.TAKE_OVER.execute(connection, bound | {"b_attempt": standing["attempt"]})
            if row is None:
                return Claim(Decision.HELD, holder=holder)
            details = {"attempt": standing["attempt"], "deaths": row.deaths}
            said = "its worker process died"
            _log(connection, row.job_id, row.sequence - 2, "lost", holder, bound["b_now"], said, details)
        return _running(row.attempt, row.deaths, max_deaths, holder)

    def owns(self, job_id: str, attempt: int) -> bool:
        """The fencing check: whether `attempt` is still the running one."""
        with self._reading() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt}
            return connection.execute(statements.OWNS, bound).scalar() is not None

    def progress(self, job_id: str, attempt: int, *, percent: float, stage: str | None = None) -> bool:
        """Write how far the attempt is, 0-100. Not a transition: no log row, no sequence number."""
        with self._changing() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt, "b_progress": percent, "b_now": now()}
            return connection.execute(statements.PROGRESS, bound | {"b_stage": _text(stage, 255)}).rowcount == 1

    def complete(self, job_id: str, attempt: int, result: Any) -> bool:
        """running -> completed. False if this attempt no longer owns the job; True again when it is repeated."""
        with self._changing() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt, "b_result": result, "b_now": now(), "b_worker": None}
            if statements.COMPLETE.execute(connection, bound) is not None:
                return True
            return _has_ended(connection, job_id, Status.COMPLETED, attempt)

    def end(
        self,
        job: NewJob,
        status: Status,
        failure: Failure,
        *,
        attempt: int | None = None,
        publication: int | None = None,
    ) -> bool:
        """Any unfinished status -> failed or cancelled; a job without a row gets one, ended.

        `attempt` fences a write by the attempt itself, `publication` one by somebody who only knows the message.
        False if it came too late; True again when it is repeated by the attempt, or after a lost connection.
        """
        of_fence = []
        if attempt is not None:
            of_fence.append(task_queue.c.attempt == attempt)
        if publication is not None:
            of_fence.append(task_queue.c.publication == publication)
        key = ("end", job.job_id, status.value, attempt, publication)
        with self._writing(*key) as (connection, at, earlier), self.database.transaction():
            ending = (
                update(task_queue)
                .where(of_job, is_one_of(UNFINISHED), *of_fence)
                .values(
                    status=status,
                    completed_at=at,
                    updated_at=at,
                    sequence=task_queue.c.sequence + 1,
                    **_failure_columns(failure),
                )
                .returning(*RETURNED)
            )
            row = connection.execute(ending, {"b_job_id": job.job_id}).one_or_none()
            # An attempt had a row: if that is gone, so is its job.
            if row is None and attempt is None and self._enqueue_in(connection, job, None, at, publication or 1):
                row = connection.execute(ending, {"b_job_id": job.job_id}).one()
            if row is None:
                return _has_ended(connection, job.job_id, status, attempt, earlier)
            _log_failure(connection, job.job_id, row.sequence, status.value, row.claimed_by, at, failure, {})
            return True

    # Groups and chords

    def save_group(self, group_id: str, members: Any) -> None:
        """Keep the ids of a group's members, for `GroupResult.restore`."""
        self._upsert_group(group_id, {"members": members})

    def group(self, group_id: str) -> Any:
        with self._reading() as connection:
            statement = select(task_groups.c.members).where(task_groups.c.group_id == group_id)
            return connection.execute(statement).scalar()

    def forget_group(self, group_id: str) -> None:
        self._upsert_group(group_id, {"members": None})

    def set_chord_size(self, group_id: str, size: int) -> None:
        """How many members a chord has; known before the last one is sent."""
        self._upsert_group(group_id, {"size": size})

    def _upsert_group(self, group_id: str, values: dict[str, Any]) -> None:
        statement = (
            self._insert(task_groups)
            .values(group_id=group_id, created_at=now(), **values)
            .on_conflict_do_update(index_elements=["group_id"], set_=values)
        )
        with self._changing() as connection:
            connection.execute(statement)

    def chord_parts(self, group_id: str, size: int | None) -> ChordParts:
        """Count a chord's ended members. The one call that finds all completed, or the first that finds one failed,
        gets `is_mine`: an atomic update, so the body is published once, however often members are delivered.

        Call it after the member's end is committed: whoever ends last then sees all the others.
        """
        bound = {"b_group_id": group_id}
        with self._reading() as connection:
            chord = connection.execute(statements.CHORD, bound).one()
            if not chord.is_failed:
                total = size if chord.size is None else chord.size
                if chord.is_running or total is None:
                    return ChordParts(is_mine=False, is_failed=False)
                if connection.execute(statements.CHORD_COMPLETED, bound).scalar_one() < total:
                    return ChordParts(is_mine=False, is_failed=False)
        is_mine = self._fire(group_id)
        if chord.is_failed:
            return ChordParts(is_mine, is_failed=True)
        with self._reading() as connection:
            results = tuple(connection.execute(statements.CHORD_RESULTS, bound).scalars())
        return ChordParts(is_mine, is_failed=False, results=results)

    def _fire(self, group_id: str) -> bool:
        """Whether this call is the one that fires the chord, the first of all."""
        with self._writing("fire", group_id) as (connection, at, earlier):
            firing = (
                self._insert(task_groups)
                .values(group_id=group_id, created_at=at, fired_at=at)
                .on_conflict_do_update(
                    index_elements=["group_id"], set_={"fired_at": at}, where=task_groups.c.fired_at.is_(None)
                )
                .returning(task_groups.c.fired_at)
            )
            if connection.execute(firing).scalar() is not None:
                return True
            if not earlier:
                return False
            fired = select(task_groups.c.fired_at).where(task_groups.c.group_id == group_id)
            return connection.execute(fired).scalar() in earlier

    def failed_member(self, group_id: str) -> RowMapping | None:
        """The member that failed or was cancelled first: the reason why its chord fails."""
        with self._reading() as connection:
            statement = (
                select(task_queue)
                .where(task_queue.c.group_id == group_id, task_queue.c.in_chord, is_one_of(UNSUCCESSFUL))
                .order_by(task_queue.c.completed_at, task_queue.c.id)
                .limit(1)
            )
            return connection.execute(statement).mappings().one_or_none()

    # Workers

    def heartbeat(self, beat: Heartbeat) -> None:
        """Show a worker; its row is made at the first beat."""
        values = {name: getattr(beat, name) for name in beat.__slots__} | {"last_heartbeat": now()}
        values["capabilities"], values["current_tasks"] = list(beat.capabilities), list(beat.current_tasks)
        values["strategy"] = _text(beat.strategy, 255)
        statement = self._insert(worker_heartbeats).values(values)
        with self._changing() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["worker_id"], set_=values))

    def log_worker(
        self, worker_id: str | None, event: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """A change that belongs to no job: a worker's start or stop, a message that could not be read."""
        with self._changing() as connection:
            _log(connection, None, 0, event, worker_id, now(), message, details)

    def workers(self, *, heard_within_s: float | None = None) -> list[RowMapping]:
        """The worker_heartbeats rows; only those alive if `heard_within_s` is given."""
        statement = select(worker_heartbeats).order_by(worker_heartbeats.c.worker_id)
        if heard_within_s is not None:
            since = now() - timedelta(seconds=heard_within_s)
            statement = statement.where(
                worker_heartbeats.c.last_heartbeat >= since, worker_heartbeats.c.status != STOPPED
            )
        return self._rows(statement)

    # Reading

    def job(self, job_id: str) -> RowMapping | None:
        """The task_queue row of a job."""
        with self._reading() as connection:
            return connection.execute(statements.JOB, {"b_job_id": job_id}).mappings().one_or_none()

    def jobs_by_id(self, job_ids: Sequence[str]) -> list[RowMapping]:
        """The rows of several jobs, without order; ids that have none are missing."""
        found: list[RowMapping] = []
        for start in range(0, len(job_ids), IDS_IN_ONE_QUERY):
            some = job_ids[start : start + IDS_IN_ONE_QUERY]
            found += self._rows(select(task_queue).where(task_queue.c.job_id.in_(some)))
        return found

    def jobs(
        self, *, status: Status | None = None, task_type: str | None = None, id_prefix: str = "", limit: int = 50
    ) -> list[RowMapping]:
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

    def logs(self, job_id: str) -> list[RowMapping]:
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

    def _rows(self, statement: Select[Any]) -> list[RowMapping]:
        with self._reading() as connection:
            return list(connection.execute(statement).mappings())

    # Connections

    def _reading(self) -> AbstractContextManager[Connection]:
        schema.ensure_schema(self.database)
        return self.database.reading()

    def _changing(self) -> AbstractContextManager[Connection]:
        """For one change, which is one statement in PostgreSQL and needs no transaction there."""
        schema.ensure_schema(self.database)
        return self.database.transaction() if self.database.is_sqlite else self.database.reading()

    @contextmanager
    def _writing(self, *key: str | int | None) -> Iterator[_Write]:
        """As `_changing`, for a write that a repeated call (same `key`) has to recognise as its own.

        When a connection is lost at the end of a write, it may be committed or not. Its time is kept until the call is
        repeated, as `db.engine.patiently` does; the times of a caller who gives up are dropped in the end.
        """
        at = now()
        try:
            with self._changing() as connection:
                yield _Write(connection, at, self._unconfirmed.get(key, ()))
        except SQLAlchemyError:
            self._unconfirmed.setdefault(key, set()).add(at)
            if len(self._unconfirmed) > UNCONFIRMED_KEPT:
                self._unconfirmed.pop(next(iter(self._unconfirmed)), None)
            raise
        self._unconfirmed.pop(key, None)


def _standing(connection: Connection, job_id: str) -> RowMapping | None:
    return connection.execute(statements.STANDING, {"b_job_id": job_id}).mappings().one_or_none()


def _published(connection: Connection, job_id: str, at: Collection[datetime]) -> Publication | None:
    """The publication that was written at one of these times."""
    standing = _standing(connection, job_id) if at else None
    if standing is None or standing["published_at"] not in at:
        return None
    return Publication(standing["publication"], standing["priority"])


def _has_ended(
    connection: Connection, job_id: str, status: Status, attempt: int | None, at: Collection[datetime] = ()
) -> bool:
    """Whether the job was ended in this way by this attempt, or at one of these times."""
    standing = _standing(connection, job_id) if attempt is not None or at else None
    if standing is None or standing["status"] != status:
        return False
    return standing["attempt"] == attempt or standing["completed_at"] in at


def _running(attempt: int, deaths: int, max_deaths: int, holder: str | None = None) -> Claim:
    decision = Decision.POISON if deaths >= max_deaths else Decision.RUN
    return Claim(decision, attempt=attempt, deaths=deaths, holder=holder)


def _is_alive(standing: RowMapping, at: datetime, timeout_s: float) -> bool:
    heard = standing["last_heartbeat"]
    if heard is None or standing["worker_status"] == STOPPED:
        return False
    return bool((at - heard).total_seconds() <= timeout_s)


def _log(
    connection: Connection,
    job_id: str | None,
    sequence: int,
    event: str,
    worker_id: str | None,
    at: datetime,
    message: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    row = statements.log_row(job_id, sequence, event, worker_id, at, _text(message), details)
    connection.execute(statements.LOG, row)


def _log_failure(
    connection: Connection,
    job_id: str,
    sequence: int,
    event: str,
    worker_id: str | None,
    at: datetime,
    failure: Failure | None,
    details: Mapping[str, Any],
) -> None:
    message = None if failure is None else f"{failure.error_type}: {failure.error_message}"
    everything = {**details, **((failure and failure.details) or {})}
    _log(connection, job_id, sequence, event, worker_id, at, message, everything or None)


def _failure_columns(failure: Failure | None) -> dict[str, str | None]:
    if failure is None:
        return {"error_type": None, "error_module": None, "error_message": None}
    return {
        "error_type": _text(failure.error_type, 255),
        "error_module": _text(failure.error_module, 255),
        "error_message": _text(failure.error_message),
    }


def _text(text: str | None, length: int | None = None) -> str | None:
    """Text that every database takes: names of files may hold bytes that are no UTF-8, and messages NULs."""
    if text is None:
        return None
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:length]
