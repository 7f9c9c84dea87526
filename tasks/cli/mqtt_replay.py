"""`celery -A tasks mqtt replay`: events that somebody missed, from the log, in the payloads that the relay told."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from tasks.cli.app import with_app
from tasks.cli.ids import job_row
from tasks.cli.mqtt_connection import Connection, Refused, Unreachable
from tasks.cli.mqtt_events import SHORT_ID, event_line
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
    with ExitStack() as ending:
        connection = ending.enter_context(Connection(app.settings)) if is_published else None
        publisher = _Publisher(connection, app.settings.mqtt_topic) if connection is not None else None
        for event in _events(rows):
            if publisher is not None:
                publisher.publish(event)
            click.echo(event if is_json else event_line(json.loads(event)))
        if publisher is not None:
            publisher.sum_up()


class _Publisher:
    """Tells events again, each until the broker has it. One that is too long for it is shortened, and stops no other;
    nor does one that it refuses, if it takes others.

    A broker may announce its limit. Others only close the connection over what is too long: so an event over which it
    was lost is tried once more, shortened, and then passed over.
    """

    def __init__(self, connection: Connection, topic: str) -> None:
        self._connection = connection
        self._topic = topic
        self._published = self._shortened = self._left_out = self._refused = 0
        self._refusal: Refused | None = None

    def publish(self, event: str) -> None:
        """
        Raises:
            Unreachable: The broker has gone, and takes no other connection.
            Refused: It takes nothing.
        """
        try:
            self._publish(event)
        except Refused as exc:
            self._raise_refusal()
            self._refusal = exc
            self._refused += 1
            remark(f"not published: {_named(event)}: {exc.message}")

    def _publish(self, event: str) -> None:
        from tasks.sinks.limit import LEAST_BYTES

        longest_bytes = self._connection.longest_bytes(self._topic)
        for text in (_fitting(event, longest_bytes), _fitting(event, min(longest_bytes, LEAST_BYTES))):
            if text is not None and self._is_taken(text, event):
                self._published += 1
                if text != event:
                    self._shortened += 1
                    remark(f"too long, and so without its result or the end of its message: {_named(event)}")
                return
        self._left_out += 1
        remark(f"too long, and so not published: {_named(event)}")

    def sum_up(self) -> None:
        """
        Raises:
            Refused: The broker took nothing.
            click.exceptions.Exit: Not all could be published; code 1.
        """
        self._raise_refusal()
        remark(f"{counted(self._published, 'event')} published to {self._topic} on {self._connection.address}")
        if self._shortened or self._left_out:
            longest_bytes = self._connection.longest_bytes(self._topic)
            known = "" if longest_bytes == math.inf else f", {longest_bytes:,.0f} bytes for an event"
            remark(
                f"the rest is in the job table: raise the broker's limit{known} (Mosquitto: max_packet_size, "
                "message_size_limit) and run this again, or leave out --publish"
            )
        if self._left_out or self._refused:
            raise click.exceptions.Exit(1)

    def _raise_refusal(self) -> None:
        """The one that was kept, unless something was published."""
        if self._refusal is not None and not self._published:
            raise self._refusal

    def _is_taken(self, text: str, event: str) -> bool:
        """Whether the broker has it; if not, the connection is a new one."""
        try:
            self._connection.publish(self._topic, text)
        except Unreachable:
            try:
                self._connection.open()
            except click.ClickException as exc:
                raise Unreachable(
                    f"{exc.message}. {counted(self._published, 'event')} published; then it was lost over "
                    f"{_named(event)}: run this again when it is back, subscribers drop what they have"
                ) from exc
            return False
        return True


def _fitting(event: str, longest_bytes: float) -> str | None:
    """The event, which is ASCII, without what makes it too long; None if it is too long all the same."""
    from tasks.sinks.events import shortened

    return event if len(event) <= longest_bytes else shortened(event, int(longest_bytes))


def _named(event: str) -> str:
    payload = json.loads(event)
    return f"change {payload['sequence']} of {payload['job_id'][:SHORT_ID]}, {len(event):,} bytes"


def _events(rows: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    from tasks.sinks.events import event_of

    for row in rows:
        if row["job_id"] is not None and (event := event_of(row)) is not None:
            yield event


def _of_job(app: "MediaTasks", job_id: str) -> Iterator[Mapping[str, Any]]:
    """The log rows of one job, in order, as the relay reads them."""
    ids = [log["id"] for log in app.store.logs(job_row(app.store, job_id)["job_id"])]
    for start in range(0, len(ids), PAGE):
        yield from _changes(app, None, [(row_id, row_id) for row_id in ids[start : start + PAGE]])


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
    app: "MediaTasks", after: int | None, ids: Sequence[tuple[int, int]] = (), *, limit: int = PAGE
) -> "Sequence[Row]":
    from tasks.sinks.events import LONGEST_RESULT_BYTES

    return app.store.changes(after, ids, limit=limit, result_bytes=LONGEST_RESULT_BYTES)
