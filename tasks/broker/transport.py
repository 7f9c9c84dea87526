"""One connection to a broker file, and the rounds in which its channels get their messages.

A `Transport` has a store and, once it consumes, a lease (its name owns what it reserves) and an inbox (it turns
readable when there may be work). Work goes in rounds: the acknowledgements since the last one and the next reservations
are one transaction, and the messages are handed over after its commit. In an event loop a round begins when the inbox
turns readable, never in `on_tick`: the process pool would not see a task delivered there before the next event.
"""

import math
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from kombu.log import get_logger
from kombu.transport import virtual

from tasks.broker.channel import Channel, payload_of
from tasks.broker.errors import BrokerError, BrokerReplaced, BrokerUnavailable, BrokerUnusable
from tasks.broker.lease import Lease, is_held
from tasks.broker.messages import Delivery, MessageStore
from tasks.broker.wakeup import Inbox, wake

logger = get_logger(__name__)


class Transport(virtual.Transport):
    """One connection to a broker file. See the package for URL and options."""

    Channel = Channel
    driver_type = "sqlite"
    driver_name = "sqlite3"
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )
    connection_errors: tuple[type[BaseException], ...] = (*virtual.Transport.connection_errors, BrokerUnavailable)

    # Without these two, kombu gives a publish up at the second error, however often it may try.
    recoverable_connection_errors = connection_errors
    recoverable_channel_errors: tuple[type[BaseException], ...] = ()

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        options = client.transport_options
        self.path = Path(client.virtual_host).absolute()
        self.poll_interval_s = float(options.get("poll_interval", 1.0))
        self.store = MessageStore(
            self.path,
            queue_strategy=options.get("queue_strategy", {}),
            busy_timeout_s=float(options.get("busy_timeout", 5.0)),
        )
        self._lease: Lease | None = None
        self._directory = Path(f"{self.path}.own")
        self._acked: deque[int] = deque()
        self._poll_due = 0.0
        self._loop: Any = None
        self._timer: Any = None

    def driver_version(self) -> str:
        return sqlite3.sqlite_version

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {}

    def establish_connection(self) -> Any:
        if self.path == Path("/"):
            raise BrokerUnusable(
                "The broker URL (CELERY_BROKER_URL) names no file; write sqlite:////absolute/path/broker.db"
            )
        self.store.open()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        try:
            super().close_connection(connection)
        finally:
            self._leave()
            self.store.close()

    # The consumer's presence: a lease and an inbox, from the first thing that it owns until it leaves

    @property
    def owner(self) -> str:
        """The name under which this connection reserves; no name, so nothing, in a child forked since."""
        return self._lease.name if self._lease is not None and self._lease.is_held else ""

    def attend(self) -> str:
        """Be seen to be alive, take over from the dead, and return the owner's name."""
        if not self.owner:
            try:
                self._lease = Lease(self._directory)
                self.inbox = Inbox(self._inbox_path(self.owner))
            except OSError as exc:
                raise BrokerUnavailable(f"Broker directory {self._directory} can't be written: {exc}") from exc
            self._poll()
        return self.owner

    def _leave(self) -> None:
        if self._lease is not None and self._lease.is_held:
            if self._loop is not None:
                self._timer.cancel()
                self._loop.remove_reader(self.inbox)
                self._loop = None
            self.inbox.close()
            try:
                with self.store.transaction():
                    self.store.ack(self._acked, self.owner)
                    returned = self.store.release(self.owner)
                self.wake_consumers(returned)
            except BrokerError as exc:
                logger.warning("Left to the others to clean up: %s", exc)
            finally:
                self._lease.release()

    def _inbox_path(self, owner: str) -> Path:
        return self._directory / f"{owner}.wake"

    def is_foreign(self, owner: str | None) -> bool:
        """Tell whether this is the name of another connection that lives."""
        return owner is not None and owner != self.owner and is_held(self._directory / owner)

    # Settling and waking

    def ack(self, delivery_tag: int) -> None:
        """Delete a message: at once, or in an event loop with all others of this turn."""
        if self._loop is None:
            self.store.ack([delivery_tag], self.owner)
        else:
            self._acked.append(delivery_tag)
            self.inbox.wake()

    def requeue(self, tags: dict[int, str]) -> None:
        self.store.requeue(tags, self.owner)
        self.wake_consumers(set(tags.values()))

    def wake_consumers(self, queues: set[str]) -> None:
        self.wake(self.store.consumers_of(queues))

    def wake(self, owners: Iterable[str]) -> None:
        wake(self._inbox_path(owner) for owner in owners)

    # Delivering

    def drain_events(self, connection: Any, **kwargs: Any) -> None:  # noqa: ARG002  # kombu's signature
        """Deliver at least one message.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        self.attend()
        timeout_s = kwargs.get("timeout")
        deadline = math.inf if timeout_s is None else monotonic() + timeout_s
        while True:
            if monotonic() >= self._poll_due:
                self._poll()
            if self._deliver_round():
                return
            wait_s = min(self._poll_due, deadline) - monotonic()
            if wait_s > 0:
                self.inbox.wait(wait_s)
            elif monotonic() >= deadline:
                raise TimeoutError

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:  # noqa: ARG002  # kombu's signature
        self.attend()
        self._loop = loop
        loop.add_reader(self.inbox, self._on_inbox)
        self._timer = loop.call_repeatedly(self.poll_interval_s, self._on_poll)
        self.inbox.wake()

    def _on_inbox(self) -> None:
        self.inbox.drain()
        with self._patience():
            self._deliver_round()

    def _on_poll(self) -> None:
        with self._patience():
            self._poll()
        self.inbox.wake()

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Keep the connection, and with it running tasks, where the next poll may be luckier."""
        try:
            yield
        except BrokerReplaced:
            raise
        except BrokerUnavailable as exc:
            logger.warning("Trying again in %s s: %s", self.poll_interval_s, exc)

    def _deliver_round(self) -> int:
        """Settle, reserve, commit, deliver; return the number of messages."""
        acked = [self._acked.popleft() for _ in range(len(self._acked))]
        wanted = {channel: channel.wanted_queues() for channel in self.channels}
        deliveries: list[tuple[Any, Delivery]] = []
        try:
            ready = self.store.ready({queue for queues in wanted.values() for queue in queues})
            if acked or ready:
                with self.store.transaction():
                    self.store.ack(acked, self.owner)
                    for channel, queues in wanted.items():
                        found = channel.next_deliveries([queue for queue in queues if queue in ready])
                        deliveries += [(channel, delivery) for delivery in found]
        except BaseException:
            self._acked.extend(acked)
            raise
        deliveries.sort(key=lambda item: not item[0].is_control(item[1]))
        self._deliver_all(delivery for _, delivery in deliveries)
        return len(deliveries)

    def _deliver_all(self, deliveries: Iterator[Delivery]) -> None:
        try:
            for delivery in deliveries:
                self._deliver(payload_of(delivery), delivery.queue)
        except BaseException:
            self.requeue({delivery.id: delivery.queue for delivery in deliveries})
            raise

    # Looking after the others

    def _poll(self) -> None:
        """Notice a replaced file, expire, and take over from consumers that died."""
        self._poll_due = monotonic() + self.poll_interval_s
        self.store.check()
        if not ((self._directory / self.owner).exists() and self._inbox_path(self.owner).exists()):
            raise BrokerReplaced(f"Broker directory {self._directory} was emptied or removed; reconnecting")
        self.store.expire()
        present = {path.stem for path in self._directory.iterdir() if path.suffix != ".new"}
        for owner in (self.store.owners() | present) - {self.owner}:
            if not is_held(self._directory / owner):
                self.wake_consumers(self.store.release(owner))
                self._inbox_path(owner).unlink(missing_ok=True)
                (self._directory / owner).unlink(missing_ok=True)
