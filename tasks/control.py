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

from celery.app.control import Control
from celery.canvas import maybe_signature
from sqlalchemy.exc import IntegrityError

from db.records import Row, Status, now
from tasks import capabilities
from tasks.errors import InvalidArguments, UnknownJob, UnknownQueue
from tasks.rows import message_of_row, request_of_row, unsent
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


@dataclass(frozen=True)
class Chapter:
    """One step of a job's story: when, what happened, who did it, and what was said."""

    at: datetime
    event: str
    worker: str = ""
    text: str = ""


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
    request = _step(app, job_id) if row is None else request_of_row(row)
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
    """Run a job now: one that waits for its retry or its ETA at once, a failed or cancelled one as `replay` does.

    Raises:
        As `replay`.
    """
    app = app or _app()
    row = _row(app, job_id)
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
    story = [
        Chapter(log["created_at"], log["event_type"], log["worker_id"] or "", _said(log))
        for log in app.store.logs(row["job_id"])
    ]
    if row["status"] == Status.QUEUED:
        story += [Chapter(now(), "waits", "", reason) for reason in _reasons_to_wait(app, row)]
    elif not Status(row["status"]).is_terminal:
        story.append(_running(app, row))
    return story


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
    known = {queue.name: queue for queue in queues(app=app)}
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


class RecordedControl(Control):  # type: ignore[misc, unused-ignore]
    """Celery's remote control, whose revokes are written down: a broadcast reaches only workers that run."""

    app: "MediaTasks"

    def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; also from Flower and `AsyncResult.revoke()`. A running job goes on unless `terminate`."""
        ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
        rows = self.app.store.jobs_by_id(ids) if self.app.has_rows else []
        for job_id in set(ids) - {row["job_id"] for row in rows} if self.app.has_rows else ():
            if (step := _step(self.app, job_id)) is not None:
                self.app.backend.mark_as_revoked(job_id, "revoked", request=step)
        for row in rows:
            if row["status"] == Status.QUEUED or (kwargs.get("terminate") and not Status(row["status"]).is_terminal):
                fence = None if kwargs.get("terminate") else row["publication"]
                request = request_of_row(row, publication=fence)
                self.app.backend.mark_as_revoked(row["job_id"], "revoked", request=request)
        return super().revoke(task_id, *args, **kwargs)


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


def _step(app: "MediaTasks", job_id: str) -> Any:
    """The request of a job that waits, without a row, in the message of the one before it; None if there is none.

    As one that was sent: its predecessor, which knows nothing of this, sends no job that has ended.
    """
    for row in app.store.holding(job_id):
        options = message_of_row(row)["options"]
        chain, body = list(options.get("chain") or ()), options.get("chord")
        steps = [(step, chain[:number]) for number, step in enumerate(chain)] + ([(body, None)] if body else [])
        for step, followers in steps:
            signature = maybe_signature(step, app=app)
            if signature.id == job_id and signature.task in app.tasks:
                request = unsent(
                    signature.task, signature.args, signature.kwargs, {**signature.options, "chain": followers}
                )
                request.is_unsent = False
                return request
    return None


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


def _said(log: Mapping[str, Any]) -> str:
    details = log["details"] or {}
    said = [log["message"] or ""]
    if "attempt" in details and log["event_type"] in ("claimed", "lost", "released"):
        said.append(f"attempt {details['attempt']}")
    if details.get("deaths"):
        said.append(f"{details['deaths']} of its workers have died")
    if details.get("run_after_utc"):
        said.append(f"runs again after {details['run_after_utc'][:19].replace('T', ' ')} UTC")
    return ", ".join(filter(None, said))


def _reasons_to_wait(app: "MediaTasks", row: Mapping[str, Any]) -> list[str]:
    """Why a queued job does not run: all reasons, the strongest first."""
    queue, reasons = row["queue"], []
    state = {queue.name: queue for queue in queues(app=app)}.get(queue)
    if state is None or not state.workers:
        known = {served for worker in app.live_workers() for served in worker["capabilities"]}
        reasons.append(f"no worker serves {queue}{capabilities.nearest(queue, known)}")
    if state is not None and state.is_paused:
        until = f" until {state.paused_until:%Y-%m-%d %H:%M:%S} UTC" if state.paused_until else ""
        reasons.append(f"{queue} is paused{until}{': ' + state.reason if state.reason else ''}")
    due = row["run_after_utc"]
    if row["published_at"] is None:
        why = f"retry {row['retry_count']} " if row["retry_count"] else ""
        late = due is not None and due <= now()
        if not late:
            reasons.append(f"{why}is due at {due:%Y-%m-%d %H:%M:%S} UTC")
        elif state is None or not state.is_paused:
            reasons.append("due, and about to be published")
    elif ahead := _ahead(app, row):
        reasons.append(ahead)
    elif not reasons:
        busy = [worker for worker in app.live_workers() if queue in worker["capabilities"]]
        has_room = any(len(worker["current_tasks"]) < worker["concurrency"] for worker in busy)
        reasons.append("it is the next one" + ("" if has_room or not busy else "; all workers of its queue are busy"))
    return reasons


def _ahead(app: "MediaTasks", row: Mapping[str, Any]) -> str:
    """How many published jobs its worker takes first; empty if there is none."""
    queue, orders = row["queue"], app.settings.queue_strategy
    order = orders.get(queue, orders["*"])
    ahead = app.store.jobs_ahead(queue, row["priority"], row["id"], order)
    if not ahead:
        return ""
    if order == "WEIGHTED_RANDOM":
        return f"drawn by chance, with {_others(ahead)} of {queue}"
    return f"behind {_others(ahead)} of {queue}{'' if order == 'PRIORITY' else f', by {order}'}"


def _others(number: int) -> str:
    return "1 other job" if number == 1 else f"{number:,} other jobs"


def _running(app: "MediaTasks", row: Mapping[str, Any]) -> Chapter:
    """Who has it, how far it is, and whether its holder was heard of lately."""
    worker = {worker["worker_id"]: worker for worker in app.store.workers()}.get(row["claimed_by"])
    heard = f", heard of {(now() - worker['last_heartbeat']).total_seconds():.0f} s ago" if worker else ""
    stage = f" ({row['stage']})" if row["stage"] else ""
    text = f"{row['progress']:.0f} %{stage}, attempt {row['attempt']}{heard}"
    return Chapter(now(), "runs", row["claimed_by"] or "", text)
