"""What a broker's refusals of events mean. In: reason codes, and places of events. Out: how long events wait, and which
are passed over.

A broker may refuse all that this client tells, or all above a quota: that waits until it is taken. Or it refuses one
event for what is in it, for ever, and takes others: it is told again once, and then holds up no other.
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Final

from paho.mqtt.reasoncodes import ReasonCode

from tasks.settings import Settings
from tasks.sinks import trouble
from tasks.sinks.events import NOWHERE, Place

logger = logging.getLogger(__name__)

# https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html, 3.4.2.1
QUOTA_EXCEEDED: Final = 0x97
# A broker that takes nothing is tried again after so long: its ACL may be mended by then.
WAIT_S: Final = 60.0
WAIT_WHERE_SOME_ARE_TAKEN_S: Final = 5.0
FORGOTTEN_AFTER_S: Final = 600.0


class Refusals:
    """Of one client's events. It says once for each reason that they wait, and again if that ended ten minutes ago; and
    once that some are passed over.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._before: frozenset[Place] = frozenset()
        self._passed_over: frozenset[Place] = frozenset()
        self._refused_at: Final[dict[int, float]] = {}
        self._is_passing_over_said = False

    def come(self, refused: Mapping[Place, ReasonCode], last_taken: Place) -> float:
        """These were refused, and no event behind `last_taken` was taken meanwhile; how long the rest of them waits."""
        hopeless = {
            place: code
            for place, code in refused.items()
            if place in self._before and place < last_taken and code.value != QUOTA_EXCEEDED
        }
        for place, code in hopeless.items():
            self._say_it_is_passed_over(place, code)
        self._passed_over |= hopeless.keys()
        self._before = frozenset(refused.keys() - hopeless.keys())
        if not self._before:
            return 0.0
        return WAIT_S if last_taken == NOWHERE else WAIT_WHERE_SOME_ARE_TAKEN_S

    def is_passed_over(self, place: Place) -> bool:
        return place in self._passed_over

    def forget_before(self, place: Place) -> None:
        """Nothing below it is told again."""
        self._passed_over = frozenset(one for one in self._passed_over if one >= place)

    def warn(self, code: ReasonCode) -> None:
        """A message was refused, perhaps the worker's capability."""
        before, at = self._refused_at.get(code.value, -math.inf), time.monotonic()
        self._refused_at[code.value] = at
        if at - before < FORGOTTEN_AFTER_S:
            return
        user = "anyone" if self._settings.mqtt_username is None else "the user of MQTT_USERNAME"  # it may be a token
        remedy = (
            f"let {user} write MQTT_TOPIC and below CAPABILITY_TOPIC_PREFIX"
            if code.value == trouble.NOT_AUTHORIZED
            else "its log may say why (MQTT_BROKER)"
        )
        logger.warning(
            "the MQTT broker %s refuses messages (%s); %s. Events wait until this worker or another one may tell them",
            trouble.address(self._settings),
            code,
            remedy,
        )

    def _say_it_is_passed_over(self, place: Place, code: ReasonCode) -> None:
        logger.log(
            logging.INFO if self._is_passing_over_said else logging.WARNING,
            "the MQTT broker %s refuses change %d of job %s again (%s), and takes what comes after it: it is not told; "
            "celery -A tasks mqtt replay has it",
            trouble.address(self._settings),
            place.sequence,
            place.job_id,
            code,
        )
        self._is_passing_over_said = True
