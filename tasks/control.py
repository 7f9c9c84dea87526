"""What people do to jobs and queues, as Python calls: list, show, explain, cancel, retry, replay; pause, resume, purge.

In: the id of a job or the name of a queue. Out: changed rows; workers follow what the rows say within a second, also
those that start later. Everything is safe to repeat.

    from tasks import control
    control.jobs(status="failed", task="image_resize")
    control.cancel(job.id, reason="the upload was deleted")
    control.pause("image_resize", reason="maintenance", for_s=3600)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import IntegrityError

from db.records import Row, Status, now
from tasks import capabilities
from tasks.errors import InvalidArguments, UnknownJob, UnknownQueue
from tasks.revokes import step_of
from tasks.rows import request_of_row
from tasks.story import Chapter, story_of
from tasks.values import is_number

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

LONGEST_PAUSE_S: Final = 10 * 365 * 86400.0
MOST_JOBS: Final = 2**31 - 1

Job = dict[str, Any]


@dataclass(frozen=True)
class Queue:
    """One queue: what waits and runs in it, who serves it, and whether it is paused."""

    name: str
    queued: int
    running: int
    workers: Sequence[str]
    is_paused: bool = False
    reason: str = ""
    paused_until: datetime | None = None


# Jobs


def jobs(
    *, status: str | None = None, task: str | None = None, limit: int = 50, app: "MediaTasks | None" = None
) -> list[Job]:
    """The newest jobs first: {column of task_queue: value}, times as aware datetimes.

    Args:
        status: Only jobs that stand there: queued, claimed, running, completed, failed or cancelled.
        task: Only jobs of this capability; of one that nothing has the name of there are none.
        limit: So many at most.

    Raises:
        InvalidArguments: No status has this name, or `limit` is no number from 1 on.
    """
    if status is not None and status not in list(Status):
        raise InvalidArguments(f"{status!r} is no status; choose one of {', '.join(Status)}")
    if not isinstance(limit, int) or not 1 <= limit <= MOST_JOBS:
        raise InvalidArguments(f"limit={limit!r}: give a whole number from 1 to {MOST_JOBS:,}")
    wanted = Status(status) if status is not None else None
    return [dict(row) for row in (app or _app()).store.jobs(status=wanted, task_type=task, limit=limit)]


def show(job_id: str, *, app: "MediaTasks | None" = None) -> Job:
    """One job: its row as `jobs` gives it, and under `logs` all its changes in order, {column of task_logs: value}.

    Raises:
        UnknownJob: No job has this id.
    """
    app = app or _app()
    row = _row(app, job_id)
    return {**row, "logs": [dict(log) for log in app.store.logs(job_id)]}


def cancel(job_id: str, reason: str = "", *, app: "MediaTasks | None" = None) -> bool:
    """Cancel a job and what waits for it; False if it has ended already. A step of a chain that has not been sent yet,
    or the body of a chord, never will be.

    A queued job never starts. The process of a running one is ended within three seconds and its temp files are
    removed (prefork pool; in the others its output is dropped). It stays cancelled whatever restarts.

    Raises:
        UnknownJob: No job has this id.
    """
    app = app or _app()
    said = f"cancelled: {reason}" if reason else "cancelled"
    row = _find(app, job_id)
    if row is not None and Status(row["status"]).is_terminal:
        return False
    request = step_of(app, job_id) if row is None else request_of_row(row)
    if request is not None:
        app.backend.mark_as_revoked(job_id, said, request=request)
    return bool(_row(app, job_id)["status"] == Status.CANCELLED)


def replay(job_id: str, *, app: "MediaTasks | None" = None) -> bool:
    """Run a failed or cancelled job again, as new; False if it is neither. What failed because of it follows it.

    Raises:
        UnknownJob: No job has this id.
        InvalidArguments: Another job with its unique_key lives.
    """
    return _queue_again(app or _app(), job_id)


def retry(job_id: str, *, app: "MediaTasks | None" = None) -> bool:
    """Run a job now: one that waits for its retry or its ETA at once, a failed one as `replay` does.

    Raises:
        As `replay`; InvalidArguments, too, for a cancelled one, which only `replay` runs again.
    """
    app = app or _app()
    row = _row(app, job_id)
    if row["status"] == Status.CANCELLED and not was_never_sent(row):
        raise InvalidArguments(f"{job_id} was cancelled; `jobs replay` runs it again")
    if row["status"] == Status.QUEUED and row["published_at"] is None:
        return app.store.republish(job_id, row["publication"], "asked to run now")
    return _queue_again(app, job_id)


def was_never_sent(row: Mapping[str, Any]) -> bool:
    """Whether a job ended with the one that it waits for, as a step of a chain does: it follows that one's replay."""
    is_over = Status(row["status"]).is_terminal
    return bool(is_over and row["published_at"] is None and row["run_after_utc"] is None)


def explain(job_id: str, *, app: "MediaTasks | None" = None) -> list[Chapter]:
    """The whole story of a job in order: changes, workers, errors, waits; and for one that waits, why.

    Raises:
        UnknownJob: No job has this id.
    """
    app = app or _app()
    row = _row(app, job_id)
    queue = _known_queues(app).get(row["queue"]) if row["status"] == Status.QUEUED else None
    return story_of(app, row, queue)


# Queues


def queues(*, app: "MediaTasks | None" = None) -> list[Queue]:
    """All queues that are known, served, paused or have jobs waiting."""
    app = app or _app()
    counts, paused = app.store.queue_counts(), {row["queue"]: row for row in app.store.paused()}
    served: dict[str, list[str]] = {}
    for worker in app.live_workers():
        for queue in worker["capabilities"]:
            served.setdefault(queue, []).append(worker["worker_id"])
    app.load_capabilities()
    return [
        Queue(
            name=name,
            queued=counts.get(name, {}).get(Status.QUEUED, 0),
            running=counts.get(name, {}).get(Status.RUNNING, 0),
            workers=served.get(name, []),
            is_paused=name in paused,
            reason=(paused[name]["reason"] or "") if name in paused else "",
            paused_until=paused[name]["paused_until"] if name in paused else None,
        )
        for name in sorted({*capabilities.names(app), *counts, *served, *paused})
    ]


def queue_named(name: str, *, app: "MediaTasks | None" = None) -> Queue:
    """The queue of this name.

    Raises:
        UnknownQueue: Nothing has this name.
    """
    known = _known_queues(app)
    if name not in known:
        hint = capabilities.nearest(str(name), known) or f"; known: {', '.join(sorted(known))}"
        raise UnknownQueue(f"no queue is called {name}{hint}")
    return known[name]


def pause(queue: str, reason: str = "", *, for_s: float | None = None, app: "MediaTasks | None" = None) -> None:
    """Have no worker take jobs from a queue, until `resume` or for so many seconds; running jobs go on.

    Raises:
        UnknownQueue: Nothing has this name.
        InvalidArguments: `for_s` is no number above 0, or more than ten years.
    """
    app = app or _app()
    queue_named(queue, app=app)
    if for_s is not None and not (is_number(for_s) and 0 < for_s <= LONGEST_PAUSE_S):
        raise InvalidArguments(f"for_s={for_s!r}: give seconds above 0 (ten years at most), or leave it out")
    app.store.pause(queue, reason=reason, until=now() + timedelta(seconds=for_s) if for_s is not None else None)


def resume(queue: str, *, app: "MediaTasks | None" = None) -> bool:
    """End a pause; False if there was none.

    Raises:
        UnknownQueue: Nothing has this name.
    """
    app = app or _app()
    queue_named(queue, app=app)
    return app.store.resume(queue)


def purge(queue: str, *, app: "MediaTasks | None" = None) -> int:
    """Cancel all jobs that wait in a queue; how many there were.

    Raises:
        UnknownQueue: Nothing has this name.
    """
    app = app or _app()
    queue_named(queue, app=app)
    if not app.settings.mirror:
        raise InvalidArguments("MIRROR=off: there are no rows to cancel; use celery -A tasks purge")
    cancelled = 0
    while rows := app.store.queued_in(queue):
        before = cancelled
        for row in rows:
            request = request_of_row(row, publication=row["publication"])
            app.backend.mark_as_revoked(row["job_id"], f"the queue {queue} was purged", request=request)
        ended = app.store.jobs_by_id([row["job_id"] for row in rows])
        cancelled += sum(row["status"] == Status.CANCELLED for row in ended)
        if cancelled == before:
            break
    return cancelled


# How they do it


def _app() -> "MediaTasks":
    from tasks.celery import app

    return app


def _find(app: "MediaTasks", job_id: str) -> Row | None:
    if not isinstance(job_id, str):
        raise UnknownJob(f"{job_id!r} is no job's id, which is a text")
    return app.store.job(job_id)


def _row(app: "MediaTasks", job_id: str) -> Row:
    row = _find(app, job_id)
    if row is None:
        raise UnknownJob(f"no job has the id {job_id}; celery -A tasks jobs list shows them")
    return row


def _known_queues(app: "MediaTasks | None") -> dict[str, Queue]:
    return {queue.name: queue for queue in queues(app=app)}


def _queue_again(app: "MediaTasks", job_id: str) -> bool:
    row = _row(app, job_id)
    if was_never_sent(row):
        raise InvalidArguments(
            f"{job_id} was never sent: it {row['status']} with the job that it waits for; replay that one"
        )
    try:
        return app.store.replay(job_id, is_resting=True) is not None
    except IntegrityError as exc:
        living = app.store.living(row["unique_key"])
        raise InvalidArguments(
            f"{job_id}: {living} lives, with the same unique_key; wait for it, or cancel it"
        ) from exc
