"""Statements as a driver takes them. In: what SQLAlchemy has put together, once. Out: SQL text and ready parameters.

What runs for every job reaches SQLite through here: among image jobs, which leave no cache warm, SQLAlchemy's own way
from a statement to the driver takes longer than SQLite does (1.6 ms of processor time for a job's claim, fencing check
and completion, and 1.0 ms through here; `benchmarks resize` shows what comes of it).
"""

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Dialect
from sqlalchemy.exc import DBAPIError

_REQUIRED: Final = object()


class DriverStatement:
    """A statement in the words of one dialect, whose parameters have names."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql: Final = str(compiled)
        self._parameters: Final[tuple[tuple[str, Any, Callable[[Any], Any] | None], ...]] = tuple(
            (
                name,
                _REQUIRED if bind.required else bind.effective_value,
                bind.type.dialect_impl(dialect).bind_processor(dialect),
            )
            for bind, name in compiled.bind_names.items()
        )

    def parameters(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """What the driver is given with the text: the values of `bound` that it names, and its own."""
        return {
            name: _ready(bound[name] if own is _REQUIRED else own, process) for name, own, process in self._parameters
        }


class Prepared:
    """A statement that runs for every job, without an IN of a list; what it returns are texts and numbers."""

    def __init__(self, statement: Any) -> None:
        self.statement: Final = statement
        self._known: tuple[Dialect | None, DriverStatement | None] = (None, None)

    def first(self, connection: Connection, bound: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The first row that it returns; None without one.

        Raises:
            sqlalchemy.exc.DBAPIError: What the driver says, as SQLAlchemy's `execute` has it.
            KeyError, TypeError: On SQLite, of a value that is missing, or is none for its column.
        """
        dialect = connection.dialect
        if dialect.name != "sqlite":
            result = connection.execute(self.statement, bound)
            return result.first() if result.returns_rows else None
        known_dialect, prepared = self._known
        if prepared is None or known_dialect is not dialect:
            prepared = DriverStatement(self.statement, dialect)
            self._known = dialect, prepared
        handle: Any = connection.connection.dbapi_connection
        try:
            rows: list[tuple[Any, ...]] = handle.execute(prepared.sql, prepared.parameters(bound)).fetchall()
        except sqlite3.Error as exc:
            error: Any = DBAPIError.instance(
                prepared.sql, None, exc, sqlite3.Error, hide_parameters=True, dialect=dialect
            )
            raise error from exc
        return rows[0] if rows else None


def _ready(value: Any, process: Callable[[Any], Any] | None) -> Any:
    return value if process is None else process(value)
