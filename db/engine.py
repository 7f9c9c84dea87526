"""Connections to the job database: in goes a URL, out come transactions that any process and thread may use.

A process that forks needs no care: its children open connections of their own. Errors that waiting or an operator can
mend are raised as `db.errors` names them.
"""

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, make_url
from sqlalchemy.exc import SQLAlchemyError

from db import sqlite
from db.errors import as_database_error, is_transient
from db.postgres import PostgresPool
from db.sqlite import SqliteFile

T = TypeVar("T")
LONGEST_WAIT_S: Final = 5.0


class Database:
    """One database, whichever process asks.

    Args:
        url: SQLAlchemy URL, `sqlite:///...` or `postgresql://...`.
        mmap_bytes: SQLite's `mmap_size`.
        pool_size: Connections to PostgreSQL that a process keeps open; to SQLite it is one.
        dumps, loads: JSON text of a document and back.
    """

    def __init__(
        self,
        url: str,
        *,
        mmap_bytes: int = 256 * 2**20,
        pool_size: int = 5,
        dumps: Callable[[Any], str] | None = None,
        loads: Callable[[str], Any] | None = None,
    ) -> None:
        self.url: Final = make_url(url)
        self.is_sqlite: Final = self.url.get_backend_name() == "sqlite"
        options = {"json_serializer": dumps, "json_deserializer": loads}
        self._server: Final = (
            SqliteFile(self.url, mmap_bytes=mmap_bytes, options=options)
            if self.is_sqlite
            else PostgresPool(self.url, pool_size=pool_size, options=options)
        )
        self._here = _Here()
        self.is_checked = False
        """Whether this process has looked at the schema of the file or server that it is connected to."""
        _databases.add(self)

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None for PostgreSQL."""
        return self._server.path

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A read-write transaction: committed at the end, rolled back on an error. Inside another one it joins that.

        Raises:
            DatabaseUnavailable: Locked, unreachable, full; after an error at its end it may be committed nevertheless.
            DatabaseUnusable: No database, damaged, read-only, or refused.
        """
        if self._here.is_in_transaction and self._here.connection is not None:
            yield self._here.connection
            return
        with self._entered(self._server.transaction(self._here.connection), is_in_transaction=True) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection on which each statement is a transaction of its own. Inside `transaction()` it joins that.

        Raises:
            As `transaction()`.
        """
        if self._here.connection is not None:
            yield self._here.connection
            return
        with self._entered(self._server.connection(), is_in_transaction=False) as connection:
            yield connection

    def close_if_replaced(self) -> None:
        """Close the connection to a file that is no longer the one at its path, so that the next use opens that one."""
        if self.is_checked and self._server.is_replaced:
            self.close()

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        self.is_checked = False
        self._server.close()

    @contextmanager
    def _entered(self, context: AbstractContextManager[Connection], *, is_in_transaction: bool) -> Iterator[Connection]:
        here = self._here
        outer = here.connection, here.is_in_transaction
        try:
            with context as connection:
                try:
                    here.connection, here.is_in_transaction = connection, is_in_transaction
                    yield connection
                finally:
                    here.connection, here.is_in_transaction = outer
        except (SQLAlchemyError, sqlite3.Error) as exc:
            clear = as_database_error(exc, str(self.path or self))
            if clear is exc:
                raise
            if self.is_sqlite:
                self._server.close()  # the file may be mended, or another one, by the next use
            raise clear from exc


class _Here(threading.local):
    """What this thread is in the middle of."""

    connection: Connection | None = None
    is_in_transaction: bool = False


_databases: "weakref.WeakSet[Database]" = weakref.WeakSet()


def _before_fork() -> None:
    sqlite.lock.acquire()
    for database in list(_databases):
        database._server.before_fork()


def _after_fork_in_child() -> None:
    for database in list(_databases):
        database._here = _Here()
        database._server.after_fork_in_child()
    sqlite.lock.release()


os.register_at_fork(
    before=_before_fork, after_in_parent=lambda: sqlite.lock.release(), after_in_child=_after_fork_in_child
)


def patiently(call: Callable[[], T], *, on_wait: Callable[[BaseException, float], None]) -> T:
    """Call until the database answers. Each call must be safe to repeat, as a lost connection may hide a commit.

    Args:
        on_wait: Told the error and the seconds until the next try, which double from 50 ms up to LONGEST_WAIT_S.
    """
    wait_s = 0.05
    while True:
        try:
            return call()
        except SQLAlchemyError as exc:
            if not is_transient(exc):
                raise
            on_wait(exc, wait_s)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
