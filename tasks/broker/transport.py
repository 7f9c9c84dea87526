"""kombu's contract on the message store: what a Celery worker or producer calls.

A `Transport` is one connection: a store, and, once it consumes, a lease (its name owns what it reserves) and an inbox
(it turns readable when there may be work). A `Channel` declares, publishes and consumes; its `QoS` knows what it holds.

Work goes in rounds: the acknowledgements since the last one and the next reservations are one transaction, and the
messages are handed over after its commit. In an event loop a round begins when the inbox turns readable, never in
`on_tick`: the process pool would not see a task delivered there before the next event.
"""

import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

from tasks.broker.errors import BrokerReplaced, BrokerUnavailable, BrokerUnusable
from tasks.broker.lease import Lease, is_held
from tasks.broker.messages import Delivery, MessageStore
from tasks.broker.wakeup import Inbox, wake

logger = get_logger(__name__)

_UNLIMITED = 100  # messages reserved at a time where no prefetch limit is set


class QoS:
    """The messages that a channel has handed over and that are neither acknowledged nor rejected."""

    def __init__(self, channel: "Channel", prefetch_count: int = 0) -> None:
        self.channel = channel
        self.prefetch_count = prefetch_count
        self._delivered: dict[int, Any] = {}

    def can_consume(self) -> bool:
        return self.can_consume_max_estimate() > 0

    def can_consume_max_estimate(self) -> int:
        """How many more messages this channel may hold."""
        return self.prefetch_count - len(self._delivered) if self.prefetch_count else _UNLIMITED

    def append(self, message: Any, delivery_tag: int) -> None:
        self._delivered[delivery_tag] = message

    def get(self, delivery_tag: int) -> Any:
        return self._delivered[delivery_tag]

    def ack(self, delivery_tag: int) -> None:
        """Acknowledge, from any thread. After the channel was closed the message is no longer its own: no effect."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.connection.ack(delivery_tag)

    def reject(self, delivery_tag: int, requeue: bool = False) -> None:
        """Drop a message, or put it back to where it stood; it will say that it was redelivered."""
        if not requeue:
            self.ack(delivery_tag)
        elif (message := self._delivered.pop(delivery_tag, None)) is not None:
            self.channel.connection.requeue({delivery_tag: message.delivery_info["queue"]})

    def restore_unacked(self) -> None:
        held, self._delivered = self._delivered, {}
        if held:
            self.channel.connection.requeue({tag: message.delivery_info["queue"] for tag, message in held.items()})

    restore_unacked_once = restore_unacked


class Channel(virtual.Channel):  # type: ignore[misc]  # kombu is untyped
    """Declares, publishes and consumes, all in the database: no state but the consumers and what they hold."""

    QoS = QoS
    supports_fanout = True
    body_encoding = None  # SQLite keeps text and bytes as they are
    max_priority = 255

    def __init__(self, connection: "Transport", **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._no_ack: dict[str, bool] = {}

    @property
    def _store(self) -> MessageStore:
        store: MessageStore = self.connection.store
        return store

    # Publishing

    def _next_delivery_tag(self) -> None:
        """Tags are given at delivery: they are the ids of the rows."""

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        self._publish([queue], message)

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **_: Any) -> None:
        self._publish({queue for _, _, queue in self.get_table(exchange)}, message)

    def _publish(self, queues: Iterable[str], message: dict[str, Any]) -> None:
        envelope = dict(message)
        body = envelope.pop("body")
        properties = envelope["properties"]
        expiration_ms = properties.get("expiration")
        listeners = self._store.put(
            list(queues),
            dumps(envelope),
            body,
            priority=self._get_message_priority(message),
            ttl_s=None if expiration_ms is None else int(expiration_ms) / 1000,
            correlation_id=properties.get("correlation_id"),
        )
        self.connection.wake(listeners)

    # Consuming

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        self._no_ack[queue] = bool(no_ack)
        self._store.add_consumer(queue, self.connection.attend(), consumer_tag)
        self.connection.inbox.wake()

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is not None:
            self._store.remove_consumer(queue, self.connection.owner, consumer_tag)

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        if self._consumers:
            self.connection.inbox.wake()

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Any:
        if no_ack:
            deliveries = self._store.take(queue, 1)
        else:
            deliveries = self._store.reserve(queue, self.connection.attend(), 1)
        for delivery in deliveries:
            message = self.Message(_payload(delivery), channel=self)
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
            return message

    def wanted_queues(self) -> list[str]:
        """The queues of which this channel can take a message now; none twice in a row is first."""
        self._active_queues.append(self._active_queues.pop(0)) if self._active_queues else None
        has_credit = self.qos.can_consume()
        return [queue for queue in self._active_queues if has_credit or self._no_ack[queue]]

    def next_deliveries(self, queues: Iterable[str]) -> list[Delivery]:
        """Reserve up to the free credit. Of a queue without acknowledgements one: nothing can be given back."""
        deliveries: list[Delivery] = []
        credit = self.qos.can_consume_max_estimate()
        for queue in queues:
            if self._no_ack[queue]:
                deliveries += self._store.take(queue, 1)
            elif credit > 0:
                reserved = self._store.reserve(queue, self.connection.owner, credit)
                credit -= len(reserved)
                deliveries += reserved
        return deliveries

    # Queues, exchanges and bindings

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> Any:
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            if self._store.size(queue) is None:
                raise ChannelError(f"NOT_FOUND - no queue {queue!r}", (50, 10), "Channel.queue_declare", "404")
        else:
            self._new_queue(queue, **kwargs)
        return queue_declare_ok_t(queue, self._size(queue), len(self._store.consumers_of([queue])))

    def prepare_queue_arguments(self, arguments: dict[str, Any] | None, **kwargs: Any) -> Any:
        return to_rabbitmq_queue_arguments(arguments or {}, **kwargs)

    def _new_queue(
        self,
        queue: str,
        *,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.connection.is_foreign(self._store.exclusive_owner(queue)):
            message = f"RESOURCE_LOCKED - queue {queue!r} is exclusive to another connection"
            raise ChannelError(message, (50, 10), "Channel.queue_declare", 405)
        arguments = arguments or {}
        self._store.declare(
            queue,
            owner=self.connection.attend() if exclusive else None,
            auto_delete=auto_delete,
            message_ttl_s=_seconds(arguments.get("x-message-ttl")),
            expires_s=_seconds(arguments.get("x-expires")),
        )

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> None:
        if not (if_empty and self._size(queue)) and not (if_unused and self._store.consumers_of([queue])):
            self._store.delete(queue)

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        exchange = exchange or "amq.direct"
        routing_key, pattern, queue = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        self._store.bind(queue, exchange, routing_key, pattern)

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        self._store.unbind(queue, exchange or "amq.direct", routing_key)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        for routing_key, _, queue in self.get_table(exchange):
            self._store.unbind(queue, exchange, routing_key)
        self.state.exchanges.pop(exchange, None)

    def get_table(self, exchange: str) -> list[tuple[str, str | None, str]]:
        return self._store.bindings(exchange)

    def _size(self, queue: str) -> int:
        return self._store.size(queue) or 0

    def _purge(self, queue: str) -> int:
        return self._store.purge(queue)


class Transport(virtual.Transport):  # type: ignore[misc]  # kombu is untyped
    """One connection to a broker file. See the package for URL and options."""

    Channel = Channel
    driver_type = "sqlite"
    driver_name = "sqlite3"
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )
    connection_errors = (*virtual.Transport.connection_errors, BrokerUnavailable)

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
        self._acked: list[int] = []
        self._poll_due = 0.0
        self._loop: Any = None

    def driver_version(self) -> str:
        return sqlite3.sqlite_version

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {}

    def establish_connection(self) -> Any:
        if self.path == Path("/"):
            raise BrokerUnusable("The broker URL names no file; write sqlite:////absolute/path/broker.db")
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
                self._lease = Lease(self._own())
            except OSError as exc:
                raise BrokerUnavailable(f"Broker directory {self._own()} can't be written: {exc}") from exc
            self.inbox = Inbox(self._own(self.owner, ".wake"))
            self._poll()
        return self.owner

    def _leave(self) -> None:
        if self._lease is not None and self._lease.is_held:
            if self._loop is not None:
                self._loop.remove_reader(self.inbox)
            self.inbox.close()
            try:
                self.wake_consumers(self.store.release(self._lease.name))
            except BrokerUnavailable as exc:
                logger.warning("Left to the others to clean up: %s", exc)
            finally:
                self._lease.release()

    def _own(self, owner: str = "", suffix: str = "") -> Path:
        return self.path.with_name(f"{self.path.name}.own") / f"{owner}{suffix}"

    def is_foreign(self, owner: str | None) -> bool:
        """Tell whether this is the name of another connection that lives."""
        return owner is not None and owner != self.owner and is_held(self._own(owner))

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
        wake([self._own(owner, ".wake") for owner in owners])

    # Delivering

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver at least one message.

        Raises:
            socket.timeout: none came within `timeout` seconds.
        """
        self.attend()
        deadline = None if timeout is None else monotonic() + timeout
        while not self._deliver_round():
            wait_s = self._poll_due - monotonic()
            if deadline is not None:
                wait_s = min(wait_s, deadline - monotonic())
            if wait_s > 0:
                self.inbox.wait(wait_s)
            if monotonic() >= self._poll_due:
                self._poll()
            elif deadline is not None and monotonic() >= deadline:
                raise TimeoutError

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.attend()
        self._loop = loop
        loop.add_reader(self.inbox, self._on_inbox)
        loop.call_repeatedly(self.poll_interval_s, self._on_poll)
        self.inbox.wake()

    def _on_inbox(self) -> None:
        self.inbox.drain()
        try:
            if self._deliver_round():
                self.inbox.wake()
        except BrokerReplaced:
            raise
        except BrokerUnavailable as exc:
            logger.warning("Trying again in %s s: %s", self.poll_interval_s, exc)

    def _on_poll(self) -> None:
        try:
            self._poll()
        except BrokerReplaced:
            raise
        except BrokerUnavailable as exc:
            logger.warning("Trying again in %s s: %s", self.poll_interval_s, exc)
        self.inbox.wake()

    def _deliver_round(self) -> int:
        """Settle, reserve, commit, deliver; return the number of messages. Control queues come before task queues."""
        acked, self._acked = self._acked, []
        wanted = {channel: channel.wanted_queues() for channel in self.channels}
        deliveries: list[tuple[Channel, Delivery]] = []
        try:
            ready = self.store.ready({queue for queues in wanted.values() for queue in queues})
            if acked or ready:
                with self.store.transaction():
                    self.store.ack(acked, self.owner)
                    for channel, queues in wanted.items():
                        found = channel.next_deliveries([queue for queue in queues if queue in ready])
                        deliveries += [(channel, delivery) for delivery in found]
        except BaseException:
            self._acked += acked
            raise
        deliveries.sort(key=lambda item: not item[0]._no_ack[item[1].queue])
        self._deliver_all(deliveries)
        return len(deliveries)

    def _deliver_all(self, deliveries: list[tuple[Channel, Delivery]]) -> None:
        rest = iter(deliveries)
        try:
            for _, delivery in rest:
                self._deliver(_payload(delivery), delivery.queue)
        except BaseException:
            self.requeue({delivery.id: delivery.queue for _, delivery in rest})
            raise

    # Looking after the others

    def _poll(self) -> None:
        """Notice a replaced file, expire, and take over from consumers that died."""
        self._poll_due = monotonic() + self.poll_interval_s
        self.store.check()
        self.store.expire()
        for owner in self.store.owners() - {self.owner}:
            if not is_held(self._own(owner)):
                self.wake_consumers(self.store.release(owner))
                for suffix in ("", ".wake"):
                    self._own(owner, suffix).unlink(missing_ok=True)


def _payload(delivery: Delivery) -> dict[str, Any]:
    """The message as kombu's virtual `Message` wants it."""
    payload: dict[str, Any] = loads(delivery.envelope)
    payload["body"] = delivery.body
    properties = payload["properties"]
    properties["delivery_tag"] = delivery.id
    properties["delivery_info"].update(
        queue=delivery.queue, redelivered=delivery.count > 1, delivery_count=delivery.count
    )
    return payload


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
