"""How long a message may be, as the broker says or shows. In: events. Out: what of them it takes.

A broker may announce its limit when it takes a connection. Others only close the connection over a message that is too
long, with or without a word: how long it may be has to be guessed. Where nothing was said the guess may be wrong: it is
forgotten after a while.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Final

from tasks.settings import Settings
from tasks.sinks import trouble
from tasks.sinks.events import shortened

logger = logging.getLogger(__name__)

# Of a PUBLISH, without topic and properties: type, length (up to 4), length of the topic, number, length of properties.
PACKET_BYTES: Final = 1 + 4 + 2 + 2 + 1
# An event without result or error message is shorter; hardly a broker has a lower limit.
LEAST_BYTES: Final = 1024
FORGOTTEN_AFTER_S: Final = 600.0


class Limit:
    """Of one client's events. It says once what happens to those that are too long."""

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._announced_bytes = self._guessed_bytes = self._guess_ends_at = math.inf
        self._is_said = self._is_other_said = False

    def announce(self, packet_bytes: int | None) -> None:
        """What the broker says of whole packets when it takes a connection; None: nothing."""
        around = PACKET_BYTES + len(self._settings.mqtt_topic.encode())
        self._announced_bytes = math.inf if packet_bytes is None else packet_bytes - around

    def guess(self, events: Sequence[str], *, is_certain: bool, longest_taken_bytes: int) -> None:
        """One of these was too long, or perhaps so, though nothing was announced.

        The longest is the likeliest. Half of it is taken for the limit, so that few connections are lost until it is
        found. If all are short it was something else, and nothing is left out; unless the broker says so and has taken
        shorter ones: then it is the longest.
        """
        longest_bytes = max(map(len, events), default=0)
        is_short = longest_bytes <= LEAST_BYTES
        if is_short and not (is_certain and 0 < longest_taken_bytes < longest_bytes):
            self._say_it_is_another_reason()
            return
        self._guessed_bytes = longest_bytes - 1 if is_short else max(longest_bytes // 2, LEAST_BYTES)
        self._guess_ends_at = math.inf if is_certain else time.monotonic() + FORGOTTEN_AFTER_S
        self._say(
            "closes the connection over a message that is too long; raise its limit (Mosquitto: message_size_limit, "
            "max_packet_size) and restart this worker"
            if is_certain
            else "closes the connection again and again without a word, perhaps over a message that is too long: one "
            f"of {longest_bytes:,} bytes, tried again in {FORGOTTEN_AFTER_S / 60:g} minutes; look at its limit and log"
        )

    def fitting(self, event: str) -> str | None:
        """The event, without its result or the end of its error message if it is too long; None if it is all the same.

        It is ASCII: as many bytes as characters.
        """
        if time.monotonic() >= self._guess_ends_at:
            self._guessed_bytes = self._guess_ends_at = math.inf
        longest_bytes = min(self._announced_bytes, self._guessed_bytes)
        if len(event) <= longest_bytes:
            return event
        self._say(
            f"takes events of at most {longest_bytes:,.0f} bytes, and one has {len(event):,}; raise its limit "
            "(Mosquitto: max_packet_size)"
        )
        return shortened(event, int(longest_bytes))

    def _say(self, what: str) -> None:
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "the MQTT broker %s %s. What is too long is told without its result, or not at all; "
                "celery -A tasks mqtt replay has it",
                trouble.address(self._settings),
                what,
            )

    def _say_it_is_another_reason(self) -> None:
        if not self._is_other_said:
            self._is_other_said = True
            logger.warning(
                "the MQTT broker %s closes the connection again and again when it is told events, and none of them is "
                "long; its log may say why (MQTT_BROKER). They are told when it takes them",
                trouble.address(self._settings),
            )
