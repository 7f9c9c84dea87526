"""The channel's half of kombu's contract: declare, publish, consume, acknowledge.

A `Channel` keeps everything in the database, but for its consumers and what they hold. What it needs of its connection
(a `Transport`) is the store, the owner's name, and to have others woken.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

from tasks.broker.errors import BrokerUnavailable
from tasks.broker.messages import Delivery, MessageStore

_UNLIMITED = 100  # messages reserved at a time where no prefetch limit is set


class QueueDeclared(NamedTuple):
    """AMQP's answer to a declaration."""

    queue: str
    message_count: int
    consumer_count: int


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


class Channel(virtual.Channel):
    """Declares, publishes and consumes, all in the database: no state but the consumers and what they hold."""

    QoS = QoS
    supports_fanout = True
    body_encoding: Any = None  # SQLite keeps text and bytes as they are
    max_priority = 255

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._no_ack: dict[str, bool] = {}

    @property
    def _store(self) -> MessageStore:
        if self.connection is None:  # kombu goes on with this channel after it has reconnected to declare something
            raise BrokerUnavailable("this channel is closed, since its connection was lost")
        store: MessageStore = self.connection.store
        return store

    # Publishing

    def _next_delivery_tag(self) -> None:
        """Tags are given at delivery: they are the ids of the rows."""

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        self._publish([queue], message)

    def _put_fanout(self, exchange: str, message: dict[str, Any], *_: Any, **__: Any) -> None:
        self._publish({queue for *_, queue in self.get_table(exchange)}, message)

    def _publish(self, queues: Collection[str], message: dict[str, Any]) -> None:
        envelope = dict(message)
        body = envelope.pop("body")
        properties = envelope["properties"]
        expiration_ms = properties.get("expiration")
        listeners = self._store.put(
            queues,
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
        owner = self.connection.attend()
        deliveries = self._store.take(queue, 1) if no_ack else self._store.reserve(queue, owner, 1)
        if not deliveries:
            return None
        message = self.Message(payload_of(deliveries[0]), channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def wanted_queues(self) -> list[str]:
        """The queues that this channel can take from now, each time another one first."""
        queues = self._active_queues
        queues[:] = queues[1:] + queues[:1]
        has_credit = self.qos.can_consume()
        return [queue for queue in queues if has_credit or self._no_ack[queue]]

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
        if any(self._no_ack[delivery.queue] or not self.qos.prefetch_count for delivery in deliveries):
            self.connection.inbox.wake()  # no acknowledgement has to come before the next ones
        return deliveries

    def is_control(self, delivery: Delivery) -> bool:
        """Control commands and events are not acknowledged. They overtake tasks, so that a revoke precedes its task."""
        return self._no_ack[delivery.queue]

    # Queues, exchanges and bindings

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> Any:
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            if self._store.size(queue) is None:
                raise ChannelError(f"NOT_FOUND - no queue {queue!r}", (50, 10), "Channel.queue_declare", "404")
        else:
            self._new_queue(queue, **kwargs)
        return QueueDeclared(queue, self._size(queue), len(self._store.consumers_of([queue])))

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
        owner = self._store.exclusive_owner(queue)
        if self.connection.is_foreign(owner):
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

    def queue_unbind(self, queue: str, exchange: str | None = None, routing_key: str = "", *_: Any, **__: Any) -> None:
        self._store.unbind(queue, exchange or "amq.direct", routing_key)

    def exchange_delete(self, exchange: str, *_: Any, **__: Any) -> None:
        for routing_key, _pattern, queue in self.get_table(exchange):
            self._store.unbind(queue, exchange, routing_key)
        self.state.exchanges.pop(exchange, None)

    def get_table(self, exchange: str) -> list[tuple[str, str | None, str]]:
        return self._store.bindings(exchange)

    def _size(self, queue: str) -> int:
        return self._store.size(queue) or 0

    def _purge(self, queue: str) -> int:
        return self._store.purge(queue)


def payload_of(delivery: Delivery) -> dict[str, Any]:
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
