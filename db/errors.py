"""What went wrong in a database, as an error that names it and says what to do; in go the drivers' exceptions.

Waiting helps against `DatabaseUnavailable`, and only against that. Both classes are SQLAlchemyErrors too, so that
whoever guards against SQLAlchemy's errors is guarded against these.
"""

import re
import sqlite3
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, InterfaceError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolExhausted

from tasks.errors import DatabaseNotReady, TransientError


class DatabaseUnavailable(TransientError, SQLAlchemyError):
    """The database is locked, unreachable, restarting or out of space: the same call may succeed later."""


class DatabaseUnusable(DatabaseNotReady, SQLAlchemyError):
    """The file is no database, damaged or read-only, or the server refuses this user: somebody has to mend it."""


# https://www.sqlite.org/rescode.html
_SQLITE_TRANSIENT: Final = {
    sqlite3.SQLITE_BUSY: "is locked by another process; whoever holds a transaction open has to end it",
    sqlite3.SQLITE_LOCKED: "is locked by another process; whoever holds a transaction open has to end it",
    sqlite3.SQLITE_PROTOCOL: "is locked by another process; whoever holds a transaction open has to end it",
    sqlite3.SQLITE_FULL: "has no space left; free some on its file system",
    sqlite3.SQLITE_IOERR: "could not be read or written; look at the disk and at its free space",
    sqlite3.SQLITE_CANTOPEN: "can't be opened; look whether its directory is there and its disk has space",
    sqlite3.SQLITE_NOMEM: "has no memory left",
    sqlite3.SQLITE_INTERRUPT: "was interrupted",
}
_SQLITE_FINAL: Final = {
    sqlite3.SQLITE_NOTADB: "is not a database; move it away, or name another file in DATABASE_URL",
    sqlite3.SQLITE_CORRUPT: "is damaged; put a backup in its place (`celery -A tasks db backup` makes them)",
    sqlite3.SQLITE_READONLY: "is read-only; make file and directory writable, or set CL_SERVER_DIR to another one",
    sqlite3.SQLITE_PERM: "may not be written; make file and directory writable, or set CL_SERVER_DIR to another one",
    sqlite3.SQLITE_AUTH: "may not be used",
}
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES_TRANSIENT: Final = ("08", "25006", "40", "53", "55P03", "57", "58")
_POSTGRES_REFUSED: Final = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist")
_POSTGRES_MISSING: Final = re.compile('database ".*" does not exist')


def as_database_error(exc: Exception, database: str) -> Exception:
    """`exc` as DatabaseUnavailable or DatabaseUnusable, or as it is if it is neither (a bug, a constraint)."""
    if isinstance(exc, (DatabaseUnavailable, DatabaseNotReady)):
        return exc
    verdict = _verdict(exc)
    if verdict is None:
        return exc
    kind, remedy = verdict
    return kind(f"{database} {remedy}")


def is_transient(exc: BaseException) -> bool:
    """Whether waiting may help: the database is locked, unreachable, restarting, full, or dropped the connection."""
    if isinstance(exc, DatabaseUnavailable):
        return True
    verdict = _verdict(exc)
    return verdict is not None and verdict[0] is DatabaseUnavailable


def _verdict(exc: BaseException) -> tuple[type[Exception], str] | None:
    if isinstance(exc, PoolExhausted):
        return DatabaseUnavailable, "has all its connections in use; raise DB_POOL_SIZE"
    cause: Any = exc.orig if isinstance(exc, DBAPIError) else exc
    if isinstance(cause, sqlite3.Error):
        return _sqlite_verdict(cause)
    text = str(cause).strip().partition("\n")[0]
    state = getattr(cause, "sqlstate", None)
    if state == "42P01":
        return DatabaseUnusable, f"lacks a table of media-tasks ({text}); run: celery -A tasks db upgrade"
    if state is not None and state.startswith(_POSTGRES_TRANSIENT):
        return DatabaseUnavailable, f"can't answer now: {text}"
    is_dropped = isinstance(exc, InterfaceError) or (isinstance(exc, DBAPIError) and exc.connection_invalidated)
    is_operational = any(cls.__name__ == "OperationalError" for cls in type(cause).__mro__)  # of psycopg or psycopg2
    if state is None and (is_dropped or is_operational):
        if _POSTGRES_MISSING.search(text):
            return (
                DatabaseUnusable,
                f"is not there ({text}); create it (createdb), then run: celery -A tasks db upgrade",
            )
        if any(said in text for said in _POSTGRES_REFUSED):
            return DatabaseUnusable, f"refuses this user ({text}); look at DATABASE_URL"
        return DatabaseUnavailable, f"does not answer: {text}"
    return None


def _sqlite_verdict(cause: sqlite3.Error) -> tuple[type[Exception], str] | None:
    if "no such table" in str(cause) or "no such column" in str(cause):
        return DatabaseUnusable, f"lacks a table or column of media-tasks ({cause}); put a backup in its place"
    code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # the rest are details of the same
    if code in _SQLITE_TRANSIENT:
        return DatabaseUnavailable, f"{_SQLITE_TRANSIENT[code]} ({cause})"
    if code in _SQLITE_FINAL:
        return DatabaseUnusable, f"{_SQLITE_FINAL[code]} ({cause})"
    return None
