"""The statements of the store that run for every job, built once. Their parameters are named `b_...`.

A `Change` is one INSERT or UPDATE of one job with the log rows that go with it. PostgreSQL does it in one statement, so
in one round trip; SQLite, which takes no INSERT inside a WITH, in two.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, cached_property
from importlib import import_module
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Integer,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    text,
    union_all,
    update,
)

from db.models import Document, UTCDateTime, queue_pauses, task_groups, task_logs, task_queue
from db.prepared import Prepared
from db.records import Event, NewJob, Sequel, Status

ACTIVE: Final = (Status.CLAIMED, Status.RUNNING)
UNFINISHED: Final = (Status.QUEUED, Status.CLAIMED, Status.RUNNING)
# In the words of idx_task_queue_unique: SQLite uses a partial index only where it finds its condition again.
HOLDS_KEY: Final = text("task_queue.status IN ('queued', 'claimed', 'running')")
UNSUCCESSFUL: Final = (Status.FAILED, Status.CANCELLED)

_job = task_queue.c


def is_one_of(statuses: Iterable[Status]) -> ColumnElement[bool]:
    """As `status IN (...)`, whose text SQLAlchemy puts together anew at each call (20 us)."""
    return or_(*[_job.status == status for status in statuses])


of_job = _job.job_id == bindparam("b_job_id")
of_attempt = and_(of_job, _job.attempt == bindparam("b_attempt"), is_one_of(ACTIVE))


class Changed(NamedTuple):
    """What a change of a job tells of its row."""

    job_id: str
    publication: int
    priority: int
    attempt: int
    deaths: int
    sequence: int
    claimed_by: str | None


RETURNED: Final = tuple(_job[name] for name in Changed._fields)
LOG: Final = Prepared(
    insert(task_logs).values(
        job_id=bindparam("b_job_id"),
        sequence=bindparam("b_sequence"),
        event_type=bindparam("b_event"),
        worker_id=bindparam("b_worker"),
        created_at=bindparam("b_now"),
        message=bindparam("b_message"),
        details=bindparam("b_details"),
    )
)


@dataclass(frozen=True)
class Change:
    """A statement that returns RETURNED, and its events; the row's sequence number is that of the last one."""

    statement: Any
    events: tuple[Event, ...]
    tells_attempt: bool = True

    def execute(self, connection: Connection, bound: Mapping[str, Any]) -> Changed | None:
        """Change the row and log it; None if there was nothing to change. `bound` holds `b_now` and `b_worker`.

        On PostgreSQL it is atomic by itself, on SQLite inside a transaction.
        """
        if connection.dialect.name == "postgresql":
            row = self._with_log.first(connection, bound)
            return None if row is None else Changed(*row)
        if (row := self._prepared.first(connection, bound)) is None:
            return None
        changed = Changed(*row)
        self._log.first(
            connection,
            {
                "b_job_id": changed.job_id,
                "b_sequence": changed.sequence,
                "b_worker": changed.claimed_by or bound["b_worker"],
                "b_now": bound["b_now"],
                "b_details": {"attempt": changed.attempt} if self.tells_attempt else None,
            },
        )
        return changed

    @property
    def _numbered(self) -> list[tuple[int, Event]]:
        """Each event with its distance from the row's sequence number."""
        return [(len(self.events) - number, event) for number, event in enumerate(self.events, 1)]

    @cached_property
    def _prepared(self) -> Prepared:
        return Prepared(self.statement)

    @cached_property
    def _log(self) -> Prepared:
        same: dict[str, Any] = {
            "job_id": bindparam("b_job_id"),
            "worker_id": bindparam("b_worker"),
            "created_at": bindparam("b_now", type_=UTCDateTime),
            "details": bindparam("b_details", type_=Document),
        }
        last = bindparam("b_sequence", type_=Integer)
        rows = [same | {"sequence": last - back, "event_type": event} for back, event in self._numbered]
        return Prepared(insert(task_logs).values(rows))

    @cached_property
    def _with_log(self) -> Prepared:
        changed = self.statement.cte("changed")
        attempt = func.json_build_object("attempt", changed.c.attempt, type_=Document)
        rows = [
            select(
                changed.c.job_id,
                changed.c.sequence - back,
                func.coalesce(changed.c.claimed_by, bindparam("b_worker", type_=String)),
                literal(event, String),
                attempt if self.tells_attempt else null(),
                bindparam("b_now", type_=UTCDateTime),
            )
            for back, event in self._numbered
        ]
        columns = ("job_id", "sequence", "worker_id", "event_type", "details", "created_at")
        log = insert(task_logs).from_select(columns, union_all(*rows) if len(rows) > 1 else rows[0])
        return Prepared(select(changed).add_cte(log.cte("logged")))


def log_row(
    job_id: str | None,
    sequence: int,
    event: Event,
    worker_id: str | None,
    at: datetime,
    message: str | None,
    details: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The parameters of LOG."""
    return {
        "b_job_id": job_id,
        "b_sequence": sequence,
        "b_event": event,
        "b_worker": worker_id,
        "b_now": at,
        "b_message": message,
        "b_details": details,
    }


def new_row(
    job: NewJob, at: datetime, *, publication: int = 1, is_resting: bool = False, was_sent: bool = True
) -> dict[str, Any]:
    """The parameters of `enqueue`. A resting row has no message; it is due at the job's `run_after_utc`, or `delay_s`
    from now.
    """
    return {
        **{f"b_{name}": getattr(job, name) for name in job.__slots__ if name != "delay_s"},
        "b_due_at": at + timedelta(seconds=job.delay_s),
        "b_publication": publication,
        "b_published_at": at if was_sent and not is_resting else None,
        "b_is_resting": is_resting,
        "b_now": at,
    }


_ENQUEUED: Final = (
    "job_id",
    "task_type",
    "queue",
    "parameters",
    "priority",
    "max_retries",
    "retry_count",
    "run_after_utc",
    "expires_at",
    "root_id",
    "parent_id",
    "group_id",
    "group_index",
    "in_chord",
    "sequel",
    "unique_key",
    "unique_until",
    "message",
    "publication",
    "published_at",
)


@cache
def enqueue(backend: str) -> Change:
    """A new row, unless its job_id is there already; in the words of `sqlite` or `postgresql`.

    With `b_is_resting` and no `b_run_after_utc` it is due as long after `b_now` as `b_due_at` is, but by the clock of a
    PostgreSQL server: those of the hosts that submit may differ.
    """
    at = bindparam("b_now", type_=UTCDateTime)
    values: dict[str, Any] = {name: bindparam(f"b_{name}", type_=_job[name].type) for name in _ENQUEUED}
    due_at: Any = bindparam("b_due_at", type_=UTCDateTime)
    if backend == "postgresql":
        due_at = func.clock_timestamp(type_=UTCDateTime) + (due_at - at)
    resting = case((bindparam("b_is_resting", type_=Boolean), due_at), else_=null())
    values["run_after_utc"] = func.coalesce(values["run_after_utc"], resting)
    times = dict.fromkeys(("created_at", "updated_at"), at)
    dialect = import_module(f"sqlalchemy.dialects.{backend}")
    statement = dialect.insert(task_queue).values(**values, **times, status=Status.QUEUED)
    statement = statement.on_conflict_do_nothing(index_elements=["job_id"]).returning(*RETURNED)
    return Change(statement, (Event.CREATED,), tells_attempt=False)


def is_paused(queue: Any) -> ColumnElement[bool]:
    """Whether a queue is paused at `b_now`."""
    until = queue_pauses.c.paused_until
    in_force = or_(until.is_(None), until > bindparam("b_now", type_=UTCDateTime))
    return exists().where(queue_pauses.c.queue == queue, in_force).correlate(task_queue)


CLAIM: Final = Change(
    update(task_queue)
    .where(
        of_job,
        _job.publication == bindparam("b_publication"),
        _job.status == Status.QUEUED,
        ~is_paused(_job.queue),
    )
    .values(
        status=Status.RUNNING,
        claimed_by=bindparam("b_worker"),
        lease=bindparam("b_lease"),
        claimed_at=bindparam("b_now"),
        started_at=bindparam("b_now"),
        updated_at=bindparam("b_now"),
        progress=0.0,
        stage=None,
        attempt=_job.attempt + 1,
        deliveries=_job.deliveries + 1,
        sequence=_job.sequence + 2,
    )
    .returning(*RETURNED),
    (Event.CLAIMED, Event.STARTED),
)
# Queued again, as it was before this attempt; a resting one is published anew, under the next number, when it is due.
CLOSE: Final = (
    update(task_queue)
    .where(of_attempt)
    .values(
        status=Status.QUEUED,
        attempt=_job.attempt + 1,
        deaths=_job.deaths + bindparam("b_deaths"),
        progress=0.0,
        stage=None,
        updated_at=bindparam("b_now"),
        sequence=_job.sequence + 1,
    )
    .returning(*RETURNED)
)
RESTING: Final = {"published_at": None, "publication": _job.publication + 1}
REST: Final = (
    update(task_queue)
    .where(of_job, _job.publication == bindparam("b_publication"), _job.status == Status.QUEUED)
    .values(RESTING)
)
_due: Final = literal(Sequel.DUE, String)
COMPLETE: Final = Change(
    update(task_queue)
    .where(of_attempt)
    .values(
        status=Status.COMPLETED,
        progress=100.0,
        result_data=bindparam("b_result"),
        error_type=None,
        error_module=None,
        error_message=None,
        completed_at=bindparam("b_now"),
        updated_at=bindparam("b_now"),
        sequel=case((_job.in_chord, _due), else_=null()),
        sequence=_job.sequence + 1,
    )
    .returning(*RETURNED),
    (Event.COMPLETED,),
)
# What follows from an unsuccessful end is due, if anything does.
SEQUEL_DUE: Final = case((_job.sequel == Sequel.PENDING, _due), else_=_job.sequel)
PROGRESS: Final = (
    update(task_queue)
    .where(of_attempt)
    .values(
        progress=case((_job.progress > bindparam("b_progress"), _job.progress), else_=bindparam("b_progress")),
        stage=bindparam("b_stage"),
        updated_at=bindparam("b_now"),
    )
)
OWNS: Final = Prepared(select(literal(1)).select_from(task_queue).where(of_attempt))
JOB: Final = select(task_queue).where(of_job)
STANDING: Final = select(
    _job.status,
    _job.publication,
    _job.priority,
    _job.attempt,
    _job.deaths,
    _job.claimed_by,
    _job.created_at,
    _job.updated_at,
    _job.claimed_at,
    _job.published_at,
    _job.completed_at,
    _job.deliveries,
    _job.lease,
).where(of_job)

of_chord = and_(_job.group_id == bindparam("b_group_id"), _job.in_chord)
# Whether any member is still to end, or ended badly, is one step in the index, however many members there are.
CHORD: Final = select(
    select(task_groups.c.size).where(task_groups.c.group_id == bindparam("b_group_id")).scalar_subquery().label("size"),
    select(1).where(of_chord, is_one_of(UNSUCCESSFUL)).exists().label("is_failed"),
    select(1).where(of_chord, is_one_of(UNFINISHED)).exists().label("is_running"),
)
CHORD_COMPLETED: Final = select(func.count(case((_job.status == Status.COMPLETED, 1)))).where(of_chord)
CHORD_RESULTS: Final = select(_job.result_data).where(of_chord).order_by(_job.group_index, _job.id)
