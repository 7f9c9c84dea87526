"""`celery -A tasks jobs cancel | retry | replay`: what people do to jobs."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from tasks.cli.app import IntegerRange, for_each, with_app
from tasks.cli.filters import unknown_task
from tasks.cli.ids import job_row
from tasks.cli.text import line, printable, remark

if TYPE_CHECKING:
    from db.records import Row
    from tasks.celery import MediaTasks

job_ids = click.argument("job_ids", metavar="ID...", nargs=-1, required=True)


@click.command("cancel")
@job_ids
@click.option("--reason", default="", help="Kept with the job, and shown to whoever waits for it.")
@with_app
def cancel_jobs(app: "MediaTasks", job_ids: Sequence[str], reason: str) -> None:
    """Cancel jobs, and what waits for them. A running one is ended by its worker, within three seconds."""
    from db.records import Status
    from tasks import control
    from tasks.errors import UnknownJob

    def cancel(job_id: str) -> None:
        is_cancelled = False
        if not app.store.jobs(id_prefix=job_id, limit=1):
            with suppress(UnknownJob):  # a step of a chain, perhaps, that waits for the one before it
                is_cancelled = control.cancel(job_id, reason, app=app)
        row = job_row(app.store, job_id)
        is_cancelled = is_cancelled or control.cancel(row["job_id"], reason, app=app)
        status = _status_now(app, row)
        if not is_cancelled and status != Status.CANCELLED:
            raise click.ClickException(f"{row['job_id']} is {status} already; there is nothing to cancel")
        already = "" if is_cancelled else " already"
        held = f"; it was running on {row['claimed_by']}, which ends it" if _is_running(row) else ""
        click.echo(line(f"{row['job_id']}: cancelled{already}{held}"))

    for_each(job_ids, cancel)


@click.command("retry")
@job_ids
@with_app
def retry_jobs(app: "MediaTasks", job_ids: Sequence[str]) -> None:
    """Run jobs now that wait for their time, or have failed."""
    from db.records import Status
    from tasks import control

    queues: set[str] = set()

    def retry(job_id: str) -> None:
        row = job_row(app.store, job_id)
        is_queued = control.retry(row["job_id"], app=app)
        status = _status_now(app, row)
        if not is_queued and status != Status.QUEUED:
            raise click.ClickException(f"{row['job_id']} is {status}; only what waits or failed can run now")
        was = "it waited" if row["status"] == Status.QUEUED else f"it was {row['status']}"
        click.echo(line(f"{row['job_id']}: due now; {was}" if is_queued else f"{row['job_id']}: due already"))
        queues.add(row["queue"])

    try:
        for_each(job_ids, retry)
    finally:
        _say_what_holds_them(app, queues)


@click.command("replay")
@click.argument("job_ids", metavar="[ID...]", nargs=-1)
@click.option("--failed", "is_all", is_flag=True, help="The newest failed jobs, instead of those named.")
@click.option("--task", "task_type", metavar="CAPABILITY", help="With --failed: only jobs of this capability.")
@click.option("--limit", type=IntegerRange(1, 10_000), help="With --failed: so many at most.  [default: 50]")
@with_app
def replay_jobs(
    app: "MediaTasks", job_ids: Sequence[str], is_all: bool, task_type: str | None, limit: int | None
) -> None:
    """Run failed or cancelled jobs again, under their ids. What failed because of them follows them."""
    from tasks import control

    if is_all and job_ids:
        raise click.UsageError("give either ids or --failed, not both")
    if not is_all and (task_type is not None or limit is not None):
        raise click.UsageError("--task and --limit choose among failed jobs; they need --failed")
    if not is_all and not job_ids:
        raise click.UsageError("give the ids of jobs, or --failed")
    queues: set[str] = set()

    def replay(job_id: str) -> None:
        row = job_row(app.store, job_id)
        if not control.replay(row["job_id"], app=app):
            status = _status_now(app, row)
            raise click.ClickException(f"{row['job_id']} is {status}; only failed and cancelled jobs can be replayed")
        click.echo(line(f"{row['job_id']}: queued again; it was {row['status']}"))
        queues.add(row["queue"])

    try:
        for_each(_newest_failed(app, task_type, limit or 50) if is_all else job_ids, replay)
    finally:
        _say_what_holds_them(app, queues)


def _newest_failed(app: "MediaTasks", task_type: str | None, limit: int) -> list[str]:
    """The newest jobs that failed by themselves; says so if there are none, or more.

    Raises:
        click.ClickException: Nothing has the name of the capability.
    """
    from db.records import Status
    from tasks import control

    found: list[str] = []
    to_read, is_whole = 0, False
    while not is_whole and len(found) <= limit:
        to_read = 2 * to_read or limit + 1
        rows = control.jobs(status=Status.FAILED, task=task_type, limit=to_read, app=app)
        found = [row["job_id"] for row in rows if not control.was_never_sent(row)]
        is_whole = len(rows) < to_read
    if not found:
        if task_type is not None and (unknown := unknown_task(app, task_type)):
            raise click.ClickException(printable(unknown))
        remark(f"no failed {task_type} jobs" if task_type else "no failed jobs")
    elif len(found) > limit:
        remark(f"only the newest {limit:,}; there are more: repeat it, or give --limit")
    return found[:limit]


def _say_what_holds_them(app: "MediaTasks", queues: Collection[str]) -> None:
    """A remark for each queue that nothing takes jobs from."""
    from tasks import control

    for queue in control.queues(app=app) if queues else ():
        if queue.name in queues and queue.is_paused:
            remark(f"{queue.name} is paused: celery -A tasks queues resume {queue.name}")
        elif queue.name in queues and not queue.workers:
            remark(f"no live worker serves {queue.name}: celery -A tasks worker -Q {queue.name}")


def _status_now(app: "MediaTasks", row: "Row") -> str:
    now = app.store.job(row["job_id"])
    return str(now["status"] if now is not None else "gone")


def _is_running(row: "Row") -> bool:
    from db.records import Status

    return row["status"] in (Status.CLAIMED, Status.RUNNING)
