"""One SQLite file, and this process's one connection to it. Out come transactions that are safe across fork.

- A transaction begins IMMEDIATE: a read that turns into a write fails at once with SQLITE_BUSY_SNAPSHOT, and
  pysqlite's own BEGIN loses updates.
- One lock stands around every use of SQLite and around every fork. A child that is forked while a thread is inside
  SQLite inherits its locked mutexes and hangs (measured: one fork in ten).
- The connection is closed before a fork and opened again after it. SQLite keeps what it has locked in a table of the
  process: a child that inherits a file's entry takes no locks of its own, and a parent that closes the file, seeing no
  other user, deletes the log under the child together with what the child has committed.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, NullPool, create_engine, event

from tasks.broker.files import NETWORK_FILE_SYSTEMS, file_system_of, identity, set_patiently
from tasks.errors import DatabaseNotReady

BUSY_TIMEOUT_MS: Final = 5000
# A wait for another process's write is cut into slices, between which a thread that forks or reads gets the lock.
_SLICE_MS: Final = 20
_YIELD_S: Final = 0.001
_UNKNOWN: Final = -1
# A claim writes 10 pages, and who fills the log writes it back in 4 ms: not one call in a hundred (SQLite's 1000) but
# one in four hundred.
_CHECKPOINT_PAGES: Final = 4000

lock: Final = threading.RLock()
_inherited: list[Connection] = []  # a child must not close its parent's handles: sqlite.org/howtocorrupt.html


class SqliteFile:
    """The file behind `url`; it is made, with its directory, at the first use.

    Args:
        mmap_bytes: SQLite's `mmap_size`.
        options: More arguments of SQLAlchemy's `create_engine`.
    """

    def __init__(self, url: URL, *, mmap_bytes: int, options: dict[str, Any]) -> None:
        if not url.database or url.database == ":memory:":
            raise DatabaseNotReady("DATABASE_URL names no file: several processes can't share SQLite in memory")
        self.path: Final = Path(url.database)
        self._mmap_bytes: Final = mmap_bytes
        self._engine: Final = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            paramstyle="named",
            hide_parameters=True,  # what jobs hold is never logged
            **options,
        )
        event.listen(self._engine, "connect", self._on_connect)
        self._connection: Connection | None = None
        self._waits_ms = BUSY_TIMEOUT_MS
        self._is_wal = True  # some file systems can't
        self._identity = (0, 0)

    @contextmanager
    def connection(self, _outer: Connection | None = None) -> Iterator[Connection]:
        """This process's connection, for this thread alone; each statement is a transaction of its own."""
        with lock:
            connection = self._opened()
            self._wait_at_most(BUSY_TIMEOUT_MS)
            yield connection

    @contextmanager
    def transaction(self, outer: Connection | None = None) -> Iterator[Connection]:
        """A transaction that holds the file's write lock; waits for it up to BUSY_TIMEOUT_MS."""
        deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
        while True:
            with lock:
                connection = self._opened()
                handle: Any = connection.connection.dbapi_connection
                try:
                    self._wait_at_most(_SLICE_MS)
                    if _begin(handle, is_last_try=time.monotonic() > deadline):
                        if not self._is_wal:  # there a commit waits for those who read
                            self._wait_at_most(BUSY_TIMEOUT_MS)
                        yield connection
                        handle.commit()
                        return
                except BaseException:  # Celery's time limits raise anywhere
                    handle.rollback()
                    raise
                finally:
                    if outer is not None:
                        self._wait_at_most(BUSY_TIMEOUT_MS)
            time.sleep(_YIELD_S)

    @property
    def is_replaced(self) -> bool:
        """Whether the path leads to another file than the one that is open, or to none."""
        return self._connection is not None and identity(self.path) != self._identity

    def close(self) -> None:
        """Close the connection, unless this thread is in a transaction; the next use opens it again."""
        with lock:
            connection = self._connection
            if connection is not None and not getattr(connection.connection.dbapi_connection, "in_transaction", False):
                self._connection = None
                connection.close()

    def before_fork(self) -> None:
        """Called with the lock held."""
        self.close()

    def after_fork_in_child(self) -> None:
        """Let go of a connection in whose transaction the parent forked."""
        if self._connection is not None:
            _inherited.append(self._connection)
            self._connection = None

    def _opened(self) -> Connection:
        if self._connection is None:
            _prepare_directory(self.path)
            self._waits_ms = BUSY_TIMEOUT_MS
            self._connection = self._engine.connect()
            self._identity = identity(self.path)
        return self._connection

    def _wait_at_most(self, limit_ms: int) -> None:
        """For another process's lock, from now on."""
        if self._connection is not None and self._waits_ms != limit_ms:
            handle: Any = self._connection.connection.dbapi_connection
            self._waits_ms = _UNKNOWN  # a time limit may strike between the two
            handle.execute(f"PRAGMA busy_timeout={limit_ms}").close()
            self._waits_ms = limit_ms

    def _on_connect(self, handle: sqlite3.Connection, _record: object) -> None:
        deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            *(["auto_vacuum=INCREMENTAL"] if _is_empty(handle) else []),  # before WAL writes the first page
            "journal_mode=WAL",
            "synchronous=NORMAL",  # a commit survives the death of any process; a power cut may undo the last ones
            "foreign_keys=ON",
            "cache_size=-10000",
            f"mmap_size={self._mmap_bytes}",
            "temp_store=MEMORY",
            f"wal_autocheckpoint={_CHECKPOINT_PAGES}",
        ):
            set_patiently(handle, pragma, deadline)
        self._is_wal = handle.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def _is_empty(handle: sqlite3.Connection) -> bool:
    """Setting auto_vacuum again would take the write lock, so that opening waits for every writer."""
    return bool(handle.execute("PRAGMA page_count").fetchone() == (0,))


def _begin(handle: sqlite3.Connection, *, is_last_try: bool) -> bool:
    """Take the write lock; False if another process holds it for longer than the connection waits."""
    try:
        handle.execute("BEGIN IMMEDIATE").close()
    except sqlite3.OperationalError as exc:
        if is_last_try or exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False
    return True


def _prepare_directory(path: Path) -> None:
    """Make the database's directory.

    Raises:
        DatabaseNotReady: It can't be made or written, or it is on a network file system.
    """
    remedy = "set CL_SERVER_DIR to a directory that this user may write"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise DatabaseNotReady(f"{path}: a file stands where its directory should be; {remedy}") from exc
    except OSError as exc:
        raise DatabaseNotReady(f"{path}: its directory can't be made ({exc.strerror}); {remedy}") from exc
    if path.is_dir():
        raise DatabaseNotReady(f"{path} is a directory; name a file in DATABASE_URL")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise DatabaseNotReady(f"{path} can't be written; {remedy}")
    if (kind := file_system_of(path.parent)) in NETWORK_FILE_SYSTEMS:
        raise DatabaseNotReady(
            f"{path} is on a network file system ({kind}), where SQLite serves no two hosts; "
            "set CL_SERVER_DIR to a local disk, or DATABASE_URL=postgresql://..."
        )
