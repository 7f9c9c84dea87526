"""`celery -A tasks jobs explain`: the story of one job, and why it waits."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from tasks.cli.app import with_app
from tasks.cli.ids import job_row
from tasks.cli.text import echo_json, line

if TYPE_CHECKING:
    from db.records import Row
    from tasks.celery import MediaTasks
    from tasks.story import Chapter


@click.command("explain")
@click.argument("job_id", metavar="ID")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line: at, since_s, event, worker, text.")
@with_app
def explain_job(app: "MediaTasks", job_id: str, is_json: bool) -> None:
    """What happened to a job; at the end why it waits."""
    from tasks import control

    row = job_row(app.store, job_id)
    story = control.explain(row["job_id"], app=app)
    if is_json:
        echo_json({**asdict(chapter), "since_s": _since_s(chapter, row)} for chapter in story)
    else:
        _print(row, story)


def _print(row: "Row", story: Sequence["Chapter"]) -> None:
    click.echo(line(f"{row['job_id']}: {row['task_type']}, {row['status']}"))
    event_width = max((len(chapter.event) for chapter in story), default=0)
    worker_width = max((len(chapter.worker) for chapter in story), default=0)
    for chapter in story:
        click.echo(
            line(
                _moment(chapter.at),
                f"{_offset(_since_s(chapter, row)):>12}",
                f"{chapter.event:{event_width}}",
                f"{chapter.worker:{worker_width}}" if worker_width else "",
                chapter.text,
            )
        )


def _since_s(chapter: "Chapter", row: "Row") -> float:
    return float((chapter.at - row["created_at"]).total_seconds())


def _moment(at: datetime) -> str:
    here = at.astimezone()
    return f"{here:%Y-%m-%d %H:%M:%S}.{here.microsecond // 1000:03}"


def _offset(seconds: float) -> str:
    """`+0.012 s`, then `+2:03`, `+1:02:03`, `+3d 1:02:03`; with a minus where the clocks of two hosts differ so."""
    if abs(seconds) < 60:
        return f"{seconds:+.3f} s"
    sign = "-" if seconds < 0 else "+"
    minutes, rest_s = divmod(int(abs(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    day = f"{days}d " if days else ""
    return f"{sign}{day}{hours}:{minutes:02}:{rest_s:02}" if days or hours else f"{sign}{minutes}:{rest_s:02}"
