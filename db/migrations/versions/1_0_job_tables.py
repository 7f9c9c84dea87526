"""The job tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from db.models import UTCDateTime

revision = "1_0"
down_revision = None
branch_labels = None
depends_on = None

Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Document = sa.JSON(none_as_null=True)
JobId = sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql")
_QUEUED = "status = 'queued'"


def _partial_index(name: str, *columns: Any, where: str, unique: bool = False) -> None:
    condition = sa.text(where)
    op.create_index(
        name, "task_queue", list(columns), unique=unique, sqlite_where=condition, postgresql_where=condition
    )


def upgrade() -> None:
    op.create_table(
        "task_groups",
        sa.Column("group_id", sa.String(length=255), nullable=False),
        sa.Column("size", sa.Integer(), nullable=True),
        sa.Column("members", Document, nullable=True),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("fired_at", UTCDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("group_id"),
    )
    op.create_table(
        "task_queue",
        sa.Column("id", Key, autoincrement=True, nullable=False),
        sa.Column("job_id", JobId, nullable=False),
        sa.Column("task_type", sa.String(length=255), nullable=False),
        sa.Column("queue", sa.String(length=255), nullable=False),
        sa.Column("parameters", Document, nullable=False),
        sa.Column("priority", sa.Integer(), server_default="5", nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.Float(), server_default="0", nullable=False),
        sa.Column("stage", sa.String(length=255), nullable=True),
        sa.Column("claimed_by", sa.String(length=255), nullable=True),
        sa.Column("lease", sa.String(length=64), nullable=True),
        sa.Column("claimed_at", UTCDateTime(), nullable=True),
        sa.Column("started_at", UTCDateTime(), nullable=True),
        sa.Column("completed_at", UTCDateTime(), nullable=True),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("updated_at", UTCDateTime(), nullable=False),
        sa.Column("run_after_utc", UTCDateTime(), nullable=True),
        sa.Column("expires_at", UTCDateTime(), nullable=True),
        sa.Column("published_at", UTCDateTime(), nullable=True),
        sa.Column("retry_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=True),
        sa.Column("publication", sa.Integer(), server_default="1", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("deaths", sa.Integer(), server_default="0", nullable=False),
        sa.Column("deliveries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sequence", sa.Integer(), server_default="1", nullable=False),
        sa.Column("root_id", sa.String(length=255), nullable=True),
        sa.Column("parent_id", sa.String(length=255), nullable=True),
        sa.Column("group_id", sa.String(length=255), nullable=True),
        sa.Column("group_index", sa.Integer(), nullable=True),
        sa.Column("in_chord", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("sequel", sa.String(length=8), nullable=True),
        sa.Column("unique_key", sa.String(length=255), nullable=True),
        sa.Column("unique_until", UTCDateTime(), nullable=True),
        sa.Column("result_data", Document, nullable=True),
        sa.Column("error_type", sa.String(length=255), nullable=True),
        sa.Column("error_module", sa.String(length=255), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("message", Document, nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id"),
    )
    _partial_index("idx_task_queue_claiming", "queue", sa.text("priority DESC"), "id", "published_at", where=_QUEUED)
    _partial_index("idx_task_queue_due", "status", "run_after_utc", where=f"{_QUEUED} AND published_at IS NULL")
    _partial_index("idx_task_queue_expiring", "status", "expires_at", where=f"{_QUEUED} AND expires_at IS NOT NULL")
    _partial_index("idx_task_queue_sequel", "completed_at", where="sequel = 'due'")
    _partial_index("idx_task_queue_group", "group_id", "status", where="group_id IS NOT NULL")
    _partial_index(
        "idx_task_queue_unique",
        "unique_key",
        where="unique_key IS NOT NULL AND status IN ('queued', 'claimed', 'running')",
        unique=True,
    )
    op.create_index("idx_task_queue_created", "task_queue", ["created_at"], unique=False)
    op.create_index("idx_task_queue_status", "task_queue", ["status", "id"], unique=False)
    op.create_index("idx_task_queue_type", "task_queue", ["task_type", "id"], unique=False)
    op.create_index("idx_task_queue_worker", "task_queue", ["claimed_by", "status"], unique=False)
    op.create_table(
        "worker_heartbeats",
        sa.Column("worker_id", sa.String(length=255), nullable=False),
        sa.Column("hostname", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("capabilities", Document, nullable=False),
        sa.Column("strategy", sa.String(length=255), nullable=True),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("current_tasks", Document, nullable=False),
        sa.Column("reserved_tasks", Document, nullable=False),
        sa.Column("lease", sa.String(length=64), nullable=True),
        sa.Column("tasks_processed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("tasks_failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("started_at", UTCDateTime(), nullable=False),
        sa.Column("last_heartbeat", UTCDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id"),
    )
    op.create_index("idx_worker_heartbeat", "worker_heartbeats", ["last_heartbeat"], unique=False)
    op.create_table(
        "worker_leases",
        sa.Column("lease", sa.String(length=64), nullable=False),
        sa.Column("worker_id", sa.String(length=255), nullable=False),
        sa.Column("host_id", sa.String(length=255), nullable=False),
        sa.Column("renewed_at", UTCDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("lease"),
    )
    op.create_index("idx_worker_leases_worker", "worker_leases", ["worker_id"], unique=False)
    op.create_table(
        "duties",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=True),
        sa.Column("position", Key, nullable=True),
        sa.Column("since", UTCDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "queue_pauses",
        sa.Column("queue", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("paused_at", UTCDateTime(), nullable=False),
        sa.Column("paused_until", UTCDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("queue"),
    )
    op.create_table(
        "task_logs",
        sa.Column("id", Key, autoincrement=True, nullable=False),
        sa.Column("job_id", JobId, nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=255), nullable=True),
        sa.Column("event_type", sa.String(length=32), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("details", Document, nullable=True),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["task_queue.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_index("idx_task_logs_task", "task_logs", ["job_id", "sequence"], unique=True)
    op.create_index("idx_task_logs_worker", "task_logs", ["worker_id", "created_at"], unique=False)
