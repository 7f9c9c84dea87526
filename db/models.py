"""The tables of the job database. Their names, columns and indexes are a contract that SQL tools rely on.

One `task_queue` row per job is the truth about it; `task_logs` holds one row per change; `worker_heartbeats` shows the
workers; `worker_leases` says who holds attempts, `duties` who does what only one may do; `queue_pauses` holds what is
paused; `task_groups` counts the members of chords. All times are UTC.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    text,
)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; ISO text in SQLite (which its date functions read), timestamptz in PostgreSQL."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and dialect.name == "sqlite":
            return value.astimezone(UTC).replace(tzinfo=None)
        return value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 (the signature is SQLAlchemy's)
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)  # a server has its own zone


metadata = MetaData()
Key = BigInteger().with_variant(Integer, "sqlite")
Document = JSON(none_as_null=True)
# Compared byte by byte in PostgreSQL too, as SQLite does: a search by the beginning of an id can then use the index.
JobId = String(255).with_variant(String(255, collation="C"), "postgresql")


def _partial_index(name: str, *columns: Any, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, sqlite_where=text(where), postgresql_where=text(where))


def _time(name: str, **options: Any) -> Column[datetime]:
    return Column(name, UTCDateTime(), **options)


task_queue = Table(
    "task_queue",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("job_id", JobId, nullable=False, unique=True),
    Column("task_type", String(255), nullable=False),
    Column("queue", String(255), nullable=False),
    Column("parameters", Document, nullable=False),
    Column("priority", Integer, nullable=False, server_default="5"),
    Column("status", String(16), nullable=False),
    Column("progress", Float, nullable=False, server_default="0"),
    Column("stage", String(255)),
    Column("claimed_by", String(255)),
    Column("lease", String(64)),
    _time("claimed_at"),
    _time("started_at"),
    _time("completed_at"),
    _time("created_at", nullable=False),
    _time("updated_at", nullable=False),
    _time("run_after_utc"),
    _time("expires_at"),
    _time("published_at"),
    Column("retry_count", Integer, nullable=False, server_default="0"),
    Column("max_retries", Integer),
    Column("publication", Integer, nullable=False, server_default="1"),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("deaths", Integer, nullable=False, server_default="0"),
    Column("deliveries", Integer, nullable=False, server_default="0"),
    Column("sequence", Integer, nullable=False, server_default="1"),
    Column("root_id", String(255)),
    Column("parent_id", String(255)),
    Column("group_id", String(255)),
    Column("group_index", Integer),
    Column("in_chord", Boolean, nullable=False, server_default=text("false")),
    Column("sequel", String(8)),
    Column("unique_key", String(255)),
    _time("unique_until"),
    Column("result_data", Document),
    Column("error_type", String(255)),
    Column("error_module", String(255)),
    Column("error_message", Text),
    Column("message", Document),
    _partial_index(
        "idx_task_queue_claiming", "queue", text("priority DESC"), "id", "published_at", where="status = 'queued'"
    ),
    # What rests in its row until it is due; run_after_utc is set wherever published_at is not.
    _partial_index("idx_task_queue_due", "status", "run_after_utc", where="status = 'queued' AND published_at IS NULL"),
    _partial_index(
        "idx_task_queue_expiring", "status", "expires_at", where="status = 'queued' AND expires_at IS NOT NULL"
    ),
    _partial_index("idx_task_queue_sequel", "completed_at", where="sequel = 'due'"),
    _partial_index(
        "idx_task_queue_unique",
        "unique_key",
        where="unique_key IS NOT NULL AND status IN ('queued', 'claimed', 'running')",
        unique=True,
    ),
    Index("idx_task_queue_worker", "claimed_by", "status"),
    Index("idx_task_queue_created", "created_at"),
    Index("idx_task_queue_status", "status", "id"),
    Index("idx_task_queue_type", "task_type", "id"),
    _partial_index("idx_task_queue_group", "group_id", "status", where="group_id IS NOT NULL"),
)

task_logs = Table(
    "task_logs",
    metadata,
    Column("id", Key, primary_key=True, autoincrement=True),
    Column("job_id", JobId, ForeignKey("task_queue.job_id", ondelete="CASCADE")),
    Column("sequence", Integer, nullable=False),
    Column("worker_id", String(255)),
    Column("event_type", String(32), nullable=False),
    Column("message", Text),
    Column("details", Document),
    _time("created_at", nullable=False),
    Index("idx_task_logs_task", "job_id", "sequence", unique=True),
    Index("idx_task_logs_worker", "worker_id", "created_at"),
    sqlite_autoincrement=True,  # no id is used again: the relay remembers how far it has come
)

worker_heartbeats = Table(
    "worker_heartbeats",
    metadata,
    Column("worker_id", String(255), primary_key=True),
    Column("hostname", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("capabilities", Document, nullable=False),
    Column("strategy", String(255)),
    Column("concurrency", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("current_tasks", Document, nullable=False),
    Column("reserved_tasks", Document, nullable=False),
    Column("lease", String(64)),
    Column("tasks_processed", Integer, nullable=False, server_default="0"),
    Column("tasks_failed", Integer, nullable=False, server_default="0"),
    _time("started_at", nullable=False),
    _time("last_heartbeat", nullable=False),
    Index("idx_worker_heartbeat", "last_heartbeat"),
)

worker_leases = Table(
    "worker_leases",
    metadata,
    Column("lease", String(64), primary_key=True),
    Column("worker_id", String(255), nullable=False),
    Column("host_id", String(255), nullable=False),
    _time("renewed_at", nullable=False),
    Index("idx_worker_leases_worker", "worker_id"),
)

duties = Table(
    "duties",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(64)),
    Column("position", Key),
    _time("since", nullable=False),
)

queue_pauses = Table(
    "queue_pauses",
    metadata,
    Column("queue", String(255), primary_key=True),
    Column("reason", Text),
    _time("paused_at", nullable=False),
    _time("paused_until"),
)

task_groups = Table(
    "task_groups",
    metadata,
    Column("group_id", String(255), primary_key=True),
    Column("size", Integer),
    Column("members", Document),
    _time("created_at", nullable=False),
    _time("fired_at"),
)
