"""Which errors waiting helps against, and how long the wait is."""

import errno
import io
import pickle
import random
import socket
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from http.client import BadStatusLine, IncompleteRead, RemoteDisconnected
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import kombu.exceptions
import psycopg
import pytest
import redis.exceptions
from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import IntegrityError, OperationalError

from db.errors import DatabaseUnavailable, DatabaseUnusable
from tasks import errors, remedy

ALL_ERRORS = sorted(
    (cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.MediaTasksError)),
    key=lambda cls: cls.__name__,
)
REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


def sqlite_error(code):
    exc = sqlite3.OperationalError("said by SQLite")
    exc.sqlite_errorcode = code
    return exc


def http_error(status, **headers):
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return HTTPError("http://host/", status, "no", message, io.BytesIO())


def foreign(module, name):
    """An error as a library that is not installed here would raise it."""
    return type(name, (Exception,), {"__module__": module})("no")


@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
def test_our_own_errors_say_by_their_root_whether_waiting_helps(cls):
    assert remedy.is_transient(cls("no")) is issubclass(cls, errors.TransientError)


def test_there_are_errors_of_both_kinds():
    assert {errors.DiskFull, errors.RateLimited} <= {cls for cls in ALL_ERRORS if remedy.is_transient(cls("no"))}
    assert {errors.CorruptMedia, errors.JobTimeout, errors.WorkerLost} <= set(ALL_ERRORS)


@pytest.mark.parametrize(
    "exc",
    [
        REFUSED,
        ConnectionResetError("reset"),
        BrokenPipeError(errno.EPIPE, "broken pipe"),
        TimeoutError("timed out"),
        RemoteDisconnected("closed without a response"),
        IncompleteRead(b""),
        subprocess.TimeoutExpired(["soffice"], 60),
        URLError(REFUSED),
        URLError(TimeoutError("timed out")),
        URLError(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        sqlite_error(sqlite3.SQLITE_BUSY),
        sqlite_error(sqlite3.SQLITE_FULL),
        OperationalError("SELECT 1", {}, sqlite_error(sqlite3.SQLITE_BUSY)),
        psycopg.OperationalError("server closed the connection unexpectedly"),
        DatabaseUnavailable("locked"),
        kombu.exceptions.OperationalError("refused"),
        redis.exceptions.ConnectionError("refused"),
        redis.exceptions.TimeoutError("timed out"),
        foreign("requests.exceptions", "ConnectionError"),
        foreign("requests.exceptions", "Timeout"),
        foreign("httpx", "TransportError"),
        foreign("aiohttp.client_exceptions", "ClientConnectionError"),
        foreign("botocore.exceptions", "HTTPClientError"),
        foreign("urllib3.exceptions", "HTTPError"),
    ],
    ids=repr,
)
def test_waiting_helps_against_networks_servers_and_locks(exc):
    assert remedy.is_transient(exc)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EBUSY", "EMFILE", "ENOMEM", "EHOSTUNREACH"])
def test_waiting_helps_against_full_disks_and_exhausted_systems(name):
    assert remedy.is_transient(OSError(getattr(errno, name), "no"))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_waiting_helps_against_a_server_that_is_busy_or_away(status):
    assert remedy.is_transient(http_error(status))
    assert remedy.is_transient(raised_with_response(status))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422, 501])
def test_a_server_that_refuses_a_request_refuses_it_again(status):
    assert not remedy.is_transient(http_error(status))
    assert not remedy.is_transient(raised_with_response(status))


def raised_with_response(status, **headers):
    """As requests and httpx have it."""
    exc = foreign("httpx", "HTTPStatusError")
    exc.response = SimpleNamespace(status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()})
    return exc


def raised_by_aws(status, code="", **headers):
    """As botocore has it, whose names of headers are in small letters."""
    exc = foreign("botocore.exceptions", "ClientError")
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": {k.replace("_", "-").lower(): v for k, v in headers.items()}}
    exc.response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": metadata}
    return exc


@pytest.mark.parametrize(
    ("status", "code", "is_transient"),
    [
        (503, "SlowDown", True),
        (503, "", True),
        (500, "InternalError", True),
        (429, "TooManyRequests", True),
        (400, "Throttling", True),
        (400, "RequestTimeout", True),
        (None, "SlowDown", True),
        (400, "InvalidRequest", False),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (404, "404", False),
        (None, "NoSuchKey", False),
        (200, None, False),
        (200, ["SlowDown"], False),
    ],
)
def test_a_service_of_aws_is_judged_by_its_code_and_by_its_status(status, code, is_transient):
    assert remedy.is_transient(raised_by_aws(status, code)) is is_transient


@pytest.mark.parametrize("response", [{}, {"Error": None}, {"Error": "SlowDown"}, {"ResponseMetadata": [503]}, [503]])
def test_a_response_of_any_other_shape_says_nothing(response):
    exc = foreign("somebodys.library", "Error")
    exc.response = response

    assert not remedy.is_transient(exc)
    assert remedy.retry_after_s(exc) is None


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("a bug"),
        KeyError("a bug"),
        ZeroDivisionError(),
        FileNotFoundError(errno.ENOENT, "missing"),
        PermissionError(errno.EACCES, "not yours"),
        IsADirectoryError(errno.EISDIR, "a directory"),
        OSError("no number"),
        BadStatusLine("no HTTP"),
        MemoryError(),
        SoftTimeLimitExceeded(),
        sqlite_error(sqlite3.SQLITE_CORRUPT),
        DatabaseUnusable("no database"),
        IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE")),
        foreign("requests.exceptions", "InvalidURL"),
        foreign("somebodys.library", "Error"),
    ],
    ids=repr,
)
def test_what_is_not_known_to_pass_is_permanent(exc):
    assert not remedy.is_transient(exc)


def test_a_subclass_is_what_its_root_is():
    root = type(foreign("httpx", "TransportError"))

    assert remedy.is_transient(type("ReadTimeout", (root,), {"__module__": "httpx"})("no"))


def test_what_an_error_was_raised_from_does_not_count():
    exc = ValueError("judged already")
    exc.__cause__ = TimeoutError()

    assert not remedy.is_transient(exc)


# When


@pytest.mark.parametrize(("jitter", "factor"), [(0.0, 0.75), (1.0, 1.25)])
@pytest.mark.parametrize(("retries", "delay_s"), [(0, 2), (1, 4), (2, 8), (8, 512), (9, 600), (20, 600), (10**6, 600)])
def test_a_delay_doubles_up_to_ten_minutes_with_a_jitter_of_a_quarter(monkeypatch, retries, delay_s, jitter, factor):
    monkeypatch.setattr(random, "random", lambda: jitter)
    monkeypatch.setattr(random, "uniform", lambda low, high: low + (high - low) * jitter)

    assert remedy.delay_s(TimeoutError(), retries) == pytest.approx(delay_s * factor)


@pytest.mark.parametrize(
    "exc",
    [
        errors.RateLimited("slow down", 90),
        http_error(429, Retry_After="90"),
        http_error(503, Retry_After=" 90 "),
        raised_with_response(429, Retry_After="90"),
        raised_by_aws(503, "SlowDown", Retry_After="90"),
    ],
    ids=["RateLimited", "urllib", "spaces", "httpx", "botocore"],
)
def test_a_server_is_not_asked_earlier_than_it_said(exc):
    assert remedy.retry_after_s(exc) == 90
    assert remedy.delay_s(exc, 0) == 90
    assert remedy.delay_s(exc, 9) >= 450


def test_a_server_may_say_a_date():
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)

    assert 95 < remedy.delay_s(http_error(503, Retry_After=date), 0) <= 100


def test_a_date_that_is_over_is_no_reason_to_wait():
    assert remedy.retry_after_s(http_error(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")) == 0


@pytest.mark.parametrize("said_s", [601, 3600, 86_400])
def test_only_a_delay_of_our_own_ends_at_ten_minutes(said_s):
    assert remedy.delay_s(errors.RateLimited("slow down", said_s), 1) == said_s
    assert remedy.delay_s(http_error(429, Retry_After=str(said_s)), 1) == said_s


@pytest.mark.parametrize("said", ["86401", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_that_says_never_is_not_asked_within_a_day(said):
    assert remedy.delay_s(http_error(429, Retry_After=said), 0) > remedy.SERVER_LONGEST_S == 86_400


@pytest.mark.parametrize("said", ["soon", "", "-5", "1.5.2", "Wed, 99 Oct 2015"])
def test_what_can_not_be_read_is_ignored(said):
    assert remedy.retry_after_s(http_error(429, Retry_After=said)) is None
    assert 1.5 <= remedy.delay_s(http_error(429, Retry_After=said), 0) <= 2.5


@pytest.mark.parametrize("exc", [ValueError(), http_error(429), errors.RateLimited("slow down")], ids=repr)
def test_most_errors_say_nothing_of_when(exc):
    assert remedy.retry_after_s(exc) is None


def test_a_negative_time_is_none_at_all():
    assert remedy.retry_after_s(errors.RateLimited("slow down", -3)) == 0


# On their way through a pool


@pytest.mark.parametrize("cls", [*ALL_ERRORS, DatabaseUnavailable, DatabaseUnusable], ids=lambda cls: cls.__name__)
def test_an_error_survives_the_way_out_of_a_pool_child(cls):
    copy = pickle.loads(pickle.dumps(cls("photo.tif is too large")))  # noqa: S301 (our own)

    assert type(copy) is cls
    assert str(copy) == "photo.tif is too large"


def test_a_rate_limit_keeps_its_seconds_and_says_its_message_only():
    copy = pickle.loads(pickle.dumps(errors.RateLimited("slow down", 12.5)))  # noqa: S301 (our own)

    assert (copy.retry_after_s, str(copy)) == (12.5, "slow down")
