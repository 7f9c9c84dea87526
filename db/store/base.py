"""What every part of the store stands on: connections, log rows, and how a repeated call recognises its own commit."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from importlib import import_module
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, DateTime, Select, func, literal, select, type_coerce

from db import schema, statements
from db.engine import Database
from db.models import UTCDateTime, worker_leases
from db.records import Event, Failure, Holder, NewJob, Publication, Row, now

UNCONFIRMED_KEPT: Final = 1000


class Write(NamedTuple):
    """One try of a write: its time is how a repeated call recognises a commit whose answer was lost."""

    connection: Connection
    at: datetime
    earlier: Collection[datetime]


class Part:
    """A part of the store, on one database."""

    def __init__(self, database: Database) -> None:
        self.database: Final = database
        backend = "sqlite" if database.is_sqlite else "postgresql"
        self._insert: Final = import_module(f"sqlalchemy.dialects.{backend}").insert
        self._enqueue: Final = statements.enqueue(backend)
        self._unconfirmed: Final[dict[tuple[str | int | None, ...], set[datetime]]] = {}

    def _rows(self, statement: Select[Any], bound: Mapping[str, Any] | None = None) -> list[Row]:
        with self._reading() as connection:
            return list(connection.execute(statement, bound or {}).mappings())

    def _clock(self, ago_s: float = 0.0) -> Any:
        """What time it is, in SQL, or was: by the server's clock, where those of several hosts would be compared."""
        ago = timedelta(seconds=ago_s)
        if self.database.is_sqlite:
            return literal(now() - ago, UTCDateTime())
        return func.clock_timestamp(type_=DateTime(timezone=True)) - ago

    def _holders(self, connection: Connection, *where: Any) -> list[Holder]:
        statement = select(worker_leases, type_coerce(self._clock(), UTCDateTime()).label("seen_at")).where(*where)
        return [Holder(**row) for row in connection.execute(statement).mappings()]

    def _reading(self) -> AbstractContextManager[Connection]:
        schema.ensure_schema(self.database)
        return self.database.reading()

    def _changing(self) -> AbstractContextManager[Connection]:
        """For one change, which is one statement in PostgreSQL and needs no transaction there."""
        schema.ensure_schema(self.database)
        return self.database.transaction() if self.database.is_sqlite else self.database.reading()

    @contextmanager
    def _writing(self, *key: str | int | None) -> Iterator[Write]:
        """As `_changing`, for a write that a repeated call (same `key`) has to recognise as its own.

        When a connection is lost at the end of a write, or a time limit strikes there, it may be committed or not. Its
        time is kept until the call is repeated, as `db.engine.patiently` does; the times of a caller who gives up are
        dropped in the end.
        """
        at = now()
        try:
            with self._changing() as connection:
                yield Write(connection, at, self._unconfirmed.get(key, ()))
        except Exception:
            self._unconfirmed.setdefault(key, set()).add(at)
            if len(self._unconfirmed) > UNCONFIRMED_KEPT:
                self._unconfirmed.pop(next(iter(self._unconfirmed)), None)
            raise
        self._unconfirmed.pop(key, None)

    def _insert_job(
        self,
        connection: Connection,
        job: NewJob,
        worker_id: str | None,
        at: datetime,
        publication: int = 1,
        *,
        is_resting: bool = False,
        was_sent: bool = True,
    ) -> bool:
        """Write a new row and its log row; False if its id is there already."""
        row = statements.new_row(job, at, publication=publication, is_resting=is_resting, was_sent=was_sent)
        return self._enqueue.execute(connection, row | {"b_worker": worker_id}) is not None


def standing_of(connection: Connection, job_id: str) -> Row | None:
    """The columns of STANDING: where a job stands, and since when; None if it has no row."""
    return connection.execute(statements.STANDING, {"b_job_id": job_id}).mappings().one_or_none()


def publication_at(
    connection: Connection, job_id: str, at: Collection[datetime], is_resting: bool, *, has_begun: bool = False
) -> Publication | None:
    """The publication that was written at one of these times."""
    standing = standing_of(connection, job_id) if at else None
    if standing is None or standing["updated_at"] not in at:
        return None
    return Publication(standing["publication"], standing["priority"], is_resting, has_begun)


def log(
    connection: Connection,
    job_id: str | None,
    sequence: int,
    event: Event,
    worker_id: str | None,
    at: datetime,
    message: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a log row, in the transaction of the change that it tells of. A worker's own has no job, and sequence 0."""
    statements.LOG.first(connection, statements.log_row(job_id, sequence, event, worker_id, at, text(message), details))


def log_failure(
    connection: Connection,
    job_id: str,
    sequence: int,
    event: Event,
    worker_id: str | None,
    at: datetime,
    failure: Failure | None,
    details: Mapping[str, Any],
) -> None:
    """As `log`, with why: "type: message", as `tasks.sinks.events` takes it apart, and the failure's own details."""
    message = None if failure is None else f"{failure.error_type}: {failure.error_message}"
    everything = {**details, **((failure and failure.details) or {})}
    log(connection, job_id, sequence, event, worker_id, at, message, everything or None)


def failure_columns(failure: Failure | None) -> dict[str, str | None]:
    """The columns of a row that say why it failed; emptied without a failure."""
    if failure is None:
        return {"error_type": None, "error_module": None, "error_message": None}
    return {
        "error_type": text(failure.error_type, 255),
        "error_module": text(failure.error_module, 255),
        "error_message": text(failure.error_message),
    }


def text(value: str | None, length: int | None = None) -> str | None:
    """Text that every database takes: names of files may hold bytes that are no UTF-8, and messages NULs."""
    if value is None:
        return None
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:length]
