"""The outbox: a job is written in the producer's own transaction, and published by a worker once that is committed.

In: a SQLAlchemy Session or Connection, or a DB-API connection (sqlite3, psycopg, psycopg2; Django's
`connection.connection`), of the job database. Out: one row. Rolled back means never run; committed means run, once to
effect. The caller's transaction is neither begun nor ended here; on a connection that commits each statement by itself
(autocommit) the job has a transaction of its own, and exists at once.
"""

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from celery.result import AsyncResult
from kombu.utils.json import dumps
from sqlalchemy import Connection, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import psycopg, psycopg2
from sqlalchemy.exc import OperationalError

from db import statements
from db.prepared import DriverStatement
from db.records import Event, NewJob, now
from db.statements import LOG, log_row, new_row
from tasks.enqueue import new_job
from tasks.errors import DatabaseNotReady, InvalidArguments
from tasks.values import is_name

if TYPE_CHECKING:
    from db.store import Store

_HAS_TABLES: Final = "SELECT to_regclass('duties') IS NOT NULL AND to_regclass('task_queue') IS NOT NULL"
_IDENTITY: Final = "SELECT holder FROM duties WHERE name = 'identity'"
_MISSING: Final = ("no such table", "has no column named")
# Parameters by name, as both PEP 249 drivers and our statements have them.
_DIALECTS: Final[Mapping[str, Any]] = {
    "sqlite3": lambda: sqlite.dialect(paramstyle="named"),
    "psycopg": psycopg.dialect,
    "psycopg2": psycopg2.dialect,
}
# psycopg.pq.TransactionStatus.IDLE and psycopg2.extensions.TRANSACTION_STATUS_IDLE, both libpq's PQTRANS_IDLE.
IDLE: Final = 0


def _psycopg_cursor(connection: Any) -> Any:
    from psycopg import Cursor
    from psycopg.rows import tuple_row

    return Cursor(connection, row_factory=tuple_row)


def _psycopg2_cursor(connection: Any) -> Any:
    from psycopg2.extensions import cursor

    return connection.cursor(cursor_factory=cursor)


# Their rows are tuples, whatever the caller's own cursors make of a row.
_CURSORS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "sqlite3": sqlite3.Cursor,
    "psycopg": _psycopg_cursor,
    "psycopg2": _psycopg2_cursor,
}


def enqueue(
    connection: Any, task: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> AsyncResult:
    """Write a job in a transaction: `enqueue(session, image_resize, "in.jpg", "out.webp", width=800)`.

    Args:
        connection: In which the caller's own rows are written, too.
        task: A task, or its name.
        options: As of `apply_async`: priority, countdown, eta, expires, task_id, queue, ignore_result, time limits.

    Returns:
        The result of a job that exists once the transaction is committed.

    Raises:
        InvalidArguments: The arguments can't work, or `connection` is of another database: submit with `.delay()` after
            the commit then (Django: `transaction.on_commit`).
        UnknownTask, UnknownQueue: Nobody can run it.
        DatabaseNotReady: The database has no job tables yet, or older ones; the caller's transaction goes on.
    """
    from tasks.celery import app

    app.load_capabilities()
    name = getattr(task, "name", task)
    if not is_name(name) or not isinstance(options or {}, Mapping):
        raise InvalidArguments(f"enqueue(connection, {task!r}, …): give a task or its name; options are a dict")
    declared, options = app.tasks.get(name), dict(options or {})
    options["task_id"] = options.get("task_id") or app.new_id()
    if "unique_key" in options or "unique_for" in options:
        raise InvalidArguments(f"{name}: unique jobs are submitted by themselves, not in a transaction of yours")
    if declared is not None:
        options.setdefault("ignore_result", declared.ignore_result)
    job = new_job(app, declared, name, list(args), dict(kwargs), options)
    _cursor(connection).write(app.store, job)
    return app.AsyncResult(job.job_id)


class _Cursor(ABC):
    """Executes our statements on a connection of somebody else."""

    is_sqlite: bool

    @abstractmethod
    def execute(self, statement: Any, values: Mapping[str, Any]) -> bool:
        """Whether it returned a row."""

    @abstractmethod
    def first(self, sql: str) -> tuple[Any, ...]:
        """The first row; empty if there is none."""

    @abstractmethod
    def command(self, sql: str) -> None:
        """Begin or end a transaction behind the caller's connection."""

    @property
    @abstractmethod
    def driver_connection(self) -> Any:
        """The DB-API connection."""

    def write(self, store: "Store", job: NewJob) -> None:
        """Insert the row, which rests until it is due, and its log row."""
        self._require(store)
        at = now()
        row = new_row(job, at, is_resting=True)
        for name in ("b_parameters", "b_message"):  # whatever JSON the connection is set up for takes plain values
            row[name] = json.loads(dumps(row[name]))
        insert = statements.enqueue("sqlite" if self.is_sqlite else "postgresql").statement
        with self._with_tables(store), self._transaction():
            if self.execute(insert, row):  # else its id is there already: the row stays as it is
                self.execute(LOG.statement, log_row(job.job_id, 1, Event.CREATED, None, at, None, None))

    @contextmanager
    def _with_tables(self, store: "Store") -> Iterator[None]:
        """Say what makes the tables of a SQLite file, which may not be looked for first (`_require`). Another
        connection can't make them here: the caller's may hold the write lock.
        """
        try:
            yield
        except (sqlite3.OperationalError, OperationalError) as exc:
            said = str(getattr(exc, "orig", exc))  # the driver's own words, without statement and parameters
            if not any(missing in said for missing in _MISSING):
                raise
            raise DatabaseNotReady(
                f"{store.database} has no job tables, or older ones ({said}); run: celery -A tasks db upgrade"
            ) from exc

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """The caller's; where none is begun and each statement would be committed by itself, one of the block's own."""
        if not _is_autocommitting(self.driver_connection):
            yield
            return
        self.command("BEGIN")
        try:
            yield
        except BaseException:
            self.command("ROLLBACK")
            raise
        self.command("COMMIT")

    def _require(self, store: "Store") -> None:
        """Refuse a connection to another database: nobody would look for the job there."""
        database = store.database
        if self.is_sqlite:  # asked of the caller's connection alone: it may hold the write lock already
            # The statement, not the table of that name: to read one takes a snapshot, from which no write can follow
            # once somebody else has written. The first row is the main file's.
            _, _, path = self.first("PRAGMA database_list")
            is_same = bool(path) and database.path is not None and Path(path).resolve() == database.path.resolve()
        else:
            identity = None if database.is_sqlite else store.identity()  # made by the first call, so before the look
            is_same = identity is not None and self.first(_HAS_TABLES)[0] and self.first(_IDENTITY) == (identity,)
        if not is_same:
            raise InvalidArguments(
                f"the connection is not of the job database {database}; submit with .delay() after your commit "
                "(Django: transaction.on_commit), or put the job tables into your database by DATABASE_URL"
            )


class _SqlAlchemy(_Cursor):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_sqlite = connection.dialect.name == "sqlite"

    def execute(self, statement: Any, values: Mapping[str, Any]) -> bool:
        result = self._connection.execute(statement, dict(values))
        return result.returns_rows and result.first() is not None

    def first(self, sql: str) -> tuple[Any, ...]:
        return tuple(self._connection.execute(text(sql)).first() or ())

    def command(self, sql: str) -> None:
        self._connection.exec_driver_sql(sql)

    @property
    def driver_connection(self) -> Any:
        return self._connection.connection.driver_connection


class _DbApi(_Cursor):
    def __init__(self, connection: Any, driver: str) -> None:
        self._connection = connection
        self._driver = driver
        self.is_sqlite = driver == "sqlite3"

    def execute(self, statement: Any, values: Mapping[str, Any]) -> bool:
        ready = _prepared(statement, self._driver)
        with self._cursor() as cursor:
            cursor.execute(ready.sql, ready.parameters(values))
            return cursor.description is not None and cursor.fetchone() is not None

    def first(self, sql: str) -> tuple[Any, ...]:
        with self._cursor() as cursor:
            cursor.execute(sql)
            return tuple(cursor.fetchone() or ())

    def command(self, sql: str) -> None:
        with self._cursor() as cursor:
            cursor.execute(sql)

    @property
    def driver_connection(self) -> Any:
        return self._connection

    def _cursor(self) -> Any:
        return closing(_CURSORS[self._driver](self._connection))


@cache
def _prepared(statement: Any, driver: str) -> DriverStatement:
    """One of our few statements, as a driver takes it."""
    return DriverStatement(statement, _DIALECTS[driver]())


def _is_autocommitting(connection: Any) -> bool:
    """Whether a DB-API connection is in no transaction and begins none by itself."""
    if isinstance(connection, sqlite3.Connection):
        begins = connection.isolation_level is not None and getattr(connection, "autocommit", -1) is not True
        return not connection.in_transaction and not begins
    return bool(connection.autocommit and connection.info.transaction_status == IDLE)


def _cursor(connection: Any) -> _Cursor:
    if callable(getattr(connection, "connection", None)) and hasattr(connection, "get_bind"):  # a Session
        connection = connection.connection()
    if isinstance(connection, Connection):
        return _SqlAlchemy(connection)
    for cls in type(connection).__mro__:
        driver = cls.__module__.split(".", 1)[0]
        if driver in _DIALECTS and hasattr(connection, "cursor") and "Async" not in type(connection).__name__:
            return _DbApi(connection, driver)
    raise InvalidArguments(
        f"{type(connection).__module__}.{type(connection).__name__} is no connection that a job can be written with; "
        "give a SQLAlchemy Session or Connection, or a connection of sqlite3, psycopg or psycopg2"
    )
