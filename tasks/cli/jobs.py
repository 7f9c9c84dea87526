"""`celery -A tasks jobs list | show`: what the job table says; and the group of all commands on jobs."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from tasks.cli.app import IntegerRange, ParamType, with_app
from tasks.cli.control import cancel_jobs, replay_jobs, retry_jobs
from tasks.cli.filters import unknown_task
from tasks.cli.ids import job_row
from tasks.cli.story import explain_job
from tasks.cli.text import (
    abridged,
    as_json,
    clock,
    console_for,
    counted,
    cut,
    echo_json,
    printable,
    remark,
    shown,
    table_for,
)

if TYPE_CHECKING:
    from rich.text import Text

    from db.records import Row
    from tasks.celery import MediaTasks

WIDE_COLUMNS = 120
SHORT_ID = 8
HIDDEN = ("message", "id", "in_chord", "sequence")


class _StatusName(ParamType):
    """A status of the job table, which is loaded only when it is needed."""

    name = "status"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 (Click's)
        from db.records import Status

        return f"[{'|'.join(Status)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from db.records import Status

        try:
            return Status(str(value).lower())
        except ValueError:
            self.fail(f"{value!r} is no status; choose one of {', '.join(Status)}", param, ctx)


@click.group()
def jobs() -> None:
    """Look at jobs: where each one is, who has it, how it ended; cancel them, run them again."""


for command in (explain_job, cancel_jobs, retry_jobs, replay_jobs):
    jobs.add_command(command)


@jobs.command("list")
@click.option("--status", type=_StatusName(), help="Only jobs that stand there.")
@click.option("--task", "task_type", metavar="CAPABILITY", help="Only jobs of this capability.")
@click.option("--limit", type=IntegerRange(1, 10_000), default=50, show_default=True)
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line, with every column.")
@click.pass_context
@with_app
def list_jobs(
    app: "MediaTasks", ctx: click.Context, status: Any, task_type: str | None, limit: int, is_json: bool
) -> None:
    """The newest jobs first. `jobs show` takes the ids as they stand here."""
    from tasks import control

    rows = control.jobs(status=status, task=task_type, limit=limit, app=app)
    if not rows:
        if task_type is not None and (unknown := unknown_task(app, task_type)):
            raise click.ClickException(printable(unknown))
        remark(_nothing_found(status, task_type))
    elif is_json:
        echo_json(rows)
    else:
        _print_table(ctx, rows)


@jobs.command("show")
@click.argument("job_id")
@click.option("--json", "is_json", is_flag=True, help="One JSON object: the row, and its changes as `logs`.")
@click.pass_context
@with_app
def show_job(app: "MediaTasks", ctx: click.Context, job_id: str, is_json: bool) -> None:
    """One job: its row, and every change in order. The first characters of the id are enough."""
    from tasks import control

    job = control.show(job_row(app.store, job_id)["job_id"], app=app)
    if is_json:
        click.echo(as_json(job))
        return
    logs = job.pop("logs")
    console = console_for(ctx)
    width = max(map(len, job)) + 2
    for name, value in job.items():
        if value not in (None, "") and name not in HIDDEN:
            text = _status(value) if name == "status" else shown(value)
            console.print(f"{name:{width}}", text, sep="", markup=False, soft_wrap=True)
    _print_changes(console, logs)


def _print_table(ctx: click.Context, rows: "Sequence[Row]") -> None:
    """Ids, statuses and times are always whole; what is free text gives way, at its end."""
    console = console_for(ctx)
    is_wide = console.width >= WIDE_COLUMNS
    id_length = max(map(len, (row["job_id"] for row in rows))) if is_wide else _id_length(rows)
    table = table_for(console)
    for name in ("job", "task", "status"):
        table.add_column(name, no_wrap=name != "task")
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("created", no_wrap=True)
    if is_wide:
        table.add_column("attempt", justify="right", no_wrap=True)
        table.add_column("worker")
    table.add_column("note")
    for row in rows:
        cells: list[str | Text] = [
            printable(row["job_id"][:id_length]),
            cut(row["task_type"]),
            _status(row["status"], row["progress"]),
            _took(row),
            clock(row["created_at"]),
        ]
        if is_wide:
            cells += [str(row["attempt"]), cut(row["claimed_by"] or "")]
        table.add_row(*cells, cut(abridged(printable(_note(row, is_wide)))))
    console.print(table, markup=False)


def _print_changes(console: Any, logs: "Sequence[Row]") -> None:
    console.print("\nchanges")
    if not logs:
        return
    start = logs[0]["created_at"]
    worker_width = max(len(log["worker_id"] or "") for log in logs)
    for log in logs:
        details = dict(log["details"] or {})
        traceback = details.pop("traceback", None)
        since_s = (log["created_at"] - start).total_seconds()
        said = [printable(log["message"]) if log["message"] else "", shown(details) if details else ""]
        line = (
            f"{log['sequence']:4}  {log['created_at'].astimezone():%H:%M:%S.%f}  +{since_s:<9.3f} "
            f"{log['event_type']:11} {log['worker_id'] or '':{worker_width}}  {' '.join(filter(None, said))}"
        )
        console.print(line.rstrip(), markup=False, soft_wrap=True)
        for line in (traceback or "").splitlines():
            console.print(f"        {printable(line)}", markup=False, soft_wrap=True)


def _nothing_found(status: Any, task_type: str | None) -> str:
    if status is not None or task_type is not None:
        return f"no {' '.join(filter(None, [status, task_type]))} jobs"
    return "no jobs yet; submit one: celery -A tasks submit image_resize in.jpg out.webp --width 800 --wait"


def _id_length(rows: "Sequence[Row]") -> int:
    """As few characters, from 8 on, as tell the listed ids apart."""
    ids = [row["job_id"] for row in rows]
    for length in range(SHORT_ID, max(map(len, ids))):
        if len({job_id[:length] for job_id in ids}) == len(ids):
            return length
    return max(map(len, ids))


def _note(row: "Row", is_wide: bool) -> str:
    """What one wants to know next: how often a worker died of it, and where it stands."""
    deaths = counted(row["deaths"], "death") if row["deaths"] else ""
    return ", ".join(filter(None, [deaths, _note_on_status(row, is_wide)]))


def _note_on_status(row: "Row", is_wide: bool) -> str:
    """Why it failed, who has it, or when it is due."""
    from db.records import Status, now

    status = Status(row["status"])
    if status in (Status.FAILED, Status.CANCELLED) and row["error_type"]:
        folder = PurePath(str(row["parameters"].get("input", ""))).parent
        return f"{row['error_type']}: {row['error_message']}".replace(f"{folder}/", "")
    if status in (Status.CLAIMED, Status.RUNNING):
        return row["stage"] or ("" if is_wide else f"on {row['claimed_by']}")
    if status is Status.QUEUED:
        retry = f"retry {row['retry_count']} after {row['error_type'] or 'an error'}" if row["retry_count"] else ""
        is_resting = row["published_at"] is None and row["run_after_utc"] is not None and row["run_after_utc"] > now()
        return ", ".join(filter(None, [retry, f"due {clock(row['run_after_utc'])}" if is_resting else ""]))
    return ""


def _took(row: "Row") -> str:
    if row["started_at"] is None or row["completed_at"] is None or row["completed_at"] < row["started_at"]:
        return ""
    return f"{(row['completed_at'] - row['started_at']).total_seconds():.2f} s"


def _status(status: str, progress: float = 0.0) -> "Text":
    from rich.text import Text

    from db.records import Status

    colours = {
        Status.CLAIMED: "cyan",
        Status.RUNNING: "cyan",
        Status.COMPLETED: "green",
        Status.FAILED: "red",
        Status.CANCELLED: "yellow",
    }
    percent = f" {progress:.0f} %" if status == Status.RUNNING and progress else ""
    return Text(status + percent, style=colours.get(Status(status), ""))
