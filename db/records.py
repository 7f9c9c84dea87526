"""What flows into the store and out of it: plain values, without SQLAlchemy, so that a producer loads little."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[Any, Any]
"""A row of a table, or some of its columns, by name; SQLAlchemy's own, which can be asked by column, too."""


class Status(StrEnum):
    """Where a job stands. queued -> claimed -> running -> completed | failed | cancelled; a retry is queued again."""

    QUEUED = "queued"
    CLAIMED = "claimed"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


class Event(StrEnum):
    """What happened, as the `event_type` of a task_logs row says it. A worker's own rows have no job: it started, it
    stopped, it rejected a message that names no job.
    """

    CREATED = "created"
    CLAIMED = "claimed"
    STARTED = "started"
    RETRY = "retry"
    REPLACED = "replaced"
    RELEASED = "released"
    REPUBLISHED = "republished"
    REPLAYED = "replayed"
    LOST = "lost"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    REJECTED = "rejected"


class Sequel(StrEnum):
    """What follows from the end of a job, such as a chord or the next step of a chain: it waits for the end; it is due;
    all have been told.
    """

    PENDING = "pending"
    DUE = "due"
    TOLD = "told"


class WorkerStatus(StrEnum):
    """What a worker's heartbeat row says of it. LOST is written by others."""

    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    STOPPED = "stopped"
    LOST = "lost"


GONE = (WorkerStatus.STOPPED, WorkerStatus.LOST)
"""Of workers that are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it is submitted. `message` holds args, kwargs and options for its messages. `sequel` is PENDING
    if something follows from its end: the next step of a chain, a chord, an errback. It is due at `run_after_utc`, or
    `delay_s` after it is written, by the database's clock.
    """

    job_id: str
    task_type: str
    queue: str
    parameters: Mapping[str, Any]
    message: Mapping[str, Any]
    priority: int = 5
    max_retries: int | None = None
    retry_count: int = 0
    run_after_utc: datetime | None = None
    delay_s: float = 0.0
    expires_at: datetime | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group_id: str | None = None
    group_index: int | None = None
    in_chord: bool = False
    sequel: Sequel | None = None
    unique_key: str | None = None
    unique_until: datetime | None = None

    @property
    def is_due_later(self) -> bool:
        return self.run_after_utc is not None or self.delay_s > 0


@dataclass(frozen=True, slots=True)
class Publication:
    """A message to send: its number, and the row's priority (1-10), to be mapped once for the broker.

    One that is resting is sent later, by a dispatcher, when it is due. That of a job which `has_begun` before goes
    ahead of those of its priority which have not.
    """

    number: int
    priority: int
    is_resting: bool = False
    has_begun: bool = False


class Decision(Enum):
    """What the guard has to do with a message."""

    RUN = "run"
    POISON = "poison"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STALE = "stale"
    HELD = "held"
    UNCERTAIN = "perhaps held"
    PAUSED = "paused"


class Liveness(Enum):
    """What can be told of who holds an attempt. UNCERTAIN: on another host, and heard of lately."""

    ALIVE = "alive"
    DEAD = "dead"
    UNCERTAIN = "uncertain"


EAGER = "eager-"
"""How the names of leases begin that belong to no worker."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker's lease as its row shows it, and when that was looked at: by one clock, the database server's."""

    lease: str
    worker_id: str
    host_id: str
    renewed_at: datetime
    seen_at: datetime

    @property
    def is_eager(self) -> bool:
        """Whether it is no worker, but a process that runs a job itself, by `apply()`."""
        return self.lease.startswith(EAGER)

    @property
    def silent_s(self) -> float:
        """For how long it has not renewed."""
        return (self.seen_at - self.renewed_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Closed:
    """An attempt that was found dead, or given back: its row is queued again."""

    attempt: int
    publication: int
    deaths: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The guard's claim. `attempt` is the fencing token that every later write of this attempt carries."""

    decision: Decision
    attempt: int = 0
    deaths: int = 0
    holder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """What must still hold for an end to be written: else it comes too late.

    Of an attempt: that it runs. Of a message, by its publication: that its job waits, or with `may_run` also that it
    runs. Without either: that the job has not ended.
    """

    attempt: int | None = None
    publication: int | None = None
    may_run: bool = False


UNFENCED = Fence()


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
    status: WorkerStatus
    started_at: datetime
    strategy: str | None = None
    lease: str | None = None
    current_tasks: Sequence[str] = field(default_factory=list)
    reserved_tasks: Sequence[str] = field(default_factory=list)
    tasks_processed: int = 0
    tasks_failed: int = 0


@dataclass(frozen=True, slots=True)
class ChordParts:
    """How far a chord has come. `is_mine` is True for the one caller that has to publish (or fail) its body.

    `results` are the members', in order, once all have completed; None before, or if one failed.
    """

    is_mine: bool
    is_failed: bool
    results: Sequence[Any] | None = None


def now() -> datetime:
    return datetime.now(UTC)
