"""One worker's connection to an MQTT broker, which is never in the way. In: its capability, events. Out: messages.

No call blocks or raises for what the broker does, and nothing is kept for it while it is away, but for a window of
events that it has not confirmed. Each outage is said once. Only a worker's main process has a connection. paho calls
back with its own locks held, so nothing here calls paho with a lock held.
"""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tasks.errors import SettingsError
from tasks.settings import Settings
from tasks.sinks import topics, trouble
from tasks.sinks.awaited import Awaited, Sent
from tasks.sinks.client import KEEPALIVE_S, new_client
from tasks.sinks.closings import Cause, Closings
from tasks.sinks.events import Place
from tasks.sinks.limit import Limit
from tasks.sinks.refusals import Refusals

logger = logging.getLogger(__name__)

WINDOW: Final = 200
GONE_WITHIN_S: Final = 2.0
WAIT_FOR_RECONNECT_S: Final = (1, 5)
CAPABILITY_EXPIRES_AFTER_HEARTBEATS: Final = 3
# Two clients of one name would throw each other off once a second: who was thrown off waits, the second time longer.
WAIT_WHEN_THROWN_OFF_S: Final = (5, 60)

Shown = tuple[tuple[str, ...], int, bool]


class MqttSink:
    """Publishes one worker's capability, retained, and events.

    Args:
        wakes: Are set when the connection comes back, and when all events that were told are confirmed.
    """

    def __init__(self, settings: Settings, worker_id: str, wakes: Sequence[Event] = ()) -> None:
        self._settings: Final = settings
        self._worker_id: Final = worker_id
        self._wakes: Final = wakes
        self._topic: Final = topics.capability_topic(settings.capability_topic_prefix, worker_id)
        self._client: Client | None = None
        self._is_open = self._is_answered = False
        self._said: Final[set[str]] = set()
        self._connections = 0
        self._closings: Final = Closings()
        self._window = WINDOW
        self._limit: Final = Limit(settings)
        self._refusals: Final = Refusals(settings)
        self._over_limit: Cause | None = None
        self._told: Final = Awaited()
        self._showing: Final = Awaited()
        self._last_told = 0
        self._closed_until = 0.0
        self._shown: tuple[int, Shown] | None = None
        self._show_again_at = 0.0
        self._ended: Final = Event()

    def start(self) -> None:
        """Begin to connect. What makes that impossible is said, and leaves the worker without MQTT."""
        try:
            self._settings.mqtt_broker.encode("idna")  # it would end paho's thread, since it raises no OSError
            client = new_client(self._settings, self._worker_id)
        except SettingsError as exc:
            self._give_up(str(exc))
            return
        except UnicodeError as exc:
            self._give_up(trouble.unreachable(self._settings, exc))
            return
        for what in trouble.ignored(self._settings):
            logger.warning(what)
        client.will_set(self._topic, b"", qos=1, retain=True)
        client.max_inflight_messages_set(0)  # the window bounds them; paho looks through all at each confirmation
        client.max_queued_messages_set(2 * WINDOW)
        client.reconnect_delay_set(*WAIT_FOR_RECONNECT_S)
        client.suppress_exceptions = True
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.connect_async(self._settings.mqtt_broker, self._settings.mqtt_port, keepalive=KEEPALIVE_S)
        self._client = client
        client.loop_start()

    def _give_up(self, what: str) -> None:
        logger.warning("%s; jobs run on, and this worker is without MQTT until it is restarted", what)

    # The sink of a relay

    @property
    def is_open(self) -> bool:
        """Whether the broker is there, and has refused no event lately; that counts when it has answered them all."""
        is_refused = 0 < len(self._told.refused()) == self._told.count()
        return self._is_open and not is_refused and time.monotonic() >= self._closed_until

    @property
    def window(self) -> int:
        return self._window

    @property
    def unconfirmed(self) -> int:
        return self._told.count()

    def tell(self, events: Mapping[Place, str]) -> None:
        if self._client is None:
            return
        if events:
            self._refusals.forget_before(min(events))
        with self._told.adding():
            for place, event in events.items():
                if not self._refusals.is_passed_over(place):
                    self._publish(self._client, place, event)
        if not self._told.count():
            self._wake()  # the last one was confirmed before its number was known here

    @property
    def refused_from(self) -> Place | None:
        return self._told.first() if self._told.refused() else None

    def take_back(self) -> None:
        if refused := self._told.refused():
            self._closed_until = time.monotonic() + self._refusals.come(refused, self._told.last_taken)
            self._told.clear()

    def mention(self, event: str) -> None:
        if self._client is not None and self._is_open and self._limit.fitting(event) == event:
            self._client.publish(self._settings.mqtt_topic, event, qos=0)

    def _publish(self, client: Client, place: Place, event: str) -> None:
        if (fitting := self._limit.fitting(event)) is not None:
            message = client.publish(self._settings.mqtt_topic, fitting, qos=1)
            self._last_told = self._told.add(message, Sent(place, len(fitting)))

    # The worker's capability

    def show(self, capabilities: Sequence[str], idle_count: int, *, is_draining: bool) -> None:
        """Publish what the worker can do, if that is news, a heartbeat is due, or the connection is a new one.

        One such message at a time is under way: the last one to arrive is the one that stays.
        """
        if self._client is None or not self._is_open or self._showing.count():
            return
        news = self._connections, (tuple(capabilities), idle_count, is_draining)
        if news == self._shown and time.monotonic() < self._show_again_at:
            return
        heartbeat_s = self._settings.mqtt_heartbeat_interval_s
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.MessageExpiryInterval = math.ceil(CAPABILITY_EXPIRES_AFTER_HEARTBEATS * heartbeat_s)
        payload = topics.capability(self._worker_id, capabilities, idle_count, is_draining=is_draining)
        with self._showing.adding():
            self._showing.add(self._client.publish(self._topic, payload, qos=1, retain=True, properties=properties))
        self._shown, self._show_again_at = news, time.monotonic() + heartbeat_s

    def stop(self) -> None:
        """Say that the worker is gone, and disconnect."""
        if self._client is None:
            return
        deadline = time.monotonic() + GONE_WITHIN_S
        if self._is_open:
            with self._showing.adding():
                self._showing.add(self._client.publish(self._topic, b"", qos=1, retain=True))
            while self._showing.count() and self._is_open and time.monotonic() < deadline:
                time.sleep(0.01)
        self._client.disconnect()
        if self._is_open:
            self._ended.wait(max(deadline - time.monotonic(), 0.1))

    # What paho's thread says

    def _on_connect(self, client: Client, _data: Any, _flags: Any, code: Any, properties: Any) -> None:
        self._is_answered = True
        if code.is_failure:
            self._warn(f"{trouble.REFUSAL} {code.value}", trouble.refused(self._settings, code))
            return
        if self._said:
            logger.info("the MQTT broker %s is back", trouble.address(self._settings))
        self._said.clear()
        client.reconnect_delay_set(*WAIT_FOR_RECONNECT_S)
        self._closings.opened()
        self._window = max(min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW) - 1), 1)
        self._connections += 1
        self._limit.announce(getattr(properties, "MaximumPacketSize", None))
        self._tell_again(client, client.drop_out_messages())
        self._is_open = True
        self._wake()

    def _tell_again(self, client: Client, unconfirmed: Sequence[MQTTMessage]) -> None:
        """What the last connection left unconfirmed, and was not taken back. paho would repeat it as it is, and lose
        this one over it, too.
        """
        events = [
            (self._told.place(message.mid), message.payload.decode())
            for message in unconfirmed
            if message.topic == self._settings.mqtt_topic and self._told.may_be_one(message.mid)
        ]
        if self._over_limit is not None:
            self._limit.guess(
                [event for _, event in events],
                is_certain=self._over_limit is Cause.TOO_LARGE,
                longest_taken_bytes=self._told.longest_taken_bytes,
            )
        self._over_limit = None
        for place, event in events:
            self._publish(client, place, event)
        for message in unconfirmed:
            self._told.answer(message.mid, None)
            self._showing.answer(message.mid, None)  # the present one follows

    def _on_connect_fail(self, _client: Client, _data: Any) -> None:
        self._closings.missed()
        said = sys.exc_info()[1]  # paho calls while it handles the error
        exc = said if isinstance(said, Exception) else OSError()
        self._warn(trouble.kind(self._settings, exc), trouble.unreachable(self._settings, exc))

    def _on_disconnect(self, client: Client, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        was_open, self._is_open = self._is_open, False
        was_answered, self._is_answered = self._is_answered, False
        cause = self._closings.closed(code.value, has_unconfirmed=self._told.has_any()) if was_open else None
        self._ended.set()
        if not code.is_failure:
            return
        if not was_answered:
            self._warn(trouble.SILENCE, trouble.no_answer(self._settings))
        elif cause is None:
            return  # it was refused, and that is said
        elif cause is Cause.SILENCE:
            what = f"{trouble.lost(self._settings, code)}; is what MQTT_BROKER and MQTT_PORT name overloaded?"
            self._warn(trouble.SILENCE, what)
        elif cause in (Cause.TOO_LARGE, Cause.PERHAPS_TOO_LARGE):
            self._over_limit = cause
        elif cause is Cause.NAMESAKE:
            self._yield_to_namesake(client)
        elif self._closings.is_third_in_a_row:
            logger.warning("%s again and again; its log may say why (MQTT_BROKER)", trouble.lost(self._settings, code))
        else:
            logger.info("%s; it is opened again", trouble.lost(self._settings, code))  # what prevents that is a warning

    def _on_publish(self, _client: Client, _data: Any, mid: int, code: Any, _properties: Any) -> None:
        if mid in self._told or mid in self._showing:  # what is mentioned counts as published when it is written
            self._closings.confirmed()
        if code.is_failure:
            self._refusals.warn(code)
        self._told.answer(mid, code)
        self._showing.answer(mid, None)  # if refused, nothing is to be made up for: the next one follows
        if mid == self._last_told:
            self._wake()

    def _wake(self) -> None:
        for event in self._wakes:
            event.set()

    def _warn(self, kind: str, what: str) -> None:
        """Say why there is no connection: in each outage once for each kind of reason, since one may hide another."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s; jobs run on, their events are told later", what)

    def _yield_to_namesake(self, client: Client) -> None:
        """Another client has this one's name, here or in another deployment: no outage, and said once."""
        is_again = self._closings.was_thrown_off_lately
        self._closings.thrown_off()
        wait_s = WAIT_WHEN_THROWN_OFF_S[is_again]
        client.reconnect_delay_set(wait_s, wait_s)
        if not is_again:
            logger.warning(
                "another MQTT client takes the connection of WORKER_ID=%s; give each worker its own", self._worker_id
            )
