"""Messages that no row waits for, and rows that nobody publishes: the other way round of what the reconciler mends.

In: the broker's ledger, which names its messages or only counts them; the job table. Out: a subject and a
text for each. Neither needs mending: a worker drops or refuses such a message when it takes it, and publishes what is
overdue.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tasks.broker.messages import Addressed
    from tasks.celery import MediaTasks

LOOK_AGAIN_AFTER_S: Final = 1.0
OVERDUE_AFTER_S: Final = 60.0


def stray_messages(app: "MediaTasks") -> Iterator[tuple[str, str]]:
    """Messages that are faulty, or whose job has ended, is unknown or has moved on, where the broker can name them: the
    job's id, and why.

    Each is looked at twice: a worker acknowledges a moment after it has written the end of a job.

    Raises:
        kombu.exceptions.OperationalError: The broker can't be read.
    """
    from tasks.broker.ledger import ledger_of

    ledger = ledger_of(app)
    if not ledger.names_messages:
        return
    suspects = {message.id for page in ledger.pages() for message, _ in _strays(app, page)}
    if suspects:
        time.sleep(LOOK_AGAIN_AFTER_S)
        for page in ledger.pages():
            for message, why in _strays(app, [message for message in page if message.id in suspects]):
                yield message.correlation_id, f"{message.queue} holds a message of it, and {why}"


def surplus_messages(app: "MediaTasks") -> Iterator[tuple[str, str]]:
    """Queues with more ready messages than jobs that wait for theirs, where the broker can only count."""
    from db.records import now
    from tasks import capabilities
    from tasks.broker.ledger import ledger_of
    from tasks.cli.text import counted

    ledger = ledger_of(app)
    if ledger.names_messages:
        return
    app.load_capabilities()
    queues = sorted({*capabilities.names(app), *app.store.queue_counts()})
    published = [app.store.published(now())]
    ready = ledger.ready(queues)
    if any(ready[queue] > published[0].get(queue, 0) for queue in queues):  # perhaps of jobs that are newer
        published.append(app.store.published(now()))
    for queue in queues:
        jobs = max(counts.get(queue, 0) for counts in published)
        if ready[queue] > jobs:
            rest = "the rest are of jobs that have ended or moved on, and are dropped when a worker takes them"
            text = f"{counted(ready[queue], 'message')} ready, {counted(jobs, 'job')} published; {rest}"
            yield queue, f"{text}, or have no row yet (another client's, ENQUEUE=broker)"


def overdue_jobs(app: "MediaTasks") -> Iterator[tuple[str, str]]:
    """Jobs whose time came long ago, and which nobody has published: the job's id, and why."""
    rows = app.store.overdue(OVERDUE_AFTER_S)
    why = "the worker that publishes what is due is behind" if rows and app.live_workers() else "no worker lives"
    for row in rows:
        due = f"{row['run_after_utc']:%Y-%m-%d %H:%M:%S} UTC"
        yield row["job_id"], f"it was due at {due} in {row['queue']}, and nobody has published it: {why}"


def _strays(app: "MediaTasks", messages: Sequence["Addressed"]) -> Iterator[tuple["Addressed", str]]:
    """Of some messages those that no row waits for, and why."""
    from tasks.consumer import fault_in_fields

    rows = {row["job_id"]: row for row in app.store.jobs_by_id(sorted({one.correlation_id for one in messages}))}
    for message in messages:
        headers = json.loads(message.envelope).get("headers")
        if not isinstance(headers, Mapping) or "task" not in headers:
            continue
        if fault := fault_in_fields(headers):
            yield message, f"{fault}; the worker that takes the message refuses it"
        elif app.is_recorded(headers["task"]) and (why := _why(headers, rows.get(message.correlation_id))):
            yield message, why


def _why(headers: Mapping[str, Any], row: Mapping[str, Any] | None) -> str | None:
    from db.records import Status

    if row is None:
        return "no row has this id (as of another client, or ENQUEUE=broker); the worker that takes it makes one"
    publication = headers.get("publication") or 1
    if Status(row["status"]).is_terminal:
        return f"it is {row['status']}; the worker that takes the message drops it"
    if publication != row["publication"]:
        moved = f"it stands at publication {row['publication']}, the message at {publication}"
        return f"{moved}; the worker that takes the message drops it"
    return None
