"""The options of `apply_async`: what a call takes beside a task's own arguments.

In: options as somebody gave them. Out: times in UTC; or `InvalidArguments` for what would fail the job at its worker.
"""

import inspect
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cache
from typing import Any, Final

from tasks.errors import InvalidArguments
from tasks.values import HIGHEST, LONGEST_NAME, LONGEST_S, is_limit, is_name, is_number, is_whole, moment_of

MAPS: Final = ("celery.map", "celery.starmap", "celery.chunks")
"""Tasks that call another one many times in one message. No worker serves them: no row of theirs could tell how far."""
_CANVAS: Final = ("chain", "chord", "link", "link_error")
_SECONDS: Final = f"a number of seconds, such as 60 ({LONGEST_S:,} at most)"
_TIME: Final = "a datetime or ISO 8601 text, such as '2031-01-31T12:00:00Z'"
_EXPIRES: Final = f"{_SECONDS}, from now, or {_TIME}"
_SIGNATURE: Final = "a signature, such as image_conversion.s('/out.png', format='png'), or a list of them"


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of `apply_async` that would fail the job at its worker, or have its message come back for ever.
    The times are left to `due` and `expiry`.

    Raises:
        InvalidArguments: An option is misspelt, of the wrong kind or out of its range; or the task, or what follows it,
            is one of `MAPS`.
    """
    if name in MAPS or any(_has_map(options.get(option)) for option in _CANVAS):
        raise InvalidArguments(f"{name}: no worker serves map, starmap and chunks; send a group of the calls instead")
    known = _known_options()
    for option in options.keys() - known - set(options.get("stamped_headers") or ()):
        if near := get_close_matches(option, known, n=1, cutoff=0.8):
            raise InvalidArguments(f"{name}: no option is called {option}; did you mean {near[0]}?")
    for option, (is_usable, takes) in _USABLE.items():
        value = options.get(option)
        if value is not None and not is_usable(value):
            raise refused(name, option, value, takes)
    soft_s, hard_s = options.get("soft_time_limit"), options.get("time_limit")
    if soft_s and hard_s and soft_s >= hard_s:
        raise refused(name, "soft_time_limit", soft_s, f"below time_limit={hard_s!r}")


@cache
def _known_options() -> frozenset[str]:
    """What Celery and kombu take by name. Anything else is a property of the message, which may mean something to its
    reader; so only what is nearly one of these is refused.
    """
    from celery import Celery
    from celery.app.amqp import AMQP
    from celery.app.task import Task
    from kombu import Producer

    takers: list[Any] = [Celery.send_task, Task.apply_async, AMQP.as_task_v2, Producer.publish]
    taken = {name for taker in takers for name in inspect.signature(taker).parameters}
    return frozenset(taken | {"queue", "unique_key", "unique_for"})


def _has_map(step: Any) -> bool:
    if isinstance(step, (list, tuple)):
        return any(map(_has_map, step))
    if not isinstance(step, Mapping):
        return False
    kwargs = step.get("kwargs") or {}
    return step.get("task") in MAPS or any(_has_map(kwargs.get(inner)) for inner in ("tasks", "header", "body"))


def due(name: str, options: Mapping[str, Any]) -> tuple[datetime | None, float]:
    """When it may run: a time that somebody has named, or so many seconds from now, which the database counts; None and
    0 for at once. Whatever is due later rests in its row, not in a worker's memory.
    """
    if (eta := options.get("eta")) is not None:
        moment = _time(name, "eta", eta, f"{_TIME} (countdown takes seconds)")
        return (moment if moment > datetime.now(UTC) else None), 0.0
    if (countdown := options.get("countdown")) is None:
        return None, 0.0
    return None, max(0.0, _seconds(name, "countdown", countdown, f"{_SECONDS}, from now"))


def expiry(name: str, options: Mapping[str, Any]) -> datetime | None:
    """When it is no longer worth running."""
    if (expires := options.get("expires")) is None:
        return None
    if isinstance(expires, (str, datetime)):
        return _time(name, "expires", expires, _EXPIRES)
    return datetime.now(UTC) + timedelta(seconds=_seconds(name, "expires", expires, _EXPIRES))


def refused(name: str, option: str, value: Any, takes: str) -> InvalidArguments:
    return InvalidArguments(f"{name}: {option}={value!r:.80} must be {takes}")


def _time(name: str, option: str, value: Any, takes: str) -> datetime:
    """A time in UTC, from a datetime or from text."""
    if (moment := moment_of(value)) is None:
        raise refused(name, option, value, takes)
    return moment


def _seconds(name: str, option: str, value: Any, takes: str) -> float:
    if not (is_number(value) and -LONGEST_S <= value <= LONGEST_S):
        raise refused(name, option, value, takes)
    return float(value)


def _are_signatures(value: Any) -> bool:
    steps = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(step, Mapping) for step in steps)


_USABLE: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "task_id": (is_name, f"a printable text of 1 to {LONGEST_NAME} characters"),
    "time_limit": (is_limit, _SECONDS),
    "soft_time_limit": (is_limit, _SECONDS),
    "unique_for": (is_number, _SECONDS),
    "retries": (is_whole, f"a whole number from 0 to {HIGHEST:,}"),
    "serializer": (lambda value: value == "json", "'json', which is all that workers accept"),
    "headers": (lambda value: isinstance(value, Mapping), "a dict"),
    "link": (_are_signatures, _SIGNATURE),
    "link_error": (_are_signatures, _SIGNATURE),
}
