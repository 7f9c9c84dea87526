"""A connection of a command to the MQTT broker, driven by whoever waits on it: it has no thread.

In: the settings. Out: messages in the order of their arrival; what goes wrong is one line that names the variable.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

import click

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

    from tasks.settings import Settings

ANSWER_WITHIN_S: Final = 5.0
QUIET_S: Final = 0.2
# https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html, 3.1.3.1
LONGEST_ID_OF_ANY_BROKER: Final = 23


class Unreachable(click.ClickException):
    """The broker does not answer, or the connection to it was lost: it may come back."""


class Refused(click.ClickException):
    """The broker answers, and does not let this client do it."""


@dataclass(frozen=True, slots=True)
class Message:
    """What came in. `is_retained`: it was there before the subscription."""

    topic: str
    payload: bytes
    is_retained: bool


def _lost(address: str) -> str:
    return f"the connection to the MQTT broker {address} is lost; is what MQTT_BROKER and MQTT_PORT name still running?"


class Connection:
    """A client of MQTT 5, connected from `with` on. Nothing happens but inside its methods.

    Args:
        client_id: Empty: one that nobody else has, and any broker takes; not all choose one for a client without.
        will_topic: Where the broker publishes `will` if this client vanishes.
    """

    def __init__(
        self, settings: "Settings", *, client_id: str = "", will_topic: str | None = None, will: str = ""
    ) -> None:
        from tasks.sinks import trouble
        from tasks.sinks.client import new_client

        self.address: Final = trouble.address(settings)
        self.answer_within_s = ANSWER_WITHIN_S
        self._settings = settings
        self._client = new_client(settings, client_id or uuid4().hex[:LONGEST_ID_OF_ANY_BROKER])
        self._client.connect_timeout = ANSWER_WITHIN_S
        if will_topic is not None:
            self._client.will_set(will_topic, will, qos=1)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda _client, _data, number, codes, _: self._on_answer(number, codes)
        self._client.on_unsubscribe = lambda _client, _data, number, codes, _: self._on_answer(number, codes)
        self._client.on_publish = lambda _client, _data, number, code, _: self._on_answer(number, [code])
        self._greeting: ReasonCode | None = None
        self._longest_packet_bytes: float = math.inf
        self._messages: deque[Message] = deque()
        self._answers: dict[int, list[ReasonCode]] = {}

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.disconnect()

    def open(self) -> None:
        """Connect, for the first time or again. What was not confirmed is not sent again: it may be what has cost the
        connection.

        Raises:
            Unreachable, Refused: With the variable to look at.
        """
        from tasks.sinks import trouble
        from tasks.sinks.client import KEEPALIVE_S

        self._greeting = None
        self._client.drop_out_messages()
        try:
            self._client.connect(self._settings.mqtt_broker, self._settings.mqtt_port, KEEPALIVE_S)
        except (OSError, OverflowError, ValueError) as exc:
            raise Unreachable(trouble.unreachable(self._settings, exc)) from exc
        try:
            self._wait(lambda: self._greeting is not None)
        except Unreachable as exc:
            raise Unreachable(trouble.no_answer(self._settings)) from exc
        if self._greeting is not None and self._greeting.is_failure:
            raise Refused(trouble.refused(self._settings, self._greeting))

    def subscribe(self, pattern: str, *, qos: int = 1) -> None:
        self._answered(self._client.subscribe(pattern, qos=qos)[1], f"subscribe to {pattern}")

    def publish(self, topic: str, payload: str | bytes, *, is_retained: bool = False) -> None:
        """Publish, and wait until the broker has it."""
        sent = self._client.publish(topic, payload, qos=1, retain=is_retained)
        self._answered(sent.mid, f"publish to {topic}")

    def longest_bytes(self, topic: str) -> float:
        """How long a payload may be there, by what the broker said when it took the connection; inf: nothing."""
        from tasks.sinks.limit import PACKET_BYTES

        return max(self._longest_packet_bytes - PACKET_BYTES - len(topic.encode()), 0)

    def next(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None if the time is up before."""
        self._drive(lambda: bool(self._messages), timeout_s)
        return self._messages.popleft() if self._messages else None

    def retained(self, pattern: str) -> list[Message]:
        """The retained messages below a pattern.

        As QoS 0, which is sent without waiting for acknowledgements. A broker may send them after its answer, so they
        are all there when nothing more comes.
        """
        self.subscribe(pattern, qos=0)
        found = []
        while (message := self.next(QUIET_S)) is not None:
            found.append(message)
        self._answered(self._client.unsubscribe(pattern)[1], f"unsubscribe from {pattern}")
        found += self._messages
        self._messages.clear()
        return [message for message in found if message.is_retained]

    def vanish(self) -> None:
        """Cut the connection without a word, as the death of the process does."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    def _answered(self, number: int | None, what: str) -> None:
        if number is None:
            raise Unreachable(_lost(self.address))
        self._wait(lambda: number in self._answers)
        refusals = [code for code in self._answers.pop(number) if code.is_failure]
        if refusals:
            raise Refused(
                f"the MQTT broker {self.address} does not let this user {what} ({refusals[0]}); "
                "look at its ACL, MQTT_USERNAME and WORKER_ID"
            )

    def _wait(self, is_done: Callable[[], bool]) -> None:
        if not self._drive(is_done, self.answer_within_s):
            raise Unreachable(f"the MQTT broker {self.address} has not answered for {self.answer_within_s:.3g} s")

    def _drive(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Send and receive until it is done; False if the time is up before."""
        deadline = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        while not is_done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if self._client.loop(min(left_s, 1.0)) and not is_done():
                raise Unreachable(_lost(self.address))
        return True

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, code: "ReasonCode", properties: Any) -> None:
        self._greeting = code
        self._longest_packet_bytes = getattr(properties, "MaximumPacketSize", math.inf)

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        self._messages.append(Message(message.topic, bytes(message.payload), bool(message.retain)))

    def _on_answer(self, number: int, codes: list["ReasonCode"]) -> None:
        self._answers[number] = codes
