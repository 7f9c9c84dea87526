"""This process's connections to a PostgreSQL server; out come transactions, and single statements in one round trip.

The driver is in autocommit mode, so that a statement which is atomic by itself needs no BEGIN and no COMMIT.
"""

import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError, SQLAlchemyError

# A server that vanished without a word is noticed after these; `?name=value` in the URL overrides them.
_CONNECT_OPTIONS: Final = {
    "application_name": "media-tasks",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

_inherited: list[Engine] = []  # closing an inherited connection would end the parent's session


class PostgresPool:
    """The pool behind `url`; each process opens its own at the first use.

    Args:
        pool_size: Connections that a process keeps open.
        options: More arguments of SQLAlchemy's `create_engine`.
    """

    path: Final = None
    is_replaced: Final = False

    def __init__(self, url: URL, *, pool_size: int, options: dict[str, Any]) -> None:
        self._url: Final = url
        self._options: Final = {
            "connect_args": {name: value for name, value in _CONNECT_OPTIONS.items() if name not in url.query},
            "pool_size": pool_size,
            "isolation_level": "AUTOCOMMIT",
            "hide_parameters": True,  # what jobs hold is never logged
            **options,
        }
        self._opening = threading.Lock()
        self._engine: Engine | None = None

    @contextmanager
    def connection(self, outer: Connection | None = None) -> Iterator[Connection]:
        """A connection of the pool (or `outer`); each statement is a transaction of its own."""
        if outer is not None:
            yield outer
            return
        with self._opened().connect() as connection:
            yield connection

    @contextmanager
    def transaction(self, outer: Connection | None = None) -> Iterator[Connection]:
        """A transaction, on `outer` if there is one."""
        with self.connection(outer) as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                with suppress(SQLAlchemyError):
                    connection.rollback()
                raise

    def close(self) -> None:
        """Close the pool; the next use opens a new one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def before_fork(self) -> None:
        """Nothing: unlike SQLite, a session is no state of the process that a child could share by accident."""

    def after_fork_in_child(self) -> None:
        """Let go of the parent's sessions without ending them."""
        self._opening = threading.Lock()
        if self._engine is not None:
            _inherited.append(self._engine)
            self._engine = None

    def _opened(self) -> Engine:
        with self._opening:
            if self._engine is None:
                self._engine = create_engine(self._url, **self._options)
                event.listen(self._engine, "checkout", _refuse_dropped)
            return self._engine


def _refuse_dropped(handle: Any, _record: object, _proxy: object) -> None:
    """Let the pool reconnect if the server has ended the session: an idle one has nothing to say but goodbye.

    Costs 2 us, where SQLAlchemy's `pool_pre_ping` costs a round trip.
    """
    if not handle.closed:
        waiting = select.poll()
        waiting.register(handle.fileno(), select.POLLIN)
        if not waiting.poll(0):
            return
    raise InvalidatePoolError(f"process {os.getpid()}: the server ended the session")
