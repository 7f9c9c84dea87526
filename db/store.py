"""The store: every read and write of the job tables, as single atomic statements that carry their fence.

What flows in are plain values, what flows out frozen records. Each transition writes its `task_logs` row in the same
transaction, numbered per job. A write that comes too late (another publication, another attempt, a terminal row)
changes nothing and returns None, False or a decision; none raises for it. Every method is safe to repeat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from sqlalchemy import (
    Connection,
    RowMapping,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from db import schema
from db.engine import Database
from db.models import Status, task_groups, task_logs, task_queue, worker_heartbeats

ACTIVE: Final = (Status.CLAIMED, Status.RUNNING)
UNFINISHED: Final = (Status.QUEUED, Status.CLAIMED, Status.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it is submitted. `message` holds what is needed to publish it again."""

    job_id: str
    task_type: str
    queue: str
    parameters: Mapping[str, Any]
    priority: int = 5
    max_retries: int | None = None
    retry_count: int = 0
    run_after_utc: datetime | None = None
    expires_at: datetime | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group_id: str | None = None
    group_index: int | None = None
    in_chord: bool = False
    message: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """A message to send: its number, and the row's priority (1-10), to be mapped once for the broker."""

    number: int
    priority: int


class Decision(Enum):
    """What the guard has to do with a message."""

    RUN = "run"
    POISON = "poison"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STALE = "stale"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Claim:
    """The guard's claim. `attempt` is the fencing token that every later write of this attempt carries."""

    decision: Decision
    attempt: int = 0
    deaths: int = 0
    holder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed, as it stands in its row. `details` goes to the log only."""

    error_type: str
    error_message: str
    error_module: str | None = None
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a worker says of itself."""

    worker_id: str
    hostname: str
    pid: int
    capabilities: Sequence[str]
    concurrency: int
    status: str
    started_at: datetime
    strategy: str | None = None
    current_tasks: Sequence[str] = field(default_factory=list)
    tasks_processed: int = 0
    tasks_failed: int = 0


@dataclass(frozen=True, slots=True)
class ChordParts:
    """How far a chord has come. `is_mine` is True for the one caller that has to publish (or fail) its body."""

    is_mine: bool
    is_failed: bool
    results: Sequence[Any] = ()


def now() -> datetime:
    return datetime.now(UTC)


_of_job = task_queue.c.job_id == bindparam("b_job_id")
_of_attempt = and_(_of_job, task_queue.c.attempt == bindparam("b_attempt"), task_queue.c.status.in_(ACTIVE))
_next = task_queue.c.sequence + 1

_CLAIMED_COLUMNS: Final = {
    "status": Status.RUNNING,
    "claimed_by": bindparam("b_worker"),
    "claimed_at": bindparam("b_now"),
    "started_at": bindparam("b_now"),
    "updated_at": bindparam("b_now"),
    "progress": 0.0,
    "stage": None,
    "attempt": task_queue.c.attempt + 1,
    "deliveries": task_queue.c.deliveries + 1,
}
_CLAIM: Final = (
    update(task_queue)
    .where(_of_job, task_queue.c.publication == bindparam("b_publication"), task_queue.c.status == Status.QUEUED)
    .values(**_CLAIMED_COLUMNS, sequence=task_queue.c.sequence + 2)
    .returning(task_queue.c.attempt, task_queue.c.deaths, task_queue.c.sequence)
)
_TAKE_OVER: Final = (
    update(task_queue)
    .where(_of_attempt)
    .values(**_CLAIMED_COLUMNS, sequence=task_queue.c.sequence + 3, deaths=task_queue.c.deaths + 1)
    .returning(task_queue.c.attempt, task_queue.c.deaths, task_queue.c.sequence)
)
_STANDING: Final = (
    select(
        task_queue.c.status,
        task_queue.c.publication,
        task_queue.c.attempt,
        task_queue.c.deaths,
        task_queue.c.claimed_by,
        worker_heartbeats.c.last_heartbeat,
        worker_heartbeats.c.status.label("worker_status"),
    )
    .select_from(task_queue.outerjoin(worker_heartbeats, worker_heartbeats.c.worker_id == task_queue.c.claimed_by))
    .where(_of_job)
)
_COMPLETE: Final = (
    update(task_queue)
    .where(_of_attempt)
    .values(
        status=Status.COMPLETED,
        progress=100.0,
        result_data=bindparam("b_result"),
        error_type=None,
        error_module=None,
        error_message=None,
        completed_at=bindparam("b_now"),
        updated_at=bindparam("b_now"),
        sequence=_next,
    )
    .returning(task_queue.c.sequence, task_queue.c.claimed_by)
)
_PROGRESS: Final = (
    update(task_queue)
    .where(_of_attempt)
    .values(progress=bindparam("b_progress"), stage=bindparam("b_stage"), updated_at=bindparam("b_now"))
)
_OWNS: Final = select(literal(1)).select_from(task_queue).where(_of_attempt)
_LOG: Final = insert(task_logs)


class Store:
    """All reads and writes of the job tables.

    Args:
        database: Where they are. Its schema is checked (SQLite: made) at the first use by each process.
    """

    def __init__(self, database: Database) -> None:
        self.database: Final = database
        dialect = sqlite if database.is_sqlite else postgresql
        self._insert: Final = dialect.insert
        self._enqueue: Final = (
            dialect.insert(task_queue).on_conflict_do_nothing(index_elements=["job_id"]).returning(task_queue.c.id)
        )
        self._is_ready = False

    # Jobs: submitted

    def enqueue(self, job: NewJob, *, worker_id: str | None = None) -> Publication | None:
        """Write a new job as queued; None if its id is there already: the row stays as it is and needs no message."""
        with self._transaction() as connection:
            return Publication(1, job.priority) if self._enqueue_in(connection, job, worker_id) else None

    def _enqueue_in(self, connection: Connection, job: NewJob, worker_id: str | None) -> bool:
        at = now()
        values = {name: getattr(job, name) for name in job.__slots__}
        inserted = connection.execute(
            self._enqueue, values | {"status": Status.QUEUED, "created_at": at, "updated_at": at, "published_at": at}
        )
        if inserted.one_or_none() is None:
            return False
        self._log(connection, job.job_id, 1, "created", worker_id, at)
        return True

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
        at = now()
        with self._transaction() as connection:
            row = connection.execute(
                update(task_queue)
                .where(_of_attempt)
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=retry_count,
                    run_after_utc=run_after_utc,
                    published_at=at,
                    updated_at=at,
                    sequence=_next,
                    **_failure_columns(failure),
                )
                .returning(
                    task_queue.c.publication, task_queue.c.priority, task_queue.c.sequence, task_queue.c.claimed_by
                ),
                {"b_job_id": job_id, "b_attempt": attempt},
            ).one_or_none()
            if row is None:
                return None
            details = {"retry_count": retry_count, "run_after_utc": run_after_utc and run_after_utc.isoformat()}
            self._log_failure(connection, job_id, row.sequence, event, row.claimed_by, at, failure, details)
            return Publication(row.publication, row.priority)

    def replay(self, job_id: str) -> Publication | None:
        """Queue a failed or cancelled job again, as new; None if it is neither."""
        at = now()
        with self._transaction() as connection:
            row = connection.execute(
                update(task_queue)
                .where(_of_job, task_queue.c.status.in_((Status.FAILED, Status.CANCELLED)))
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=0,
                    deaths=0,
                    progress=0.0,
                    run_after_utc=None,
                    completed_at=None,
                    published_at=at,
                    updated_at=at,
                    sequence=_next,
                    **_failure_columns(None),
                )
                .returning(task_queue.c.publication, task_queue.c.priority, task_queue.c.sequence),
                {"b_job_id": job_id},
            ).one_or_none()
            if row is None:
                return None
            self._log(connection, job_id, row.sequence, "replayed", None, at)
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
        """Claim the job for one attempt, in one transaction: queued -> claimed + running.

        A job without a row (its message came from another Celery client) gets one first. A row that is already running
        is taken over when the broker redelivered its message (RabbitMQ and the embedded broker do so only after a
        loss), or when its holder has not been heard of for `holder_timeout_s`; the attempt found dead counts as a
        death, and from `max_deaths` on the claim is POISON: claimed, to be failed by the caller.
        """
        bound = {"b_job_id": job.job_id, "b_publication": publication, "b_worker": worker_id, "b_now": now()}
        with self._transaction() as connection:
            row = connection.execute(_CLAIM, bound).one_or_none()
            if row is None:
                standing = connection.execute(_STANDING, {"b_job_id": job.job_id}).mappings().one_or_none()
                if standing is None:
                    self._enqueue_in(connection, job, worker_id)
                    row = connection.execute(_CLAIM, bound | {"b_publication": 1}).one()
                else:
                    return self._claim_standing(
                        connection, standing, bound, is_redelivered, holder_timeout_s, max_deaths
                    )
            self._log_claim(connection, job.job_id, row.sequence, worker_id, bound["b_now"], row.attempt)
            return Claim(Decision.RUN, attempt=row.attempt, deaths=row.deaths)

    def _claim_standing(
        self,
        connection: Connection,
        standing: RowMapping,
        bound: dict[str, Any],
        is_redelivered: bool,
        holder_timeout_s: float,
        max_deaths: int,
    ) -> Claim:
        status = Status(standing["status"])
        if status.is_terminal:
            return Claim(Decision(status.value))
        if standing["publication"] != bound["b_publication"] or status is Status.QUEUED:
            return Claim(Decision.STALE)
        holder = standing["claimed_by"]
        if not is_redelivered and _is_alive(standing, bound["b_now"], holder_timeout_s):
            return Claim(Decision.HELD, holder=holder)
        row = connection.execute(_TAKE_OVER, bound | {"b_attempt": standing["attempt"]}).one_or_none()
        if row is None:
            return Claim(Decision.HELD, holder=holder)
        job_id, worker_id, at = bound["b_job_id"], bound["b_worker"], bound["b_now"]
        details = {"attempt": standing["attempt"], "deaths": row.deaths}
        self._log(connection, job_id, row.sequence - 2, "lost", holder, at, "its worker process died", details)
        self._log_claim(connection, job_id, row.sequence, worker_id, at, row.attempt)
        decision = Decision.POISON if row.deaths >= max_deaths else Decision.RUN
        return Claim(decision, attempt=row.attempt, deaths=row.deaths, holder=holder)

    def owns(self, job_id: str, attempt: int) -> bool:
        """The fencing check: whether `attempt` is still the running one."""
        with self._reading() as connection:
            return connection.execute(_OWNS, {"b_job_id": job_id, "b_attempt": attempt}).scalar() is not None

    def progress(self, job_id: str, attempt: int, *, percent: float, stage: str | None = None) -> bool:
        """Write how far the attempt is, 0-100. Not a transition: no log row, no sequence number."""
        bound = {"b_job_id": job_id, "b_attempt": attempt, "b_progress": percent, "b_stage": stage, "b_now": now()}
        with self._transaction() as connection:
            return connection.execute(_PROGRESS, bound).rowcount == 1

    def complete(self, job_id: str, attempt: int, result: Any) -> bool:
        """running -> completed. False if this attempt no longer owns the job; True again when it is repeated."""
        at = now()
        bound = {"b_job_id": job_id, "b_attempt": attempt, "b_result": result, "b_now": at}
        with self._transaction() as connection:
            row = connection.execute(_COMPLETE, bound).one_or_none()
            if row is None:
                return self._ended_as(connection, job_id, attempt, Status.COMPLETED)
            self._log(connection, job_id, row.sequence, "completed", row.claimed_by, at)
            return True

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
        """
        at = now()
        of_fence = [_of_job, task_queue.c.status.in_(UNFINISHED)]
        if attempt is not None:
            of_fence.append(task_queue.c.attempt == attempt)
        if publication is not None:
            of_fence.append(task_queue.c.publication == publication)
        ending = (
            update(task_queue)
            .where(*of_fence)
            .values(status=status, completed_at=at, updated_at=at, sequence=_next, **_failure_columns(failure))
            .returning(task_queue.c.sequence, task_queue.c.claimed_by)
        )
        with self._transaction() as connection:
            row = connection.execute(ending, {"b_job_id": job.job_id}).one_or_none()
            if row is None and self._enqueue_in(connection, job, None):
                row = connection.execute(ending, {"b_job_id": job.job_id}).one_or_none()
            if row is None:
                return attempt is not None and self._ended_as(connection, job.job_id, attempt, status)
            self._log_failure(connection, job.job_id, row.sequence, status.value, row.claimed_by, at, failure, {})
            return True

    def _ended_as(self, connection: Connection, job_id: str, attempt: int, status: Status) -> bool:
        standing = connection.execute(_STANDING, {"b_job_id": job_id}).mappings().one_or_none()
        return standing is not None and (standing["status"], standing["attempt"]) == (status, attempt)

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
        with self._transaction() as connection:
            connection.execute(statement)

    def chord_parts(self, group_id: str, size: int | None) -> ChordParts:
        """Count a chord's ended members. The one call that finds all completed, or the first that finds one failed,
        gets `is_mine`: an atomic update, so the body is published once, however often members are delivered.
        """
        members = and_(task_queue.c.group_id == group_id, task_queue.c.in_chord)
        counts = select(
            func.coalesce(func.sum(case((task_queue.c.status == Status.COMPLETED, 1), else_=0)), 0).label("completed"),
            func.coalesce(
                func.sum(case((task_queue.c.status.in_((Status.FAILED, Status.CANCELLED)), 1), else_=0)), 0
            ).label("failed"),
        ).where(members)
        with self._transaction() as connection:
            chord = self._insert(task_groups).values(group_id=group_id, created_at=now(), size=size)
            connection.execute(chord.on_conflict_do_nothing(index_elements=["group_id"]))
            known = connection.execute(
                select(task_groups.c.size).where(task_groups.c.group_id == group_id).with_for_update()
            ).scalar()
            completed, failed = connection.execute(counts).one()
            total = known if known is not None else size
            if not failed and (total is None or completed < total):
                return ChordParts(is_mine=False, is_failed=False)
            fired = connection.execute(
                update(task_groups)
                .where(task_groups.c.group_id == group_id, task_groups.c.fired_at.is_(None))
                .values(fired_at=now())
            )
            if fired.rowcount != 1:
                return ChordParts(is_mine=False, is_failed=bool(failed))
            results = connection.execute(
                select(task_queue.c.result_data).where(members).order_by(task_queue.c.group_index, task_queue.c.id)
            ).scalars()
            return ChordParts(is_mine=True, is_failed=bool(failed), results=() if failed else tuple(results))

    # Workers

    def heartbeat(self, beat: Heartbeat) -> None:
        """Show a worker; its row is made at the first beat."""
        values = {name: getattr(beat, name) for name in beat.__slots__} | {"last_heartbeat": now()}
        values["capabilities"], values["current_tasks"] = list(beat.capabilities), list(beat.current_tasks)
        statement = self._insert(worker_heartbeats).values(values)
        with self._transaction() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["worker_id"], set_=values))

    def log_worker(
        self, worker_id: str | None, event: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """A change that belongs to no job: a worker's start or stop, a message that could not be read."""
        with self._transaction() as connection:
            self._log(connection, None, 0, event, worker_id, now(), message, details)

    def workers(self, *, heard_within_s: float | None = None) -> list[RowMapping]:
        """The worker_heartbeats rows; only those alive if `heard_within_s` is given."""
        with self._reading() as connection:
            rows = (
                connection.execute(select(worker_heartbeats).order_by(worker_heartbeats.c.worker_id)).mappings().all()
            )
        at = now()
        return [
            row
            for row in rows
            if heard_within_s is None
            or (row["status"] != "stopped" and (at - row["last_heartbeat"]).total_seconds() <= heard_within_s)
        ]

    # Reading

    def job(self, job_id: str) -> RowMapping | None:
        """The task_queue row of a job."""
        with self._reading() as connection:
            return connection.execute(_JOB, {"b_job_id": job_id}).mappings().one_or_none()

    def jobs_by_id(self, job_ids: Sequence[str]) -> list[RowMapping]:
        """The rows of several jobs, without order; ids that have none are missing."""
        with self._reading() as connection:
            statement = select(task_queue).where(task_queue.c.job_id.in_(job_ids))
            return list(connection.execute(statement).mappings())

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
            statement = statement.where(task_queue.c.job_id.startswith(id_prefix, autoescape=True))
        with self._reading() as connection:
            return list(connection.execute(statement).mappings())

    def logs(self, job_id: str) -> list[RowMapping]:
        """A job's changes, in order."""
        with self._reading() as connection:
            statement = select(task_logs).where(task_logs.c.job_id == job_id).order_by(task_logs.c.sequence)
            return list(connection.execute(statement).mappings())

    def counts(self) -> dict[str, dict[str, int]]:
        """{task_type: {status: jobs}}."""
        statement = select(task_queue.c.task_type, task_queue.c.status, func.count()).group_by(
            task_queue.c.task_type, task_queue.c.status
        )
        counts: dict[str, dict[str, int]] = {}
        with self._reading() as connection:
            for task_type, status, jobs in connection.execute(statement):
                counts.setdefault(task_type, {})[status] = jobs
        return counts

    # The one place that writes task_logs

    def _log(
        self,
        connection: Connection,
        job_id: str | None,
        sequence: int,
        event: str,
        worker_id: str | None,
        at: datetime,
        message: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        connection.execute(_LOG, _log_row(job_id, sequence, event, worker_id, at, message, details))

    def _log_claim(
        self, connection: Connection, job_id: str, sequence: int, worker_id: str, at: datetime, attempt: int
    ) -> None:
        details = {"attempt": attempt}
        connection.execute(
            _LOG,
            [
                _log_row(job_id, sequence - 1, "claimed", worker_id, at, None, details),
                _log_row(job_id, sequence, "started", worker_id, at, None, details),
            ],
        )

    def _log_failure(
        self,
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
        self._log(connection, job_id, sequence, event, worker_id, at, message, everything or None)

    def _transaction(self) -> Any:
        self._check()
        return self.database.transaction()

    def _reading(self) -> Any:
        self._check()
        return self.database.reading()

    def _check(self) -> None:
        if not self._is_ready:
            schema.ensure_schema(self.database)
            self._is_ready = True


_JOB: Final = select(task_queue).where(_of_job)


def _log_row(
    job_id: str | None,
    sequence: int,
    event: str,
    worker_id: str | None,
    at: datetime,
    message: str | None,
    details: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "sequence": sequence,
        "event_type": event,
        "worker_id": worker_id,
        "created_at": at,
        "message": message,
        "details": details,
    }


def _failure_columns(failure: Failure | None) -> dict[str, str | None]:
    if failure is None:
        return {"error_type": None, "error_module": None, "error_message": None}
    return {
        "error_type": failure.error_type,
        "error_module": failure.error_module,
        "error_message": failure.error_message,
    }


def _is_alive(standing: RowMapping, at: datetime, timeout_s: float) -> bool:
    heard = standing["last_heartbeat"]
    if heard is None or standing["worker_status"] == "stopped":
        return False
    return bool((at - heard).total_seconds() <= timeout_s)
