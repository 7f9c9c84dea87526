"""The options of `apply_async`, checked at the call: each is refused by its name, with what it takes.

In: options as Celery has them. Out: times in UTC, or `InvalidArguments`. What is refused here would fail the job at the
worker, or keep a message coming back for ever.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final

from celery.utils.time import maybe_iso8601

from db.records import now
from tasks.errors import InvalidArguments

LONGEST_S: Final = 100 * 365 * 86400
LONGEST_NAME: Final = 255
_SECONDS: Final = f"a number of seconds, such as 60 ({LONGEST_S:,} at most)"
_TIME: Final = "a datetime or ISO 8601 text, such as '2031-01-31T12:00:00Z'"
_SIGNATURE: Final = "a signature, such as image_conversion.s('/out.png', format='png'), or a list of them"


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what no worker can use; the times are left to `due` and `expiry`.

    Raises:
        InvalidArguments: An option is of the wrong kind or out of its range.
    """
    for option, (is_usable, takes) in _USABLE.items():
        value = options.get(option)
        if value is not None and not is_usable(value):
            raise refused(name, option, value, takes)


def due(name: str, options: Mapping[str, Any]) -> datetime | None:
    """When it may run; None for at once: whatever is due later rests in its row, not in a worker's memory."""
    eta = options.get("eta")
    moment = (
        _moment(name, "eta", eta, f"{_TIME} (countdown takes seconds)")
        if eta is not None
        else _after(name, "countdown", options.get("countdown"), f"{_SECONDS}, from now")
    )
    return moment if moment is not None and moment > now() else None


def expiry(name: str, options: Mapping[str, Any]) -> datetime | None:
    """When it is no longer worth running."""
    expires = options.get("expires")
    read = _moment if isinstance(expires, (str, datetime)) else _after
    return read(name, "expires", expires, f"{_SECONDS}, from now, or {_TIME}")


def refused(name: str, option: str, value: Any, takes: str) -> InvalidArguments:
    return InvalidArguments(f"{name}: {option}={value!r:.80} must be {takes}")


def _moment(name: str, option: str, value: Any, takes: str) -> datetime:
    """A time in UTC, from a datetime or from text; one without a zone is UTC."""
    moment: Any = value
    with suppress(ValueError, OverflowError):
        moment = maybe_iso8601(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        raise refused(name, option, value, takes)
    return moment if moment.tzinfo else moment.replace(tzinfo=now().tzinfo)


def _after(name: str, option: str, value: Any, takes: str) -> datetime | None:
    """A time in UTC, from seconds from now."""
    if value is None:
        return None
    if not (_is_number(value) and -LONGEST_S <= value <= LONGEST_S):
        raise refused(name, option, value, takes)
    return now() + timedelta(seconds=value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_limit(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= LONGEST_S


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME


def _are_signatures(value: Any) -> bool:
    steps = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(step, Mapping) for step in steps)


_USABLE: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "task_id": (_is_name, f"a printable text of 1 to {LONGEST_NAME} characters"),
    "time_limit": (_is_limit, _SECONDS),
    "soft_time_limit": (_is_limit, _SECONDS),
    "retries": (_is_count, "a whole number from 0"),
    "serializer": (lambda value: value == "json", "'json', which is all that workers accept"),
    "headers": (lambda value: isinstance(value, Mapping), "a dict"),
    "link": (_are_signatures, _SIGNATURE),
    "link_error": (_are_signatures, _SIGNATURE),
}
