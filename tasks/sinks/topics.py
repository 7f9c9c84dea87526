"""Topics and payloads of MQTT, as `asyncapi.yaml` describes them. In: plain values. Out: names of topics, JSON text.

A worker's capability is retained; an empty payload in its place means that the worker is gone. Events are not retained.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from db.records import Event, Status, WorkerStatus


class Told(NamedTuple):
    """What a change of a job is to a subscriber: the event_type of the payload, and where the job stands after it."""

    event_type: str
    status: Status


# What gives a job back to its queue is `queued` again. Rows of workers are not told.
TOLD: Final[Mapping[Event, Told]] = {
    Event.CREATED: Told("queued", Status.QUEUED),
    Event.CLAIMED: Told("processing", Status.CLAIMED),
    Event.STARTED: Told("processing", Status.RUNNING),
    Event.RETRY: Told("retry", Status.QUEUED),
    Event.REPLACED: Told("queued", Status.QUEUED),
    Event.RELEASED: Told("queued", Status.QUEUED),
    Event.REPUBLISHED: Told("queued", Status.QUEUED),
    Event.REPLAYED: Told("queued", Status.QUEUED),
    Event.LOST: Told("lost", Status.QUEUED),
    Event.COMPLETED: Told("completed", Status.COMPLETED),
    Event.FAILED: Told("error", Status.FAILED),
    Event.CANCELLED: Told("cancelled", Status.CANCELLED),
}
# How far a running job is stands in its row, and in no row of the log.
PROGRESS: Final = TOLD[Event.STARTED]


def capability_topic(prefix: str, worker_id: str) -> str:
    """The topic of one worker, and of no other one: characters that MQTT keeps for itself are escaped as in a URL."""
    return f"{prefix}/{''.join(map(_escaped, worker_id))}"


def _escaped(character: str) -> str:
    if character.isprintable() and character not in "%#+/":
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))


def capability(worker_id: str, capabilities: Sequence[str], idle_count: int, *, is_draining: bool) -> str:
    """What a worker can do and how many jobs it could take now."""
    payload: dict[str, Any] = {
        "id": worker_id,
        "worker_id": worker_id,
        "capabilities": list(capabilities),
        "idle_count": idle_count,
        "timestamp": milliseconds(time.time()),
    }
    if is_draining:
        payload["status"] = WorkerStatus.DRAINING
    return json.dumps(payload)


def milliseconds(seconds: float) -> int:
    """Unix time as MQTT's payloads have it."""
    return int(seconds * 1000)


def event(
    told: Told,
    job_id: str,
    data: Mapping[str, Any],
    *,
    progress: float,
    task_type: str,
    root_id: str,
    worker_id: str | None,
    sequence: int,
    at: datetime,
) -> str:
    """A change of a job, or how far it is: then `sequence` is that of its last change."""
    payload = {
        "event_type": told.event_type,
        "job_id": job_id,
        "data": data,
        "progress": progress,
        "task_type": task_type,
        "status": told.status,
        "root_id": root_id,
        "worker_id": worker_id,
        "sequence": sequence,
        "timestamp": milliseconds(at.timestamp()),
    }
    return json.dumps(payload)
