"""Whether a row can hold what somebody else gave or sent. In: anything. Out: yes or no, or a time in UTC."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from celery.utils.time import maybe_iso8601

LONGEST_S: Final = 100 * 365 * 86400
LONGEST_NAME: Final = 255
HIGHEST: Final = 2**31 - 1
"""What an integer column of PostgreSQL has room for."""


def is_name(value: Any) -> bool:
    """Whether an id or a name can stand in a row, and in a log."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number for which a column has room."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= HIGHEST


def is_limit(value: Any) -> bool:
    """Whether it can be a time limit, seconds. A pool that is given another one watches over none of them any more."""
    return is_number(value) and 0 <= value <= LONGEST_S


def moment_of(value: Any) -> datetime | None:
    """The time, in UTC, of a datetime or of ISO 8601 text; without a zone it is in UTC already.

    None if it is no time, or none that can be told in UTC, as near the years 1 and 9999.
    """
    with suppress(OverflowError, TypeError, ValueError):
        moment = maybe_iso8601(value) if isinstance(value, str) else value
        if isinstance(moment, datetime):
            return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None
