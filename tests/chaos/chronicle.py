"""A job's chronicle: its log rows, read as the story that they must be. In: rows. Out: what can't be, and what was."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

TERMINAL = ("completed", "failed", "cancelled")
# event -> (where a job may stand before it, where it stands after it)
MOVES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "created": (("nowhere",), "queued"),
    "claimed": (("queued",), "claimed"),
    "started": (("claimed",), "running"),
    "lost": (("running",), "queued"),
    "released": (("running",), "queued"),
    "retry": (("running",), "queued"),
    "republished": (("queued",), "queued"),
    "replayed": (("failed", "cancelled"), "queued"),
    "completed": (("running",), "completed"),
    "failed": (("queued", "running"), "failed"),
    "cancelled": (("queued", "running"), "cancelled"),
}


@dataclass(frozen=True)
class Attempt:
    """One claim of a job, and how it ended."""

    number: int
    worker: str
    claimed_at: datetime
    ended_at: datetime | None = None
    end: str = ""


@dataclass
class Chronicle:
    """What the log of a job says."""

    attempts: list[Attempt] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    since_replay: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def read(row: Mapping[str, Any], logs: Sequence[Mapping[str, Any]]) -> Chronicle:
    """The chronicle of a job; its faults are what is wrong with it, taken for itself and beside the row."""
    told = Chronicle()
    place = "nowhere"
    numbers = [log["sequence"] for log in logs]
    if numbers != list(range(1, len(logs) + 1)):
        told.faults.append(f"its log is numbered {numbers}")
    if row["sequence"] != len(logs):
        told.faults.append(f"its row has sequence {row['sequence']}, its log {len(logs)} rows")
    for log in logs:
        event = log["event_type"]
        before, after = MOVES.get(event, ((), "nowhere"))
        if place not in before:
            told.faults.append(f"event {log['sequence']}, {event}, comes while it is {place}")
        place = after
        told.events[event] += 1
        told.since_replay[event] += 1
        if event == "replayed":
            told.since_replay.clear()
        _attempt(told, event, log)
    if place != row["status"]:
        told.faults.append(f"its row is {row['status']}, its log ends with {place}")
    _counted(told, row)
    return told


def _attempt(told: Chronicle, event: str, log: Mapping[str, Any]) -> None:
    if event == "claimed":
        number = (log["details"] or {}).get("attempt", 0)
        if told.attempts and number <= told.attempts[-1].number:
            told.faults.append(f"attempt {number} follows attempt {told.attempts[-1].number}")
        told.attempts.append(Attempt(number, log["worker_id"], log["created_at"]))
    elif told.attempts and not told.attempts[-1].end and event != "started":
        last = told.attempts[-1]
        told.attempts[-1] = Attempt(last.number, last.worker, last.claimed_at, log["created_at"], event)


def _counted(told: Chronicle, row: Mapping[str, Any]) -> None:
    """Each close raises the attempt, and so does each claim; deaths and retries count since the last replay."""
    events, since = told.events, told.since_replay
    expected = {
        "attempt": events["claimed"] + events["lost"] + events["released"],
        "deaths": since["lost"],
        "retry_count": since["retry"],
    }
    told.faults += [
        f"its row has {name} {row[name]}, its log makes that {number}"
        for name, number in expected.items()
        if row[name] != number
    ]
    if (ends := sum(since[event] for event in TERMINAL)) != 1:
        told.faults.append(f"its log has {ends} terminal events")
