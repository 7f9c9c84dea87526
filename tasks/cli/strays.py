"""Messages that no row waits for, and rows that nobody publishes: the other way round of what the reconciler mends.

In: the embedded broker's file, which is only read, or the counts of another broker; the job table. Out: a subject and a
text for each. Neither needs mending: a worker drops such a message when it takes it, and publishes what is overdue.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

LOOK_AGAIN_AFTER_S = 1.0
OVERDUE_AFTER_S = 60.0
IN_ONE_LOOK = 1000

_MESSAGES = """
SELECT id, queue, correlation_id, envelope FROM messages WHERE id > ? AND correlation_id IS NOT NULL ORDER BY id LIMIT ?
"""


def stray_messages(app: Any) -> Iterator[tuple[str, str]]:
    """Messages of the embedded broker whose job has ended, is unknown or has moved on: the job's id, and why.

    Each is looked at twice: a worker acknowledges a moment after it has written the end of a job.

    Raises:
        kombu.exceptions.OperationalError: The file can't be read.
    """
    from kombu.exceptions import OperationalError

    if (path := _embedded(app)) is None or not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as broker:
            suspects = {message for some in _pages(broker) for message, _, _ in _strays(app, some)}
            if suspects:
                time.sleep(LOOK_AGAIN_AFTER_S)
            for some in _pages(broker) if suspects else ():
                for _, job_id, text in _strays(app, [one for one in some if one[0] in suspects]):
                    yield job_id, text
    except sqlite3.Error as exc:
        raise OperationalError(f"{path}: {exc}") from exc


def surplus_messages(app: Any) -> Iterator[tuple[str, str]]:
    """Queues with more ready messages than jobs that wait for theirs, where the broker can only count."""
    from db.records import now
    from tasks import capabilities
    from tasks.broker.ledger import ledger_of
    from tasks.cli.text import counted

    if _embedded(app) is not None:
        return
    app.load_capabilities()
    ledger = ledger_of(app)
    for queue in sorted({*capabilities.names(app), *app.store.queue_counts()}):
        before = app.store.published(now()).get(queue, 0)
        ready = ledger.ready(queue)
        jobs = max(before, app.store.published(now()).get(queue, 0)) if ready > before else before
        if ready > jobs:
            rest = "the rest are of jobs that have ended or moved on, and are dropped when a worker takes them"
            text = f"{counted(ready, 'message')} ready, {counted(jobs, 'job')} published; {rest}"
            yield queue, f"{text}, or have no row yet (another client's, ENQUEUE=broker)"


def overdue_jobs(app: Any) -> Iterator[tuple[str, str]]:
    """Jobs whose time came long ago, and which nobody has published: the job's id, and why."""
    rows = app.store.overdue(OVERDUE_AFTER_S)
    why = "the worker that publishes what is due is behind" if rows and app.live_workers() else "no worker lives"
    for row in rows:
        due = f"{row['run_after_utc']:%Y-%m-%d %H:%M:%S} UTC"
        yield row["job_id"], f"it was due at {due} in {row['queue']}, and nobody has published it: {why}"


def _embedded(app: Any) -> Path | None:
    connection = app.connection_for_read()
    return Path(connection.virtual_host).absolute() if connection.transport.driver_type == "sqlite" else None


def _pages(broker: sqlite3.Connection) -> Iterator[list[tuple[Any, ...]]]:
    last = 0
    while some := broker.execute(_MESSAGES, (last, IN_ONE_LOOK)).fetchall():
        yield some
        last = some[-1][0]


def _strays(app: Any, messages: list[tuple[Any, ...]]) -> Iterator[tuple[int, str, str]]:
    """Of some messages those that no row waits for: the message, its job, and why."""
    rows = {row["job_id"]: row for row in app.store.jobs_by_id(sorted({job_id for _, _, job_id, _ in messages}))}
    for message, queue, job_id, envelope in messages:
        headers = json.loads(envelope).get("headers") or {}
        is_job = "task" in headers and app.is_recorded(headers["task"])
        if is_job and (why := _why(headers, rows.get(job_id))):
            yield message, job_id, f"{queue} holds a message of it, and {why}"


def _why(headers: Mapping[str, Any], row: Mapping[str, Any] | None) -> str | None:
    from db.records import Status

    if row is None:
        return "no row has this id (as of another client, or ENQUEUE=broker); the worker that takes it makes one"
    publication = int(headers.get("publication") or 1)
    if Status(row["status"]).is_terminal:
        return f"it is {row['status']}; the worker that takes the message drops it"
    if publication != row["publication"]:
        moved = f"it stands at publication {row['publication']}, the message at {publication}"
        return f"{moved}; the worker that takes the message drops it"
    return None
