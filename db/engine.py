"""Connections to the job database: in goes a URL, out come transactions that are safe across fork and between writers.

SQLite transactions begin IMMEDIATE, because a read that turns into a write fails at once with SQLITE_BUSY_SNAPSHOT and
pysqlite's own BEGIN loses updates. One lock serialises a process's database calls and is held while it forks: a child
forked while a thread was inside SQLite inherits SQLite's locked mutexes and hangs (measured: one fork in ten).
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from tasks.errors import DatabaseNotReady

T = TypeVar("T")

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "glusterfs", "ceph"}
)
BUSY_TIMEOUT_MS: Final = 5000

_fork_lock = threading.RLock()
_inherited: list[Engine] = []


def _renew_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.RLock()


os.register_at_fork(
    before=lambda: _fork_lock.acquire(), after_in_parent=lambda: _fork_lock.release(), after_in_child=_renew_fork_lock
)


class Database:
    """One database, whichever process asks: each process opens its own connections on first use.

    Args:
        url: SQLAlchemy URL, `sqlite:///...` or `postgresql://...`.
        mmap_bytes: SQLite's `mmap_size`.
        pool_size: Connections that a process keeps open.
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
        self._options: Final[dict[str, Any]] = {"json_serializer": dumps, "json_deserializer": loads}
        self._pool_size: Final = pool_size
        self._mmap_bytes: Final = mmap_bytes
        self._engine: Engine | None = None
        self._pid = 0

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None for PostgreSQL."""
        return Path(self.url.database) if self.is_sqlite and self.url.database else None

    @property
    def engine(self) -> Engine:
        """This process's engine. A child keeps the parent's referenced: closing it would drop the parent's locks."""
        if self._engine is None or self._pid != os.getpid():
            if self._engine is not None:
                _inherited.append(self._engine)
            self._engine, self._pid = self._open(), os.getpid()
        return self._engine

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A read-write transaction: committed at the end, rolled back on an error."""
        with _fork_lock, self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A short read that takes no write lock."""
        with _fork_lock, self.engine.connect() as connection:
            yield connection.execution_options(is_reading=True)

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None

    def _open(self) -> Engine:
        if not self.is_sqlite:
            return create_engine(self.url, pool_size=self._pool_size, pool_pre_ping=True, **self._options)
        path = self.path
        if path is None:
            raise DatabaseNotReady("DATABASE_URL names no file: several processes can't share SQLite in memory")
        _prepare_directory(path)
        engine = create_engine(
            self.url,
            pool_size=self._pool_size,
            connect_args={"autocommit": sqlite3.LEGACY_TRANSACTION_CONTROL}
            if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL")
            else {},
            **self._options,
        )
        event.listen(engine, "connect", self._on_connect)
        event.listen(engine, "begin", _on_begin)
        return engine

    def _on_connect(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "auto_vacuum=INCREMENTAL",
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            "cache_size=-10000",
            f"mmap_size={self._mmap_bytes}",
            "temp_store=MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}").close()


def _on_begin(connection: Connection) -> None:
    is_reading = connection.get_execution_options().get("is_reading")
    connection.exec_driver_sql("BEGIN DEFERRED" if is_reading else "BEGIN IMMEDIATE")


def _prepare_directory(path: Path) -> None:
    """Make the database's directory.

    Raises:
        DatabaseNotReady: It can't be made or written, or it is on a network file system, where SQLite's locks and its
            shared memory don't hold between hosts (https://www.sqlite.org/wal.html).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DatabaseNotReady(
            f"{path.parent} can't be made ({exc.strerror}); set CL_SERVER_DIR to a writable one"
        ) from exc
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise DatabaseNotReady(f"{path} can't be written; set CL_SERVER_DIR to a directory that this user may write")
    if (kind := _file_system_of(path.parent)) in NETWORK_FILE_SYSTEMS:
        raise DatabaseNotReady(f"{path} is on {kind}: SQLite serves one host; set DATABASE_URL=postgresql://...")


def _file_system_of(directory: Path) -> str:
    """The file system's type from /proc/self/mounts, by the longest mount point above `directory`; '' elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = [(len(point), kind) for _device, point, kind, *_ in mounts if directory.resolve().is_relative_to(point)]
    return max(above)[1] if above else ""


def is_transient(exc: BaseException) -> bool:
    """Whether waiting may help: the database is locked, unreachable, restarting, or dropped the connection."""
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return True
    if isinstance(exc, OperationalError):
        text = str(exc.orig)
        return not any(
            final in text for final in ("no such table", "no such column", "readonly", "malformed", "not a database")
        )
    return isinstance(exc, InterfaceError)


def patiently(
    call: Callable[[], T], *, on_wait: Callable[[BaseException, float], None], longest_wait_s: float = 5.0
) -> T:
    """Call until the database answers. Each call must be safe to repeat, as a lost connection may hide a commit.

    Args:
        on_wait: Told the error and the seconds until the next try.
        longest_wait_s: Waits double from 50 ms up to this.
    """
    wait_s = 0.05
    while True:
        try:
            return call()
        except DBAPIError as exc:
            if not is_transient(exc):
                raise
            on_wait(exc, wait_s)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, longest_wait_s)
