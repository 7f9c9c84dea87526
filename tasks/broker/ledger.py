"""What a broker has: how many messages stand in a queue, and, where it can tell, of which jobs.

In: a Celery app's broker connection. Out: counts and ids. Only the embedded broker can name its messages; RabbitMQ and
Redis count those that no consumer has reserved.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from kombu.exceptions import ChannelError

from tasks.broker.errors import BrokerReplaced
from tasks.broker.messages import Addressed, MessageStore

IN_ONE_LOOK: Final = 1000


class Ledger(Protocol):
    """What can be asked of a broker."""

    @property
    def names_messages(self) -> bool:
        """Whether it can tell of which jobs its messages are."""

    def ready(self, queue: str) -> int:
        """Messages of a queue that no consumer has reserved."""

    def held(self, ids: Sequence[str]) -> set[str] | None:
        """Those task ids of which the broker has a message, reserved or not; None if it can't tell."""

    def pages(self) -> Iterator[Sequence[Addressed]]:
        """All messages that carry a task id, reserved or not, some at a time; none if it can't tell."""


class EmbeddedLedger:
    """The embedded broker's file, asked directly. A file that is missing holds nothing, and is not made."""

    names_messages: Final = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store = MessageStore(path)

    def ready(self, queue: str) -> int:
        return (self._store.size(queue) or 0) if self._is_open() else 0

    def held(self, ids: Sequence[str]) -> set[str] | None:
        return self._store.held(ids) if self._is_open() else set()

    def pages(self) -> Iterator[Sequence[Addressed]]:
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

    names_messages: Final = False

    def __init__(self, connect: Any) -> None:
        self._connect = connect

    def ready(self, queue: str) -> int:
        with self._connect() as connection:
            channel = connection.default_channel
            try:
                return int(channel.queue_declare(queue=queue, passive=True).message_count)
            except (*connection.channel_errors, ChannelError):
                return 0  # no such queue: no message

    def held(self, ids: Sequence[str]) -> set[str] | None:  # noqa: ARG002 (it can't tell)
        return None

    def pages(self) -> Iterator[Sequence[Addressed]]:
        yield from ()


def ledger_of(app: Any) -> Ledger:
    """The ledger of the app's broker."""
    connection = app.connection_for_read()
    if connection.transport.driver_type == "sqlite":
        return EmbeddedLedger(Path(connection.virtual_host).absolute())
    return CountingLedger(app.connection_for_read)
