"""What helps against an error: waiting, or nothing. In: an exception of a task's body. Out: transient or not, and when.

Transient are the project's own `TransientError`s and, from the libraries that bodies use, what a network, a server or a
disk may get over: refused and broken connections, timeouts, rate limits, locked and unreachable databases, full disks.
Everything else is permanent: a bug or a broken file fails again.
"""

import errno
import random
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from celery.exceptions import SoftTimeLimitExceeded

from tasks.errors import MediaTasksError, TransientError

RETRY_FIRST_S: Final = 2.0
RETRY_LONGEST_S: Final = 600.0
SERVER_LONGEST_S: Final = 86_400.0
"""A job whose server wants to be left alone for longer fails: somebody has to hear of that rather than to wait."""

_TRANSIENT_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED}
    | {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.EPIPE, errno.EAGAIN}
    | {errno.ESTALE, errno.EIO, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
# Named, since they may not be installed, or are not loaded by a producer: the roots under which libraries put what a
# network does to them.
_TRANSIENT_NAMES: Final = frozenset(
    {
        "requests.exceptions.ConnectionError",
        "requests.exceptions.Timeout",
        "requests.exceptions.ChunkedEncodingError",
        "urllib3.exceptions.HTTPError",
        "httpx.TransportError",
        "aiohttp.client_exceptions.ClientConnectionError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "kombu.exceptions.OperationalError",
        "redis.exceptions.ConnectionError",
        "redis.exceptions.TimeoutError",
        "http.client.RemoteDisconnected",
        "http.client.IncompleteRead",
        "subprocess.TimeoutExpired",
    }
)
# https://www.rfc-editor.org/rfc/rfc9110#section-15: request timeout, too early, too many requests, and gateways.
_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
# What services of AWS, and those that speak like them, say with whatever status: the transient and the throttled errors
# of botocore/retries/standard.py.
_TRANSIENT_CODES: Final = (
    "BandwidthLimitExceeded",
    "EC2ThrottledException",
    "LimitExceededException",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "TransactionInProgressException",
)


def is_transient(exc: BaseException) -> bool:
    """Whether the same job may work later. What an error was raised from does not count: somebody judged that already.

    A soft time limit is not: the same input takes as long again. A task that wants it says `retry_on_timeout=True`.
    """
    from urllib.error import URLError  # a producer loads none of these

    from db.errors import is_transient as is_transient_database_error

    if isinstance(exc, MediaTasksError):
        return isinstance(exc, TransientError)
    if isinstance(exc, SoftTimeLimitExceeded):
        return False
    if _said_by_aws(exc, "Error", "Code") in _TRANSIENT_CODES:
        return True
    if (status := _http_status(exc)) is not None:
        return status in _TRANSIENT_STATUSES
    if isinstance(exc, URLError) and isinstance(exc.reason, BaseException):
        return is_transient(exc.reason)
    if isinstance(exc, socket.gaierror):
        return exc.errno == socket.EAI_AGAIN
    if isinstance(exc, (ConnectionError, TimeoutError)) or is_transient_database_error(exc):
        return True
    if isinstance(exc, OSError) and exc.errno in _TRANSIENT_ERRNOS:
        return True
    return any(f"{cls.__module__}.{cls.__qualname__}" in _TRANSIENT_NAMES for cls in type(exc).__mro__)


def delay_s(exc: BaseException, retries: int) -> float:
    """Seconds until the next attempt: exponential backoff 2, 4, 8 ... 600 s with a jitter of a quarter around it.

    The jitter stands around the delay, not between zero and it, so that a retry never comes at once. A server that says
    `Retry-After` is not asked earlier, whatever it says: above SERVER_LONGEST_S the caller has to give up.
    """
    backoff_s = RETRY_FIRST_S * 2.0 ** min(retries, 20)
    jittered_s = min(backoff_s, RETRY_LONGEST_S) * random.uniform(0.75, 1.25)  # noqa: S311 (no secret)
    return max(jittered_s, retry_after_s(exc) or 0.0)


def retry_after_s(exc: BaseException) -> float | None:
    """What the server said: an attribute `retry_after_s`, or a header (RFC 9110, 10.2.3: seconds, or a date,
    which is held against the clock of this host).
    """
    said = getattr(exc, "retry_after_s", None)
    if isinstance(said, (int, float)):
        return max(float(said), 0.0)
    headers: Any = getattr(getattr(exc, "response", None), "headers", None) or getattr(exc, "headers", None)
    headers = headers or _said_by_aws(exc, "ResponseMetadata", "HTTPHeaders")
    try:
        text = headers.get("Retry-After") or headers.get("retry-after") if headers is not None else None
    except (AttributeError, TypeError):
        return None
    if not isinstance(text, str):
        return None
    if text.strip().isdigit():
        return float(text)
    from email.utils import parsedate_to_datetime

    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _http_status(exc: BaseException) -> int | None:
    """The status of an HTTP error of urllib, requests, httpx, aiohttp or botocore."""
    response = getattr(exc, "response", None)
    own = [getattr(owner, name, None) for owner, name in ((response, "status_code"), (exc, "code"), (exc, "status"))]
    for value in (*own, _said_by_aws(exc, "ResponseMetadata", "HTTPStatusCode")):
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _said_by_aws(exc: BaseException, part: str, name: str) -> Any:
    """What a service said, as botocore's ClientError has it: its response is a dict of dicts."""
    response = getattr(exc, "response", None)
    said = response.get(part) if isinstance(response, Mapping) else None
    return said.get(name) if isinstance(said, Mapping) else None
