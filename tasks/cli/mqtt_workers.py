"""`celery -A tasks mqtt workers`: who is alive and can do what, by the retained topics; who does what, by the table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from tasks.cli.app import with_app
from tasks.cli.mqtt_connection import Connection, Message
from tasks.cli.mqtt_events import SHORT_ID, timed
from tasks.cli.text import clock, console_for, cut, echo_json, remark, table_for

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

RUNNING_READ: Final = 10_000


@dataclass(frozen=True, slots=True)
class Alive:
    """A worker as its topic shows it. `jobs` are those that it runs, None if the job table can't be read."""

    worker_id: str
    capabilities: Sequence[str]
    idle_count: int
    status: str
    timestamp: int
    jobs: Sequence[Mapping[str, Any]] | None


@click.command("workers")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
@with_app
def show_workers(app: "MediaTasks", ctx: click.Context, is_json: bool) -> None:
    """Who is alive, what each can do, how much more it could take, and what it does now."""
    prefix = app.settings.capability_topic_prefix
    with Connection(app.settings) as connection:
        retained = connection.retained(f"{prefix}/+")
    shown = [(message, _capability(message)) for message in retained if message.payload]
    for message, capability in shown:
        if capability is None:
            remark(f"{message.topic} holds no capability: {message.payload[:80]!r}")
    running = _running(app)
    alive = sorted(
        (_alive(capability, running) for _, capability in shown if capability is not None),
        key=lambda worker: worker.worker_id,
    )
    if is_json:
        echo_json(asdict(worker) for worker in alive)
    elif alive:
        _print_table(ctx, alive)
    else:
        remark(f"no worker below {prefix} (CAPABILITY_TOPIC_PREFIX) on {connection.address}")


def _capability(message: Message) -> dict[str, Any] | None:
    """The payload, or None if it is something else."""
    from tasks.values import is_whole

    payload = timed(message.payload)
    if payload is None:
        return None
    is_named = isinstance(payload.get("worker_id"), str) and isinstance(payload.get("status"), str | None)
    capabilities = payload.get("capabilities")
    is_able = isinstance(capabilities, list) and all(isinstance(name, str) for name in capabilities)
    return payload if is_named and is_able and is_whole(payload.get("idle_count")) else None


def _running(app: "MediaTasks") -> dict[str, list[dict[str, Any]]] | None:
    """{worker: its running jobs}; None, with a remark, where the job table can't be read."""
    from sqlalchemy.exc import SQLAlchemyError

    from db.records import Status
    from tasks.errors import MediaTasksError

    running: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in app.store.jobs(status=Status.RUNNING, limit=RUNNING_READ):
            job = {name: row[name] for name in ("job_id", "task_type", "progress", "stage")}
            running.setdefault(row["claimed_by"], []).append(job)
    except (SQLAlchemyError, MediaTasksError, click.ClickException) as exc:
        remark(f"what they do now is not known: {str(exc).partition(chr(10))[0]}")
        return None
    return running


def _alive(capability: Mapping[str, Any], running: Mapping[str, list[dict[str, Any]]] | None) -> Alive:
    from db.records import WorkerStatus

    worker_id = capability["worker_id"]
    by_slots = WorkerStatus.IDLE if capability["idle_count"] > 0 else WorkerStatus.BUSY
    return Alive(
        worker_id=worker_id,
        capabilities=capability["capabilities"],
        idle_count=capability["idle_count"],
        status=capability.get("status") or by_slots,
        timestamp=capability["timestamp"],
        jobs=None if running is None else running.get(worker_id, []),
    )


def _print_table(ctx: click.Context, alive: Sequence[Alive]) -> None:
    console = console_for(ctx)
    table = table_for(console)
    for name in ("worker", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("idle", justify="right", no_wrap=True)
    table.add_column("heard", no_wrap=True)
    table.add_column("can do")
    table.add_column("does now")
    for worker in alive:
        table.add_row(
            cut(worker.worker_id),
            cut(worker.status),
            f"{worker.idle_count:,}",
            clock(datetime.fromtimestamp(worker.timestamp / 1000, UTC)),
            cut(", ".join(worker.capabilities)),
            cut(", ".join(_job(job) for job in worker.jobs or ())),
        )
    console.print(table, markup=False)


def _job(job: Mapping[str, Any]) -> str:
    progress = f" {job['progress']:.0f} %" if job["progress"] else ""
    return f"{job['task_type']} {job['job_id'][:SHORT_ID]}{progress}"
