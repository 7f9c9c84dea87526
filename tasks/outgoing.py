"""Messages of rows: a job that rests in its row is sent to the broker, as it was submitted.

In: a row that is due, marked as published. Out: one message that carries the row's publication. If the broker doesn't
take it, the row goes back to rest and is tried again; a job whose message no broker would take fails.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from amqp.exceptions import NotFound
from kombu.exceptions import OperationalError

from db.records import Row
from tasks.brokers import RABBITMQ
from tasks.errors import InvalidArguments
from tasks.remedy import is_transient
from tasks.rows import message_of_row, request_of_row

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

# Looked for at least so often: a job that is due earlier may be written meanwhile.
LOOK_EVERY_S: Final = 1.0
SHORTEST_WAIT_S: Final = 0.02
AT_ONCE: Final = 500
# What the broker did not take is offered again after so long.
REFUSED_FOR_S: Final = 2.0


class Dispatcher:
    """Publishes the jobs that rest in their rows, when they are due. Several may do so at once, each its own jobs."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._outlet: Final = Outlet(app)

    def round(self, goes_on: Callable[[], None] = lambda: None, *, limit: int = AT_ONCE) -> float:
        """Publish what is due, so many jobs at most; seconds until the next look. `goes_on` is called before each.
        Raises what the store raises.
        """
        self._outlet.is_away = False
        due_s = self._app.store.next_due_s()
        if due_s is not None and due_s <= 0:
            if self.publish_due(limit, goes_on) >= limit and not self.is_broker_away:
                return 0.0
            due_s = self._app.store.next_due_s()
        return min(max(LOOK_EVERY_S if due_s is None else due_s, SHORTEST_WAIT_S), LOOK_EVERY_S)

    def publish_due(self, limit: int, goes_on: Callable[[], None] = lambda: None) -> int:
        """Publish the jobs that are due; how many there were. If this process dies in the middle, the messages of the
        rest count as lost.
        """
        rows = self._app.store.take_due(limit)
        self._outlet.is_away = False
        for row in rows:
            goes_on()
            # A broker that is away is asked once: each time takes seconds, and another worker may reach it.
            if self.is_broker_away or not self._is_settled(row):
                self._app.store.rest(row["job_id"], row["publication"], delay_s=REFUSED_FOR_S)
        return len(rows)

    def _is_settled(self, row: Row) -> bool:
        """Send the message of a row, or fail its job for good; False if it has to rest."""
        try:
            return self._outlet.send(row)
        except Exception as exc:
            logger.exception("%s[%s] can't be published", row["task_type"], row["job_id"])
            request = request_of_row(row, publication=row["publication"])
            self._app.backend.mark_as_failure(row["job_id"], exc, request=request)
            return True

    @property
    def is_broker_away(self) -> bool:
        """Whether the broker did not answer in the last round."""
        return self._outlet.is_away

    def close(self) -> None:
        """Close the connection; the next message opens another."""
        self._outlet.close()


class Outlet:
    """A connection of its own to the broker: the app's belong to the thread that forks pool children."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._connection: Any = None
        self.is_away = False
        """Whether the broker could not be reached when it was asked last."""

    def send(self, row: Row) -> bool:
        """Send the message of a row, once more whenever it is called: of several the guard takes one.

        False if the broker did not take it, which may pass: it is away, or refuses. Whatever else goes wrong is tried
        once more on a new connection: one that breaks may raise anything, and RabbitMQ tells of what it refused when
        the next message comes.

        Raises:
            Exception: What no broker would take, as the library has it: a header that can't be encoded, say.
            InvalidArguments: It is for an exchange that RabbitMQ does not have.
        """
        is_new = self._connection is None
        try:
            self._publish(row)
        except Exception as exc:
            # Celery raises some of a transport's errors as another.
            cause = exc.__cause__ if type(exc) is OperationalError and exc.__cause__ is not None else exc
            self.is_away = self._is_of_connection(cause)
            may_pass = self.is_away or self._is_refusal(cause) or is_transient(cause)
            self.close()
            if not (self.is_away or is_new):
                return self.send(row)
            if not may_pass:
                raise
            logger.warning("%s[%s] could not be published: %s", row["task_type"], row["job_id"], exc)
            return False
        self.is_away = False
        return True

    def _is_of_connection(self, exc: BaseException) -> bool:
        kinds = getattr(self._connection, "connection_errors", ())
        return isinstance(exc, (OperationalError, OSError, *kinds)) and not isinstance(exc, KeyError)  # as Redis has it

    def _is_refusal(self, exc: BaseException) -> bool:
        """Whether a server says no: a queue has other properties, say, or its memory is full."""
        return isinstance(exc, getattr(self._connection, "channel_errors", ()))

    def _publish(self, row: Row) -> None:
        expires_at, message, producer = row["expires_at"], message_of_row(row), self._producer()
        options = {**message["options"], "task_id": row["job_id"], "queue": row["queue"], "retries": row["retry_count"]}
        if self._app.settings.broker_kind is RABBITMQ and (exchange := options.get("exchange")):
            self._look_for(exchange, producer)
        self._app.publish(
            row["task_type"],
            message["args"],
            message["kwargs"],
            publication=row["publication"],
            priority=row["priority"],
            has_begun=row["deliveries"] > 0,
            expires=expires_at.isoformat() if expires_at is not None else None,
            options=options | {"producer": producer, "retry": False},
        )

    def _look_for(self, exchange: str, producer: Any) -> None:
        """RabbitMQ drops what is sent to an exchange that it does not have, and says so too late."""
        try:
            producer.channel.exchange_declare(exchange, "direct", passive=True)
        except NotFound as exc:
            raise InvalidArguments(f"the broker has no exchange {exchange!r}; declare it, or leave it out") from exc

    def _producer(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
            self._connection.ensure_connection(max_retries=1)
        return self._app.amqp.Producer(self._connection, auto_declare=False)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()
