"""`celery -A tasks jobs list | show`: what the job table says."""

import json
from datetime import datetime
from typing import Any

import click

from db.models import Status
from tasks.cli.app import with_app

COLOURS = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "yellow",
    Status.RUNNING: "cyan",
    Status.CLAIMED: "cyan",
    Status.QUEUED: "white",
}


@click.group()
def jobs() -> None:
    """Look at jobs: where each one is, who has it, how it ended."""


@jobs.command("list")
@click.option("--status", type=click.Choice([status.value for status in Status]))
@click.option("--task", "task_type", help="Only this capability.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@with_app
def list_jobs(app: Any, status: str | None, task_type: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs first."""
    rows = app.store.jobs(status=Status(status) if status else None, task_type=task_type, limit=limit)
    if as_json:
        for row in rows:
            click.echo(_as_json(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "task", "status", "%", "attempt", "worker", "created", "took", "error")
    for row in rows:
        colour = COLOURS[Status(row["status"])]
        table.add_row(
            row["job_id"],
            row["task_type"],
            f"[{colour}]{row['status']}[/]",
            f"{row['progress']:.0f}",
            str(row["attempt"]),
            row["claimed_by"] or "",
            f"{row['created_at'].astimezone():%m-%d %H:%M:%S}",
            _took(row),
            row["error_type"] or "",
        )
    Console().print(table)


@jobs.command("show")
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True)
@with_app
def show_job(app: Any, job_id: str, as_json: bool) -> None:
    """One job: its row, and every change in order. The first characters of the id are enough."""
    row = app.store.job(job_id)
    if row is None:
        found = app.store.jobs(id_prefix=job_id, limit=2)
        if len(found) != 1:
            raise click.ClickException(f"{'several jobs start' if found else 'no job starts'} with {job_id!r}")
        row = found[0]
    logs = app.store.logs(row["job_id"])
    if as_json:
        click.echo(_as_json({**row, "logs": [dict(log) for log in logs]}))
        return
    for name, value in row.items():
        if value not in (None, "") and name not in ("message", "id", "in_chord", "sequence"):
            click.echo(f"{name:14} {_shown(value)}")
    click.echo("\nchanges")
    for log in logs:
        details = f" {_shown(log['details'])}" if log["details"] else ""
        click.echo(
            f"{log['sequence']:4} {log['created_at'].astimezone():%H:%M:%S.%f} {log['event_type']:12} "
            f"{log['worker_id'] or '':24} {log['message'] or ''}{details}"
        )


def _took(row: Any) -> str:
    if row["started_at"] is None or row["completed_at"] is None:
        return ""
    return f"{(row['completed_at'] - row['started_at']).total_seconds():.2f} s"


def _shown(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="milliseconds")
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def _as_json(row: Any) -> str:
    return json.dumps(dict(row), default=str)
