"""The relay: tells a sink what the log says, in its order, at least once. In: committed task_logs rows. Out: events.

One worker at a time has this duty. Its place in the log is kept with the duty and moves on only when the sink has
confirmed what was told: while the sink is away the rows wait in the table, and after the death of a relay the next one
goes on where it was. An event that comes twice comes later than all of its job's events before it, so a receiver that
drops what is not above the last `sequence` of a job sees each change once, in order.

How far running jobs are is told twice a second, unconfirmed.
"""

import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from db.records import Row
from tasks.sinks.events import LONGEST_RESULT_BYTES, Place, event_of, progress_of

if TYPE_CHECKING:
    from db.store import Store
    from tasks.celery import MediaTasks
    from tasks.duty import Duty

logger = logging.getLogger(__name__)

IDLE_AFTER_S: Final = 1.0
# There may be something to tell that `Store.news` did not show.
LOOK_EVERY_S: Final = 1.0
LOOK_AT_DUTY_EVERY_S: Final = 5.0
PROGRESS_EVERY_S: Final = 0.5
# What was told since the last time is told again after a relay's death.
RECORD_EVERY_S: Final = 1.0
# One is left by each change of a transaction beside which others write; so many take 3 MB, and a look at them 0.05 s.
MOST_GAPS: Final = 10_000
NOT_RISEN: Final = (0, 0.0)


@dataclass(frozen=True, slots=True)
class Pause:
    """When the next round is to begin: so long after this one has. One that ends early does so when the sink has
    confirmed all, or opens.
    """

    seconds: float
    ends_early: bool = False


NO_PAUSE: Final = Pause(0.0)
# What is written between two looks is told at once: a look costs as much as three events.
WHILE_BUSY: Final = Pause(0.04)
WHILE_IDLE: Final = Pause(0.07)
UNTIL_NEEDED: Final = Pause(1.0, ends_early=True)


class Sink(Protocol):
    """Who is told."""

    @property
    def is_open(self) -> bool:
        """Whether it takes events now."""

    @property
    def window(self) -> int:
        """How many events may be unconfirmed."""

    @property
    def unconfirmed(self) -> int:
        """How many are."""

    def tell(self, events: Mapping[Place, str]) -> None:
        """Send events in order, to be confirmed. One that the receiver refuses for ever is passed over in time."""

    @property
    def refused_from(self) -> Place | None:
        """The first event that is not confirmed, if the receiver has refused some of them."""

    def take_back(self) -> None:
        """Forget what is unconfirmed, if the receiver has refused some of it.

        Until then, and perhaps for a while after it, the sink is not open.
        """

    def mention(self, event: str) -> None:
        """Send an event that nobody waits for."""


class Relay:
    """One worker's. Call `begin` first; then `round` again and again, from one thread."""

    def __init__(self, app: "MediaTasks", sink: Sink, duty: "Duty") -> None:
        self._app: Final = app
        self._sink: Final = sink
        self._duty: Final = duty
        self._duty_due = self._progress_due = self._look_due = self._record_due = self._busy_until = 0.0
        self._has_begun = False
        self._news: object = None
        self._looks = 0
        self._log: LogReader | None = None
        self._told: int | None = None
        self._risen: dict[str, tuple[int, float]] = {}

    @property
    def is_on_duty(self) -> bool:
        return self._log is not None

    def begin(self) -> None:
        """Fix where the log is told from, if it never was: before this worker can claim a job."""
        if not self._has_begun:
            self._app.store.begin_relay(self._duty.name)
            self._has_begun = True

    def round(self) -> Pause:
        """Tell what there is to tell; when to come again. Raises what the store raises: the next round makes up for it,
        and may tell again what it has told.
        """
        with self._duty.round():
            return self._round()

    def _round(self) -> Pause:
        self.begin()
        if not self._sink.is_open:
            self.leave()
            return UNTIL_NEEDED
        if self._sink.unconfirmed:
            return UNTIL_NEEDED
        if not self._keeps_duty():
            return UNTIL_NEEDED
        self._record(at_once=False)
        if self._log is None:
            return UNTIL_NEEDED
        if self._has_news(self._log):
            return self._tell(self._log)
        return WHILE_BUSY if time.monotonic() < self._busy_until else WHILE_IDLE

    def leave(self) -> None:
        """Let another worker have the duty. From the first event that the sink's receiver has not taken, if it has
        refused some, all is told from the log again, by whoever has it next.
        """
        refused_from = self._sink.refused_from
        if refused_from is not None and self._told is not None:
            self._told = min(self._told, refused_from.row_id - 1)
        if self._log is not None:
            if refused_from is not None or not self._sink.unconfirmed:
                self._record()
            self._duty.leave()
            self._log = None  # only now: what the database does not take is tried again at the next round
            self._duty_due = 0.0
        self._sink.take_back()

    def _keeps_duty(self) -> bool:
        if self._log is not None and time.monotonic() < self._duty_due:
            return True
        if not self._duty.is_held():
            self._log = None
            return False
        self._duty_due = time.monotonic() + LOOK_AT_DUTY_EVERY_S
        if self._log is None:
            self._record()
            position = self._app.store.relay_position(self._duty.name, self._app.leases.mine)
            if position is None:
                return False
            logger.info("this worker tells the events of all jobs, from log row %d on", position + 1)
            self._log = LogReader(self._app.store, position)
            self._look_due = 0.0
        return True

    def _record(self, *, at_once: bool = True) -> None:
        """Keep how far the sink has confirmed: once a second, since each time is a transaction."""
        position, at = self._told, time.monotonic()
        if position is None or (at < self._record_due and not at_once):
            return
        self._record_due = at + RECORD_EVERY_S
        if not self._app.store.relay_reached(self._duty.name, self._app.leases.mine, position):
            self._log = None
        self._told = None

    def _has_news(self, log: "LogReader") -> bool:
        """Whether to look into the tables: something was committed, may still come to be seen, or a second has passed.

        After news it looks twice: what is committed just after an answer may not change the next one.
        """
        news, at = self._app.store.news(), time.monotonic()
        if news is None or news != self._news:
            self._news, self._looks = news, 2
            self._busy_until = at + IDLE_AFTER_S
        is_rising = self._risen and at >= self._progress_due
        if not (self._looks or log.has_gaps or is_rising or at >= self._look_due):
            return False
        self._looks = max(self._looks - 1, 0)
        self._look_due = at + LOOK_EVERY_S
        return True

    def _tell(self, log: "LogReader") -> Pause:
        rising = self._rising()
        position = log.position
        rows = log.read(self._sink.window)
        self._sink.tell({_place(row): event for row in rows if row["job_id"] is not None and (event := event_of(row))})
        if log.position != position:
            self._told = log.position
        if len(rows) == self._sink.window:
            self._look_due = 0.0  # there is more, whether something new is committed or not
            return NO_PAUSE
        self._mention(rising, {row["job_id"]: row["sequence"] for row in rows})
        return WHILE_BUSY

    def _rising(self) -> Sequence[Row]:
        """The jobs that have said how far they are, when it is time to tell that."""
        if time.monotonic() < self._progress_due:
            return ()
        self._progress_due = time.monotonic() + PROGRESS_EVERY_S
        rising = self._app.store.rising()
        self._risen = {row["job_id"]: self._risen.get(row["job_id"], NOT_RISEN) for row in rising}
        return rising

    def _mention(self, rising: Sequence[Row], sequences: Mapping[str, int]) -> None:
        """Say how far jobs are, where that has risen and nothing newer was told."""
        for row in rising:
            job_id, now = row["job_id"], (row["attempt"], row["progress"])
            if now > self._risen[job_id] and sequences.get(job_id, row["sequence"]) == row["sequence"]:
                self._risen[job_id] = now
                self._sink.mention(progress_of(row))


def _place(row: Row) -> Place:
    return Place(row["id"], row["job_id"], row["sequence"])


class LogReader:
    """Reads the log from a position on.

    Ids that are missing may still come to be seen: they are looked for until no transaction is left that could hold
    them. `position` is the last id below which nothing can come.

    All is read at one moment: a change of a job never comes before an earlier one that was missing. Behind MOST_GAPS
    ranges of missing ids nothing new is read until the transactions that hold them end, which is said once.
    """

    def __init__(self, store: "Store", position: int) -> None:
        self._store: Final = store
        self._top = position
        self._missing: dict[tuple[int, int], frozenset[str]] = {}
        self._is_full_said = False

    @property
    def position(self) -> int:
        return min((first for first, _ in self._missing), default=self._top + 1) - 1

    @property
    def has_gaps(self) -> bool:
        """Whether rows below the last one may come, without anything new after it."""
        return bool(self._missing)

    def read(self, limit: int) -> list[Row]:
        """The next rows by id; rows that were missing come first."""
        writers = self._store.log_writers() if self._missing else frozenset()
        rows = self._store.changes(
            None if self._is_full() else self._top, list(self._missing), limit=limit, result_bytes=LONGEST_RESULT_BYTES
        )
        found = [row["id"] for row in rows]
        self._missing = self._still_missing(found, writers, is_all=len(rows) < limit)
        if found and found[-1] > self._top:
            gaps = _without((self._top + 1, found[-1]), found)
            if gaps and not self._store.database.is_sqlite:
                self._missing |= dict.fromkeys(gaps, self._store.log_writers())
            self._top = found[-1]
        return rows

    def _still_missing(
        self, found: Sequence[int], writers: frozenset[str], *, is_all: bool
    ) -> dict[tuple[int, int], frozenset[str]]:
        """The ranges that are left, each with those writers that may still fill it; what none may fill is dropped."""
        left: dict[tuple[int, int], frozenset[str]] = {}
        alike: dict[frozenset[str], frozenset[str]] = {}  # thousands of ranges wait for the same few
        for whole, suspects in self._missing.items():
            living = suspects & writers
            if living or not is_all:
                left |= dict.fromkeys(_without(whole, found), alike.setdefault(living, living))
        return left

    def _is_full(self) -> bool:
        is_full = len(self._missing) >= MOST_GAPS
        if is_full and not self._is_full_said:
            self._is_full_said = True
            logger.warning(
                "events are told later: a transaction of the job database has been open for more than %d changes of "
                "others (pg_stat_activity shows it); end it, and keep those that submit jobs short",
                MOST_GAPS,
            )
        return is_full


def _without(whole: tuple[int, int], found: Sequence[int]) -> list[tuple[int, int]]:
    """What is left of a range of ids; `found` is in order."""
    first, last = whole
    left = []
    for number in found[bisect_left(found, first) : bisect_right(found, last)]:
        if number > first:
            left.append((first, number - 1))
        first = number + 1
    return [*left, (first, last)] if first <= last else left
