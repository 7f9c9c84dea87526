"""Why a broker has closed a connection. In: when it was opened, whether anything was confirmed on it, a reason code.
Out: a `Cause`. A broker that says why is believed. Mosquitto 2.0 closes without a reason in cases where others say one;
then the times tell.
"""

import math
import time
from enum import Enum
from typing import Final

UNSPECIFIED: Final = 0x80  # paho says so, too, if the broker has said nothing
KEEP_ALIVE_TIMEOUT: Final = 0x8D
SESSION_TAKEN_OVER: Final = 0x8E
# The broker says the first. Mosquitto answers a publication with it as well, which paho does not understand: it closes.
TOO_LARGE: Final = (0x95, 0x82)
# Some brokers (Mosquitto 2.0.11) don't say that they gave a client's name to another one: they close its connection,
# and take the next one at once. So many times in a row, each within so short a time, are no restarts.
THROWN_OFF_AFTER: Final = 3
SHORT_S: Final = 3.0
AT_ONCE_S: Final = 0.5
THROWN_OFF_FORGOTTEN_AFTER_S: Final = 600.0


class Cause(Enum):
    """What a closed connection tells."""

    OUTAGE = "the broker or the network is away"
    SILENCE = "the broker did not answer in time"
    TOO_LARGE = "a message is above the broker's limit"
    PERHAPS_TOO_LARGE = "a message may be above the broker's limit"
    NAMESAKE = "another client has taken the name"


STATED: Final = {
    KEEP_ALIVE_TIMEOUT: Cause.SILENCE,
    SESSION_TAKEN_OVER: Cause.NAMESAKE,
    **dict.fromkeys(TOO_LARGE, Cause.TOO_LARGE),
}


class Closings:
    """The connections of one client, one after the other, and how each came to its end."""

    def __init__(self) -> None:
        self._opened_at = self._thrown_off_at = -math.inf
        self._in_a_row = 0
        self._has_confirmed = False

    def opened(self) -> None:
        self._opened_at = time.monotonic()
        self._has_confirmed = False

    def confirmed(self) -> None:
        """The broker has confirmed a message on the connection that is open."""
        self._has_confirmed = True

    def missed(self) -> None:
        """No connection could be made: what comes next is no closing in a row."""
        self._in_a_row = 0

    def closed(self, code: int, *, has_unconfirmed: bool) -> Cause:
        """The cause of this closing, by its reason code and by those before it."""
        lived_s = time.monotonic() - self._opened_at
        self._in_a_row = 1 + (self._in_a_row if lived_s < SHORT_S else 0)
        cause = self._guessed(lived_s, has_unconfirmed) if code == UNSPECIFIED else STATED.get(code, Cause.OUTAGE)
        if cause in (Cause.TOO_LARGE, Cause.PERHAPS_TOO_LARGE):
            self._in_a_row = 0
        return cause

    def _guessed(self, lived_s: float, has_unconfirmed: bool) -> Cause:
        if has_unconfirmed and self._is_at_once(lived_s):
            return Cause.PERHAPS_TOO_LARGE
        is_in_a_row = self._in_a_row >= THROWN_OFF_AFTER or self.was_thrown_off_lately
        return Cause.NAMESAKE if lived_s < SHORT_S and is_in_a_row else Cause.OUTAGE

    @property
    def is_third_in_a_row(self) -> bool:
        """Whether each of the last three connections was closed within a short time."""
        return self._in_a_row == THROWN_OFF_AFTER

    def thrown_off(self) -> None:
        """The name was left to a namesake just now."""
        self._thrown_off_at = time.monotonic()

    @property
    def was_thrown_off_lately(self) -> bool:
        return time.monotonic() - self._thrown_off_at < THROWN_OFF_FORGOTTEN_AFTER_S

    def _is_at_once(self, lived_s: float) -> bool:
        """Whether it was closed as by a message that is too long: such a one is told again as soon as the next
        connection is open, and closes it at once; a namesake takes a while.
        """
        return self._in_a_row > 1 and lived_s < (AT_ONCE_S if self._has_confirmed else SHORT_S)
