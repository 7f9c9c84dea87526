"""Messages that a broker has not answered yet. In: their numbers, its answers. Out: which it has not taken.

One thread adds and counts, paho's answers. paho's own `MQTTMessageInfo` raises for ever for a message that had to wait
for a connection.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NamedTuple

from paho.mqtt.client import MQTTMessageInfo
from paho.mqtt.reasoncodes import ReasonCode

from tasks.sinks.events import NOWHERE, Place


class Sent(NamedTuple):
    """A message; an event has a place in the log, and its length counts."""

    place: Place = NOWHERE
    size_bytes: int = 0


UNKNOWN: Final = Sent()


class Awaited:
    """The numbers of messages. `longest_taken_bytes` is the length of the longest event that was ever confirmed."""

    def __init__(self) -> None:
        self.longest_taken_bytes = 0
        self._sent: Final[dict[int, Sent]] = {}
        self._answers: Final[deque[tuple[int, ReasonCode | None]]] = deque()
        self._refused: Final[dict[int, ReasonCode]] = {}
        self._last_taken = NOWHERE
        self._is_adding = False

    @contextmanager
    def adding(self) -> Iterator[None]:
        """What is published in the block may be answered before it is added."""
        self._is_adding = True
        try:
            yield
        finally:
            self._is_adding = False

    def add(self, message: MQTTMessageInfo, sent: Sent = UNKNOWN) -> int:
        self._sent[message.mid] = sent
        return message.mid

    def answer(self, number: int, code: ReasonCode | None) -> None:
        """Keep it if the number may be one of these: nobody counts while a worker waits for its Celery broker at start.

        None: there will be no answer, and nobody waits for one. What is refused stays unconfirmed.
        """
        if self.may_be_one(number):
            self._answers.append((number, code))

    def place(self, number: int) -> Place:
        """From any thread; NOWHERE for what is just being added."""
        return self._sent.get(number, UNKNOWN).place

    def may_be_one(self, number: int) -> bool:
        """From any thread; True, too, for what is just being added."""
        return self._is_adding or number in self._sent  # in this order: it is added before that ends

    def clear(self) -> None:
        """Await nothing any more."""
        self._sent.clear()
        self._refused.clear()
        self._last_taken = NOWHERE

    def count(self) -> int:
        """How many are not confirmed."""
        while self._answers:
            number, code = self._answers.popleft()
            if number not in self._sent:
                continue
            if code is not None and code.is_failure:
                self._refused[number] = code
                continue
            sent = self._sent.pop(number)
            if code is not None:
                self._last_taken = max(self._last_taken, sent.place)
                self.longest_taken_bytes = max(self.longest_taken_bytes, sent.size_bytes)
        return len(self._sent)

    def first(self) -> Place:
        """The first one that is not confirmed, if there is one."""
        return min(self._sent.values()).place

    def refused(self) -> Mapping[Place, ReasonCode]:
        """Those that were refused, from the thread that counts."""
        self.count()
        return {self._sent[number].place: code for number, code in self._refused.items()}

    @property
    def last_taken(self) -> Place:
        """The last one of the log that was confirmed since the last `clear`, when last counted."""
        return self._last_taken

    def __contains__(self, number: int) -> bool:
        """From any thread; False, too, for one that is confirmed before it is added."""
        return number in self._sent

    def has_any(self) -> bool:
        """Whether one has no answer; from the thread that answers."""
        return bool(self._sent.keys() - {number for number, _ in list(self._answers)} - self._refused.keys())
