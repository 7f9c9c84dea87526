"""The story of one job, as people read it: what happened to it, who did it, and why it waits.

In: its row, and what is known of its queue. Out: chapters in order. Nothing is changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from db.records import Event, Row, Status, now
from tasks import capabilities

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.control import Queue


@dataclass(frozen=True)
class Chapter:
    """One step of a job's story: when, what happened, who did it, and what was said."""

    at: datetime
    event: str
    worker: str = ""
    text: str = ""


def story_of(app: "MediaTasks", row: Row, queue: "Queue | None") -> list[Chapter]:
    """All its chapters; for a job that is queued the last ones say why it waits, so its queue has to be given."""
    story = [
        Chapter(log["created_at"], log["event_type"], log["worker_id"] or "", _said(log))
        for log in app.store.logs(row["job_id"])
    ]
    if row["status"] == Status.QUEUED:
        story += [Chapter(now(), "waits", "", reason) for reason in _reasons_to_wait(app, row, queue)]
    elif not Status(row["status"]).is_terminal:
        story.append(_running(app, row))
    return story


def _said(log: Mapping[str, Any]) -> str:
    details = log["details"] or {}
    said = [log["message"] or ""]
    if "attempt" in details and log["event_type"] in (Event.CLAIMED, Event.LOST, Event.RELEASED):
        said.append(f"attempt {details['attempt']}")
    if details.get("deaths"):
        said.append(f"{details['deaths']} of its workers have died")
    if details.get("run_after_utc"):
        said.append(f"runs again after {details['run_after_utc'][:19].replace('T', ' ')} UTC")
    return ", ".join(filter(None, said))


def _reasons_to_wait(app: "MediaTasks", row: Mapping[str, Any], state: "Queue | None") -> list[str]:
    """Why a queued job does not run: all reasons, the strongest first."""
    queue, reasons = row["queue"], []
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
            reasons.append("due, and about to be published" if app.live_workers() else "due; a worker publishes it")
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
