"""`celery -A tasks mqtt watch`: the events of jobs as they come, and a word where some are missing."""

import json
import shlex
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from tasks.cli.app import IntegerRange, with_app
from tasks.cli.mqtt_connection import ANSWER_WITHIN_S, Connection, Refused, Unreachable
from tasks.cli.mqtt_events import SHORT_ID, Event, event_line, parsed
from tasks.cli.text import remark
from tasks.cli.times import Patience

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.settings import Settings

KEPT_JOBS: Final = 10_000
RECONNECT_S: Final = (1.0, 2.0, 5.0, 10.0)
SHORTEST_WAIT_S: Final = 0.1
# A broker that falls silent is noticed after two or three keepalives; an event is told soon after its time.
UNNOTICED_KEEPALIVES: Final = 4


@click.command("watch")
@click.option("--job", "job_id", default="", help="Only the job whose id this is, or begins so.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line: the payloads.")
@click.option("--count", type=IntegerRange(1), help="End after so many events.")
@click.option("--timeout", "timeout_s", type=Patience(), help="End after so many seconds.")
@with_app
def watch_events(app: "MediaTasks", job_id: str, is_json: bool, count: int | None, timeout_s: float | None) -> None:
    """Print what happens to jobs until Ctrl+C; gaps are told on stderr.

    With both --count and --timeout, exit code 1 says that there were fewer events.
    """
    settings: Settings = app.settings
    if settings.broadcast_type == "noop":
        remark("BROADCAST_TYPE=noop: workers with this setting publish nothing")
    watch = _Watch(settings, job_id, is_json=is_json, count=count, timeout_s=timeout_s)
    try:
        watch.run()
    except KeyboardInterrupt:
        return
    if count is not None and watch.shown < count:
        raise click.exceptions.Exit(1)


class Sequences:
    """The last change seen of each job, for so many jobs; of the first one seen, nothing is missing."""

    def __init__(self, kept: int = KEPT_JOBS) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()
        self._kept = kept

    def missing(self, event: Event) -> range:
        """The changes of this job that should have come before this one. Progress repeats the last change's number."""
        job_id, sequence = event["job_id"], event["sequence"]
        last = self._last.pop(job_id, sequence)
        self._last[job_id] = max(last, sequence)
        if len(self._last) > self._kept:
            self._last.popitem(last=False)
        return range(last + 1, sequence)


class _Watch:
    """Events from the broker to the terminal, over as many connections as it takes."""

    def __init__(
        self, settings: "Settings", job_id: str, *, is_json: bool, count: int | None, timeout_s: float | None
    ) -> None:
        self.shown = 0
        self._settings = settings
        self._job_id = job_id
        self._is_json = is_json
        self._count = count
        self._deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        self._sequences = Sequences()

    def run(self) -> None:
        with Connection(self._settings) as connection:
            connection.subscribe(self._settings.mqtt_topic)
            remark(f"watching {self._settings.mqtt_topic} on {connection.address}; Ctrl+C ends it")
            while not self._is_over():
                try:
                    message = connection.next(self._left_s())
                except Unreachable as exc:
                    self._come_back(connection, exc)
                    continue
                if message is not None:
                    self._take(message.payload)

    def _take(self, payload: bytes) -> None:
        event = parsed(payload)
        if event is None:
            remark(f"this is no event: {payload[:80]!r}")
        elif event["job_id"].startswith(self._job_id):
            self._tell_gap(event)
            click.echo(json.dumps(event) if self._is_json else event_line(event))
            self.shown += 1

    def _tell_gap(self, event: Event) -> None:
        if missing := self._sequences.missing(event):
            first, last = missing.start, missing.stop - 1
            which = f"change {first}" if first == last else f"changes {first} to {last}"
            job_id = event["job_id"]
            remark(
                f"{job_id[:SHORT_ID]}: {which} did not arrive; celery -A tasks mqtt replay --job {shlex.quote(job_id)}"
            )

    def _come_back(self, connection: Connection, exc: Unreachable) -> None:
        """Connect again, however long it takes; what happened meanwhile is in the table.

        A broker that refuses may do so for a while only, as when it starts or its passwords are changed.
        """
        from tasks.sinks.client import KEEPALIVE_S

        since = (datetime.now(UTC) - timedelta(seconds=UNNOTICED_KEEPALIVES * KEEPALIVE_S)).isoformat(
            timespec="seconds"
        )
        said = exc.message
        remark(f"{said}; trying again")
        for wait_s in _waits():
            time.sleep(self._at_most(wait_s))
            if self._is_over():
                return
            connection.answer_within_s = max(self._at_most(ANSWER_WITHIN_S), SHORTEST_WAIT_S)
            try:
                connection.open()
                connection.subscribe(self._settings.mqtt_topic)
            except Unreachable:
                continue
            except Refused as refusal:
                if refusal.message != said:
                    said = refusal.message
                    remark(f"{said}; trying again")
                continue
            remark(f"connected again; what happened meanwhile: celery -A tasks mqtt replay --since {since}")
            return

    def _left_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _at_most(self, seconds: float) -> float:
        """So long, or until the time is up."""
        left_s = self._left_s()
        return seconds if left_s is None else min(seconds, left_s)

    def _is_over(self) -> bool:
        return self.shown == self._count or self._left_s() == 0.0


def _waits() -> Any:
    yield from RECONNECT_S
    while True:
        yield RECONNECT_S[-1]
