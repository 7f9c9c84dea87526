"""One handle on one SQLite file, which several processes share and threads may fork around.

In: a path. Out: `transaction()`, which commits, rolls back and explains errors. The file is made on first use, and
refused if it is newer, somebody else's, or on a network file system.
"""

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.broker.errors import BrokerReplaced, BrokerUnavailable, BrokerUnusable, as_broker_errors
from tasks.broker.files import NETWORK_FILE_SYSTEMS, file_system_of, identity, set_patiently

# Held around every use of SQLite and around every fork, so that no child is born while a thread is inside SQLite.
_lock = threading.RLock()
_databases: "weakref.WeakSet[Database]" = weakref.WeakSet()
_inherited: list[sqlite3.Connection] = []  # a child must not close its parent's handles: sqlite.org/howtocorrupt.html

_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=NORMAL",  # commits survive a crash of any process; a power cut may undo the last ones
    "wal_autocheckpoint=4000",  # pages: a checkpoint syncs, so it stays out of the 99th percentile
    "cache_size=-10000",
    "temp_store=MEMORY",
)
_VERSION = "SELECT user_version, EXISTS (SELECT 1 FROM sqlite_master) FROM pragma_user_version"


class Database:
    """A handle that is reopened after a fork and refuses to go on when its file was replaced.

    Args:
        path: the file; its directory must exist.
        schema: statements that make an empty file ready, and may run twice; `version` is kept in `user_version`.
        busy_timeout_s: how long a statement waits for another process's write.
    """

    def __init__(self, path: Path, *, schema: str, version: int, busy_timeout_s: float = 5.0) -> None:
        self.path = path
        self._schema = schema
        self._version = version
        self._busy_timeout_s = busy_timeout_s
        self._handle: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._is_open = False
        _databases.add(self)

    def open(self) -> None:
        """Open or create the file.

        Raises:
            BrokerUnavailable: locked, full, or its directory is missing.
            BrokerUnusable: newer, foreign, damaged, not writable, or on a network file system.
        """
        with _lock:
            if self._handle is None:
                self._handle = self._connect()
            self._is_open = True

    def close(self) -> None:
        with _lock:
            self._is_open = False
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.close()

    def _close_handle(self) -> None:
        """Close the handle until its next use, unless this thread is in a transaction."""
        if self._handle is not None and not self._handle.in_transaction:
            self._handle.close()
            self._handle = None

    @contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """Run the block in one transaction; inside another one it joins that. A read takes no lock.

        Raises:
            BrokerReplaced: the path leads to another file now, or to none.
            BrokerError: see `errors`.
        """
        with _lock, as_broker_errors(self.path):
            handle = self._usable_handle()
            if handle.in_transaction or not write:
                yield handle
                return
            self.check()
            handle.execute("BEGIN IMMEDIATE")
            try:
                yield handle
                handle.execute("COMMIT")
            except BaseException:
                if handle.in_transaction:
                    handle.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Raise `BrokerReplaced` if the file at the path is not the one that was opened."""
        if identity(self.path) != self._identity:
            raise BrokerReplaced(f"Broker file {self.path} was removed or replaced; reconnecting to what is there now")

    def _usable_handle(self) -> sqlite3.Connection:
        if not self._is_open:
            raise BrokerUnavailable(f"Broker file {self.path}: this connection is closed")
        if self._handle is None:  # closed for a fork
            self.check()
            self._handle = self._connect()
        return self._handle

    def _connect(self) -> sqlite3.Connection:
        _refuse_missing_or_network_directory(self.path)
        with as_broker_errors(self.path):
            handle = sqlite3.connect(
                self.path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(handle)
            except BaseException:
                handle.close()
                raise
        self._identity = identity(self.path)
        return handle

    def _prepare(self, handle: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self._busy_timeout_s
        for pragma in _PRAGMAS:
            set_patiently(handle, pragma, deadline)
        version, has_tables = handle.execute(_VERSION).fetchone()
        if version > self._version:
            raise BrokerUnusable(
                f"Broker file {self.path} has format {version}, made by a newer release; this one reads up to "
                f"{self._version}. Upgrade here too, or name another file"
            )
        if version == 0 and has_tables:
            raise BrokerUnusable(f"Broker file {self.path} holds another program's tables; name another file")
        if version == 0:
            handle.executescript(f"BEGIN IMMEDIATE; {self._schema} PRAGMA user_version = {self._version}; COMMIT")


def _refuse_missing_or_network_directory(path: Path) -> None:
    try:
        kind = file_system_of(path.parent)
    except PermissionError as exc:
        raise BrokerUnusable(f"Broker file {path}: give this user permission to enter its directory ({exc})") from exc
    except OSError as exc:
        raise BrokerUnavailable(f"Broker file {path}: its directory is missing; make it or mount it ({exc})") from exc
    if kind in NETWORK_FILE_SYSTEMS:
        raise BrokerUnusable(
            f"Broker file {path} is on a network file system ({kind}), where SQLite's locks do not hold; "
            "name a path on a local disk"
        )


def _before_fork() -> None:
    """Close every handle: SQLite counts a process's locks per file, and a child that inherits the count takes none.

    The parent, when it closes as the last that is known, would then delete the log with all that the child committed.
    """
    _lock.acquire()
    for database in list(_databases):
        database._close_handle()


def _after_fork_in_child() -> None:
    for database in list(_databases):
        if database._handle is not None:  # the parent has forked within a transaction
            _inherited.append(database._handle)
            database._handle = None
    _lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)
