"""A subscriber that wants every event: it has a session, which the broker keeps while either of them is away.

In: events and workers' capabilities, each of which must fit its schema. Out: the changes of each job as the README's
subscriber sees them, each once. As they come at least once and in order, they must be the job's log, without a gap; but
for its absences: Mosquitto 2.0.11 drops what it has confirmed for a session that it restored from disk and whose client
is not back yet.
"""

import json
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.mqtt.messages import validate
from tests.services import HOST
from tests.tooling.waiting import eventually

FOR_EVER = 0xFFFFFFFF
# It sits out a broker that is frozen for a minute.
KEEPALIVE_S = 600


class Subscriber:
    """Connected when it is made, and again by itself whenever the broker is back.

    Args:
        topic: That of events; all that is beside it is heard, too.
    """

    def __init__(self, port: int, topic: str) -> None:
        self.changes: dict[str, list[tuple[int, str]]] = defaultdict(list)
        """{job: (sequence, event_type) of each change}"""
        self.messages = 0
        """How many events, repetitions and progress among them."""
        self._heard: list[tuple[str, bytes]] = []
        self.absences: list[tuple[datetime, datetime]] = []
        """From when to when the connection was away."""
        self._left_at: datetime | None = None
        self._topic = topic
        self._is_subscribed = False
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="chaos", protocol=mqtt.MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        lasting = Properties(PacketTypes.CONNECT)
        lasting.SessionExpiryInterval = FOR_EVER
        self._client.connect(HOST, port, keepalive=KEEPALIVE_S, properties=lasting)
        self._client.loop_start()
        eventually(lambda: self._is_subscribed, 15, "subscribed")

    def close(self) -> None:
        """Leave.

        Raises:
            jsonschema.ValidationError: A message was none of its topic.
            AssertionError: A topic was none of asyncapi.yaml, or that of another worker.
        """
        self._client.disconnect()
        self._client.loop_stop()
        for topic, payload in self._heard:
            validate(topic, payload)

    @property
    def heard(self) -> int:
        """How many changes."""
        return sum(map(len, list(self.changes.values())))

    def _on_connect(self, client: mqtt.Client, _data: Any, flags: Any, *_: Any) -> None:
        if self._left_at is not None:
            self.absences.append((self._left_at, datetime.now(UTC)))
            self._left_at = None
        if not flags.session_present:
            client.subscribe(f"{self._topic.rpartition('/')[0]}/#", qos=1)

    def _on_disconnect(self, *_: Any) -> None:
        self._left_at = self._left_at or datetime.now(UTC)

    def _on_subscribe(self, *_: Any) -> None:
        self._is_subscribed = True

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        self._heard.append((message.topic, message.payload))
        if message.topic != self._topic:
            return
        self.messages += 1
        event = json.loads(message.payload)
        mine = self.changes[event["job_id"]]
        if not mine or event["sequence"] > mine[-1][0]:
            mine.append((event["sequence"], event["event_type"]))
