"""An event as people read it. In: the payload of an event. Out: one line."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePath
from typing import Any, Final

from tasks.cli.text import clock, line

SHORT_ID: Final = 8
SHOWN_OUTPUTS: Final = 3
LONGEST_RESULT: Final = 80

Event = Mapping[str, Any]


def parsed(payload: str | bytes) -> dict[str, Any] | None:
    """An event, or None if it is something else: whoever may publish can publish anything."""
    try:
        event = json.loads(payload)
        datetime.fromtimestamp(event["timestamp"] / 1000).astimezone()
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        return None
    is_event = isinstance(event["event_type"], str) and isinstance(event["job_id"], str) and event["job_id"]
    return event if is_event and type(event["sequence"]) is int else None


def event_line(event: Event) -> str:
    """Time, event, job, task, status, progress, worker, and what came of it."""
    progress = event.get("progress")
    return line(
        _moment(event["timestamp"]),
        f"{event['event_type']:10}",
        f"{event['job_id'][:SHORT_ID]:{SHORT_ID}}",
        f"{event.get('task_type') or '':16}",
        f"{event.get('status') or '':9}",
        f"{progress:3.0f} %" if isinstance(progress, (int, float)) else f"{'':5}",
        f"{event.get('worker_id') or '':12}",
        _note(event),
    )


def _moment(timestamp_ms: int) -> str:
    here = datetime.fromtimestamp(timestamp_ms / 1000).astimezone()
    is_today = here.date() == datetime.now().astimezone().date()
    return f"{here:{'%H:%M:%S' if is_today else '%m-%d %H:%M:%S'}}.{here.microsecond // 1000:03}"


def _note(event: Event) -> str:
    data = event.get("data")
    if not isinstance(data, Mapping):
        return ""
    if "result" in data:
        return _outputs(data["result"])
    if data.get("error_type"):
        again = f", again after {_due(data['run_after_utc'])}" if data.get("run_after_utc") else ""
        return f"{data['error_type']}: {data.get('error_message')}{again}"
    if "deaths" in data:
        return f"its worker is lost; deaths: {data['deaths']}"
    return str(data.get("stage") or "")


def _due(run_after_utc: Any) -> str:
    try:
        return clock(datetime.fromisoformat(run_after_utc))
    except (ValueError, TypeError, OverflowError):
        return str(run_after_utc)


def _outputs(result: Any) -> str:
    """The files that a result names, with their sizes; else the beginning of the result itself."""
    outputs = result.get("outputs", [result]) if isinstance(result, dict) else [None]
    if not isinstance(outputs, list) or not all(isinstance(one, dict) and "output" in one for one in outputs):
        return json.dumps(result)[:LONGEST_RESULT]
    shown = ", ".join(_output(one) for one in outputs[:SHOWN_OUTPUTS])
    return shown + (f" and {len(outputs) - SHOWN_OUTPUTS} more" if len(outputs) > SHOWN_OUTPUTS else "")


def _output(one: Mapping[str, Any]) -> str:
    size = f" {one['width']}x{one['height']}" if "width" in one and "height" in one else ""
    return f"{PurePath(str(one['output'])).name}{size}"
