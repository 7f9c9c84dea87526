"""Topics and payloads of MQTT, as `asyncapi.yaml` describes them. In: plain values. Out: names of topics, JSON text.

A worker's capability is retained; an empty payload in its place means that the worker is gone. Events are not retained.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

# What a change of a job is to a subscriber. What gives a job back to its queue is `queued` again.
EVENT_TYPES: Final[Mapping[str, str]] = {
    "created": "queued",
    "claimed": "processing",
    "started": "processing",
    "progress": "processing",
    "retry": "retry",
    "replaced": "queued",
    "released": "queued",
    "republished": "queued",
    "replayed": "queued",
    "lost": "lost",
    "completed": "completed",
    "failed": "error",
    "cancelled": "cancelled",
}
STATUS_AFTER: Final[Mapping[str, str]] = {
    "created": "queued",
    "claimed": "claimed",
    "started": "running",
    "progress": "running",
    "retry": "queued",
    "replaced": "queued",
    "released": "queued",
    "republished": "queued",
    "replayed": "queued",
    "lost": "queued",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


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
        payload["status"] = "draining"
    return json.dumps(payload)


def milliseconds(seconds: float) -> int:
    """Unix time as MQTT's payloads have it."""
    return int(seconds * 1000)


def event(
    event_type: str,
    job_id: str,
    data: Mapping[str, Any],
    *,
    status: str,
    progress: float,
    task_type: str,
    root_id: str,
    worker_id: str | None,
    sequence: int,
    at: datetime,
) -> str:
    """A change of a job, or how far it is: then `sequence` is that of its last change."""
    payload = {
        "event_type": event_type,
        "job_id": job_id,
        "data": data,
        "progress": progress,
        "task_type": task_type,
        "status": status,
        "root_id": root_id,
        "worker_id": worker_id,
        "sequence": sequence,
        "timestamp": milliseconds(at.timestamp()),
    }
    return json.dumps(payload)
