"""`celery -A tasks mqtt replay`: events that somebody missed, from the log, in the payloads that the relay told."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from tasks.cli.app import with_app
from tasks.cli.ids import job_row
from tasks.cli.mqtt_connection import Connection
from tasks.cli.mqtt_events import event_line
from tasks.cli.text import counted, remark
from tasks.cli.times import Since

if TYPE_CHECKING:
    from db.records import Row
    from tasks.celery import MediaTasks

PAGE: Final = 500
# Ids follow the times of their rows, but for transactions that take long.
LONGEST_TRANSACTION: Final = timedelta(minutes=1)


@click.command("replay")
@click.option("--job", "job_id", metavar="ID", help="All events of this job.")
@click.option("--since", type=Since(), help="All events of all jobs since then: 10m, 2h, 1d, or 2026-03-01T14:30.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line: the payloads.")
@click.option("--publish", "is_published", is_flag=True, help="Also publish them again to MQTT_TOPIC.")
@with_app
def replay_events(
    app: "MediaTasks", job_id: str | None, since: datetime | None, is_json: bool, is_published: bool
) -> None:
    """Print the events of a job, or of a time, from the job table. Progress between changes is not kept."""
    from contextlib import ExitStack

    if (job_id is None) == (since is None):
        raise click.UsageError("give either --job or --since")
    rows = _of_job(app, job_id) if job_id is not None else _since(app, since or datetime.now(UTC))
    published = 0
    with ExitStack() as ending:
        connection = ending.enter_context(Connection(app.settings)) if is_published else None
        for event in _events(rows):
            if connection is not None:
                connection.publish(app.settings.mqtt_topic, event)
                published += 1
            click.echo(event if is_json else event_line(json.loads(event)))
        if connection is not None:
            remark(f"{counted(published, 'event')} published to {app.settings.mqtt_topic} on {connection.address}")


def _events(rows: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    from tasks.sinks.events import event_of

    for row in rows:
        if row["job_id"] is not None and (event := event_of(row)) is not None:
            yield event


def _of_job(app: "MediaTasks", job_id: str) -> Iterator[Mapping[str, Any]]:
    """The log rows of one job, in order, as the relay reads them."""
    ids = [log["id"] for log in app.store.logs(job_row(app.store, job_id)["job_id"])]
    for start in range(0, len(ids), PAGE):
        yield from _changes(app, 2**62, [(row_id, row_id) for row_id in ids[start : start + PAGE]])


def _since(app: "MediaTasks", since: datetime) -> Iterator[Mapping[str, Any]]:
    """The log rows since a time, in order, page by page."""
    after = _last_before(app, since - LONGEST_TRANSACTION)
    while rows := _changes(app, after):
        yield from (row for row in rows if row["created_at"] >= since)
        after = rows[-1]["id"]


def _last_before(app: "MediaTasks", at: datetime) -> int:
    """The id after which no row is older; found by halving, since the times have no index."""

    def is_older(row_id: int) -> bool:
        rows = _changes(app, row_id, limit=1)
        return bool(rows) and rows[0]["created_at"] < at

    high = 1
    while is_older(high):
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_older(middle) else (low, middle)
    return low


def _changes(
    app: "MediaTasks", after: int, ids: Sequence[tuple[int, int]] = (), *, limit: int = PAGE
) -> "Sequence[Row]":
    from tasks.sinks.events import LONGEST_RESULT_BYTES

    return app.store.changes(after, ids, limit=limit, result_bytes=LONGEST_RESULT_BYTES)
