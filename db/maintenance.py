"""Looking after the database file: sizes, pragmas, checkpoint, vacuum, backup. A `Database` in, plain values out."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import func, select, text

from db import schema
from db.engine import Database
from db.errors import as_database_error
from db.models import metadata
from tasks.errors import DatabaseNotReady

PRAGMAS: Final = (
    "journal_mode",
    "foreign_keys",
    "busy_timeout",
    "synchronous",
    "cache_size",
    "mmap_size",
    "auto_vacuum",
    "temp_store",
)


def sizes(database: Database) -> dict[str, int]:
    """Rows of each table, and the bytes of the SQLite file and its log."""
    schema.ensure_schema(database)
    with database.reading() as connection:
        rows = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        }
    if database.path is not None:
        for name, path in {"file_bytes": database.path, "log_bytes": _log_of(database.path)}.items():
            rows[name] = path.stat().st_size if path.exists() else 0
    return rows


def pragmas(database: Database) -> dict[str, str]:
    """Pragmas as SQLite reports them on a connection of this process."""
    _require_sqlite(database, "PostgreSQL has no pragmas; see SHOW ALL")
    with database.reading() as connection:
        return {name: str(connection.execute(text(f"PRAGMA {name}")).scalar()) for name in PRAGMAS}


def checkpoint(database: Database) -> tuple[int, int]:
    """Move the log into the file. Returns the pages moved and those left, which a reader still holds."""
    path = _require_sqlite(database, "PostgreSQL checkpoints by itself")
    with _as_database_errors(path), closing(sqlite3.connect(path, timeout=5)) as connection:
        # TRUNCATE reports an empty log, so the pages are counted before.
        _is_busy, in_log, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return max(moved, 0), max(in_log - moved, 0)


def vacuum(database: Database) -> tuple[int, int]:
    """Give free pages back. Returns the file's bytes before and after."""
    path = _require_sqlite(database, "PostgreSQL vacuums by itself; see autovacuum")
    before = path.stat().st_size
    with _as_database_errors(path), closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        connection.executescript("PRAGMA incremental_vacuum")  # execute() would end it after its first page
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return before, path.stat().st_size


def backup(database: Database, target: Path) -> int:
    """Copy the file with SQLite's online backup, while workers go on. Returns the copy's bytes; half a copy is removed.

    Raises:
        DatabaseNotReady: PostgreSQL, or `target` exists already or can't be written.
    """
    path = _require_sqlite(database, "back PostgreSQL up with pg_dump")
    if target.exists():
        raise DatabaseNotReady(f"{target} exists already; name a file that does not")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
    except sqlite3.OperationalError as exc:
        target.unlink(missing_ok=True)
        raise DatabaseNotReady(f"{target} can't be written: {exc}") from exc
    return target.stat().st_size


def _require_sqlite(database: Database, remedy: str) -> Path:
    if database.path is None:
        raise DatabaseNotReady(f"{database} is no SQLite file: {remedy}")
    schema.ensure_schema(database)
    return database.path


@contextmanager
def _as_database_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise as_database_error(exc, str(path)) from exc


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")
