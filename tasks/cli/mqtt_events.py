"""An event as people read it. In: a payload, which may be anything. Out: one line, if it is an event."""

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
    """An event, or None if it is something else. What `event_line` shows of it is of the right type, but for `data`."""
    from tasks.values import is_number, is_whole

    event = timed(payload)
    if event is None:
        return None
    is_named = all(isinstance(event.get(name), str) and event[name] for name in ("event_type", "job_id"))
    is_told = all(isinstance(event.get(name), str | None) for name in ("task_type", "status", "worker_id"))
    progress = event.get("progress", 0)
    is_placed = is_whole(event.get("sequence"), least=1) and is_number(progress) and 0 <= progress <= 100
    return event if is_named and is_told and is_placed else None


def timed(payload: str | bytes) -> dict[str, Any] | None:
    """A JSON object whose `timestamp` can be shown, or None: whoever may publish can publish anything."""
    from tasks.values import is_number

    try:
        found = json.loads(payload)
        datetime.fromtimestamp(found["timestamp"] / 1000).astimezone()
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        return None
    return found if isinstance(found, dict) and is_number(found["timestamp"]) else None


def event_line(event: Event) -> str:
    """Time, event, job, task, status, progress, worker, and what came of it."""
    return line(
        _moment(event["timestamp"]),
        f"{event['event_type']:10}",
        f"{event['job_id'][:SHORT_ID]:{SHORT_ID}}",
        f"{event.get('task_type') or '':16}",
        f"{event.get('status') or '':9}",
        f"{event['progress']:3.0f} %" if "progress" in event else f"{'':5}",
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
