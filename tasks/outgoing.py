"""Messages of rows: a job that rests in its row is sent to the broker, as it was submitted.

In: a row that is due, marked as published. Out: one message that carries the row's publication. If the broker doesn't
take it, the row goes back to rest and is tried again.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kombu.exceptions import OperationalError

from tasks.rows import message_of_row

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)


class Outlet:
    """A connection of its own to the broker: the app's belong to the thread that forks pool children."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._connection: Any = None
        self.is_away = False
        """Whether the broker could not be reached when it was asked last."""

    def send(self, row: Mapping[str, Any]) -> bool:
        """Send the message of a row; False if the broker did not take it, and the row has to rest."""
        app, expires_at = self._app, row["expires_at"]
        message = message_of_row(row)
        options = {**message["options"], "task_id": row["job_id"], "queue": row["queue"], "retries": row["retry_count"]}
        try:
            app.publish(
                row["task_type"],
                message["args"],
                message["kwargs"],
                publication=row["publication"],
                priority=row["priority"],
                has_begun=row["deliveries"] > 0,
                expires=expires_at.isoformat() if expires_at is not None else None,
                options=options | {"producer": self._producer(), "retry": False},
            )
        except Exception as exc:
            logger.warning("%s[%s] could not be published: %s", row["task_type"], row["job_id"], exc)
            connection_errors = getattr(self._connection, "connection_errors", ())
            self.is_away = isinstance(exc, (OperationalError, OSError, *connection_errors))
            self._drop()
            return False
        self.is_away = False
        return True

    def _producer(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
            self._connection.ensure_connection(max_retries=1)
        return self._app.amqp.Producer(self._connection, auto_declare=False)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.release()
