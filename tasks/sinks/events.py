"""Rows of the job tables as events. In: a log row, or the row of a running job. Out: JSON text."""

import json
import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from db.records import Event
from tasks.sinks import topics

logger = logging.getLogger(__name__)

LONGEST_RESULT_BYTES: Final = 64 * 1024
LONGEST_MESSAGE: Final = 16 * 1024
TRUNCATED: Final[Mapping[str, Any]] = {"result": None, "is_truncated": True}


class Place(NamedTuple):
    """Of an event in the log, by which events are ordered."""

    row_id: int
    job_id: str
    sequence: int


NOWHERE: Final = Place(0, "", 0)


def event_of(row: Mapping[str, Any]) -> str | None:
    """A job's log row as an event; None, and a line in our log, for one that can't be told (a newer version's, say)."""
    told = topics.TOLD.get(row["event_type"])
    if told is None:
        logger.error("log row %d can't be told and is passed over: %r is no event", row["id"], row["event_type"])
        return None
    is_last = told.status.is_terminal and row["sequence"] == row["last_sequence"]
    try:
        return topics.event(
            told,
            row["job_id"],
            _data(row),
            progress=row["progress"] if is_last else 0.0,
            task_type=row["task_type"],
            root_id=row["root_id"] or row["job_id"],
            worker_id=row["worker_id"],
            sequence=row["sequence"],
            at=row["created_at"],
        )
    except Exception:
        logger.exception("log row %d can't be told and is passed over", row["id"])
        return None


def _data(row: Mapping[str, Any]) -> Mapping[str, Any]:
    details = row["details"] or {}
    match row["event_type"]:
        case Event.COMPLETED:
            if row["is_truncated"]:
                return TRUNCATED
            return {"result": row["result"] and json.loads(row["result"], parse_constant=lambda _: None)}
        case Event.FAILED:
            return _failure(row)
        case Event.RETRY:
            due = {"retry_count": details.get("retry_count"), "run_after_utc": details.get("run_after_utc")}
            return _failure(row) | due
        case Event.LOST:
            return {"deaths": details.get("deaths"), "attempt": details.get("attempt")}
    return {}


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    """Why, as the log has it: the job's row may have moved on."""
    error_type, _, message = (row["message"] or "").partition(": ")
    return {"error_type": error_type or None, "error_message": message[:LONGEST_MESSAGE]}


def shortened(event: str, longest_bytes: int) -> str | None:
    """An event without its result, or without the end of its error message; None if it is too long all the same."""
    payload = json.loads(event)
    data = payload["data"]
    if "result" in data:
        payload["data"] = TRUNCATED
    elif "error_message" in data:
        kept = max(len(data["error_message"]) - (len(event) - longest_bytes), 0)  # a character is a byte or more
        payload["data"] = data | {"error_message": data["error_message"][:kept]}
    text = json.dumps(payload)
    return text if len(text) <= longest_bytes else None


def progress_of(row: Mapping[str, Any]) -> str:
    """How far a running job is."""
    return topics.event(
        topics.PROGRESS,
        row["job_id"],
        {"progress": row["progress"], "stage": row["stage"]},
        progress=row["progress"],
        task_type=row["task_type"],
        root_id=row["root_id"] or row["job_id"],
        worker_id=row["claimed_by"],
        sequence=row["sequence"],
        at=row["updated_at"],
    )
