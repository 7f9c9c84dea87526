"""What a broker has: how many messages stand in a queue, and, where it can tell, of which jobs.

In: a Celery app's broker connection. Out: counts and ids. Only the embedded broker can name its messages; RabbitMQ and
Redis count those that no consumer has reserved.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from kombu.exceptions import ChannelError

from tasks.broker.errors import BrokerReplaced
from tasks.broker.messages import Addressed, MessageStore

IN_ONE_LOOK: Final = 1000


class EmbeddedLedger:
    """The embedded broker's file, asked directly. A file that is missing holds nothing, and is not made."""

    names_messages: Final[Literal[True]] = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store = MessageStore(path)

    def held(self, ids: Sequence[str]) -> set[str]:
        """Those task ids of which the broker has a message, reserved or not."""
        return self._store.held(ids) if self._is_open() else set()

    def pages(self) -> Iterator[Sequence[Addressed]]:
        """All messages that carry a task id, reserved or not, some at a time."""
        last = 0
        while self._is_open() and (page := self._store.addressed(last, IN_ONE_LOOK)):
            yield page
            last = page[-1].id

    def _is_open(self) -> bool:
        if not self._path.exists():
            self._store.close()
            return False
        self._store.open()
        try:
            self._store.check()
        except BrokerReplaced:
            self._store.close()
            self._store.open()
        return True


class CountingLedger:
    """Any other broker: a passive declaration tells the number of ready messages."""

    names_messages: Final[Literal[False]] = False

    def __init__(self, connect: Any) -> None:
        self._connect = connect

    def ready(self, queues: Iterable[str]) -> dict[str, int]:
        """Of each queue the messages that no consumer has reserved; 0 if there is no such queue.

        Raises:
            kombu.exceptions.OperationalError: The broker can't be reached.
        """
        counts = {}
        with self._connect() as connection:
            channel = connection.default_channel
            for queue in queues:
                try:
                    counts[queue] = int(channel.queue_declare(queue=queue, passive=True).message_count)
                except ChannelError:  # there is no such queue: Redis keeps none that is empty
                    counts[queue] = 0  # amqp opens the channel anew that RabbitMQ has closed for it
        return counts


Ledger = EmbeddedLedger | CountingLedger


def ledger_of(app: Any) -> Ledger:
    """The ledger of the app's broker."""
    connection = app.connection_for_read()
    if connection.transport.driver_type == "sqlite":
        return EmbeddedLedger(Path(connection.virtual_host).absolute())
    return CountingLedger(app.connection_for_read)
