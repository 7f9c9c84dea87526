"""What can go wrong with the broker's file, split by remedy. Each message names the file and what to do.

kombu and Celery reconnect and retry after `BrokerUnavailable`, and only after that; everything else reaches the caller
at once. All are kombu `OperationalError`s, so a producer that already catches those catches these.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kombu.exceptions import OperationalError


class BrokerError(OperationalError):
    """Root of the broker's errors."""


class BrokerUnavailable(BrokerError):
    """Waiting may help: the file is locked, the disk full, the directory not there yet."""


class BrokerReplaced(BrokerUnavailable):
    """Another file, or none, has the broker's path now; a new connection finds or makes it."""


class BrokerUnusable(BrokerError):
    """Waiting can't help: somebody has to change the file, its directory or its permissions."""


class BrokerRefuses(BrokerUnavailable, ConnectionError):
    """A server that has accepted this process before: it may again, when it is up or mended, and jobs are running."""


_WAIT = {
    sqlite3.SQLITE_BUSY: "another process kept it locked beyond the busy timeout; look for a long write to this file",
    sqlite3.SQLITE_FULL: "the disk is full; free some space and the work goes on",
    sqlite3.SQLITE_IOERR: "the disk could not be read or written; look at its free space, quota and health",
}
_CHANGE = {
    sqlite3.SQLITE_READONLY: "it is not writable; give this user write permission on the file and on its directory",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened; give this user write permission on the file and on its directory",
    sqlite3.SQLITE_PERM: "it can't be opened; give this user write permission on the file and on its directory",
    sqlite3.SQLITE_CORRUPT: "it is damaged; stop the workers, move it away with its -wal and -shm, and start again",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database; name another path, or move the file away and start again",
}


@contextmanager
def as_broker_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as `BrokerUnavailable` or `BrokerUnusable`; mistakes in the SQL stay what they are."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code: sqlite.org/rescode.html
        if code in _WAIT:
            raise BrokerUnavailable(f"Broker file {path}: {_WAIT[code]} ({exc})") from exc
        if code in _CHANGE:
            raise BrokerUnusable(f"Broker file {path}: {_CHANGE[code]} ({exc})") from exc
        raise
