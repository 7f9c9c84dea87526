"""A subscriber as anyone would write it: keeps what it receives, with the time, and answers questions about it."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.mqtt.messages import validate
from tests.tooling.waiting import eventually

# 1.5 times the keepalive of 5 s, and the time until Mosquitto looks: it does so every several seconds, for all clients
# at once (16 clients, stopped within 6 s, were gone in the same moment).
SILENT_FOR_S = 20.0
# A broker lowers the QoS of a message to that of the subscription, and the retain flag of what it passes on live.
AS_PUBLISHED = SubscribeOptions(qos=2, retainAsPublished=True)


@dataclass(frozen=True)
class Heard:
    """A message, with the QoS and the retain flag that its publisher gave it."""

    at: float
    topic: str
    text: str
    qos: int
    is_retained: bool

    @property
    def payload(self) -> Any:
        return json.loads(self.text) if self.text else None

    def check(self) -> None:
        """Hold it against asyncapi.yaml."""
        validate(self.topic, self.text, qos=self.qos, is_retained=self.is_retained)


class Listener:
    """Subscribed to everything below `prefix` when it is made; comes back by itself when the broker does.

    `on_heard` is called with each message in the moment in which it comes, by the client's thread.
    """

    def __init__(self, port: int, prefix: str, *, host: str = "127.0.0.1", setup: Any = None) -> None:
        self.prefix = prefix
        self.heard: list[Heard] = []
        self.on_heard: Callable[[Heard], None] = lambda heard: None
        self._is_subscribed = False
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{prefix}/#", options=AS_PUBLISHED)
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        if setup is not None:
            setup(self._client)
        self._client.connect(host, port, keepalive=600)  # it sits out a broker that is frozen for a minute
        self._client.loop_start()
        self.wait_until_subscribed()

    def _on_subscribe(self, *_: Any) -> None:
        self._is_subscribed = True

    def _on_disconnect(self, *_: Any) -> None:
        self._is_subscribed = False

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        text = message.payload.decode()
        heard = Heard(time.time(), message.topic, text, message.qos, message.retain)
        self.on_heard(heard)
        self.heard.append(heard)

    def wait_until_subscribed(self) -> None:
        eventually(lambda: self._is_subscribed, 15, "subscribed")

    def close(self) -> None:
        """Leave; every message that was heard must be one of asyncapi.yaml, sent as it says."""
        self._client.disconnect()
        self._client.loop_stop()
        for heard in self.heard:
            heard.check()

    def of_worker(self, worker_id: str) -> list[Heard]:
        return [heard for heard in self.heard if heard.topic == f"{self.prefix}/workers/{worker_id}"]

    def capability(self, worker_id: str) -> Any:
        """What was last said of a worker: its payload, or None if it is gone or was never there."""
        heard = self.of_worker(worker_id)
        return heard[-1].payload if heard else None

    def wait_for_capability(self, worker_id: str, timeout_s: float = 10.0, **expected: Any) -> Any:
        def there() -> Any:
            payload = self.capability(worker_id)
            return payload if payload and expected.items() <= payload.items() else None

        return eventually(there, timeout_s, lambda: f"{expected} of {worker_id}; heard {self.of_worker(worker_id)}")

    def wait_until_gone(self, worker_id: str, timeout_s: float) -> Heard:
        """Wait for the empty payload in place of a capability that was there."""

        def gone() -> Heard | None:
            heard = self.of_worker(worker_id)
            return heard[-1] if len(heard) > 1 and not heard[-1].text else None

        return eventually(gone, timeout_s, lambda: f"{worker_id} is gone; heard {self.of_worker(worker_id)}")

    def events(self, job: Any = None) -> list[dict[str, Any]]:
        """All events as they came, or those of one job."""
        events = [heard.payload for heard in list(self.heard) if heard.topic == f"{self.prefix}/events"]
        job_id = getattr(job, "id", job)
        return [event for event in events if job_id is None or event["job_id"] == job_id]

    def changes(self, job: Any) -> list[dict[str, Any]]:
        """A job's changes, each once: what is not above the last sequence number is a repetition or progress."""
        return self.all_changes().get(str(getattr(job, "id", job)), [])

    def all_changes(self) -> dict[str, list[dict[str, Any]]]:
        changes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in self.events():
            mine = changes[event["job_id"]]
            if not mine or event["sequence"] > mine[-1]["sequence"]:
                mine.append(event)
        return changes

    def wait_for_change(self, job: Any, event_type: str, timeout_s: float = 20.0) -> dict[str, Any]:
        def there() -> Any:
            return next((event for event in self.changes(job) if event["event_type"] == event_type), None)

        return eventually(there, timeout_s, lambda: f"{event_type} of {job}; heard {self.events(job)}")
