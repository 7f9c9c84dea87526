"""The reconciler: finds where table and broker disagree with what is true, and mends it.

In: the tables, the broker, the locks of this host. Out: findings, each with what mends it. One worker at a time has
this duty (`tasks.upkeep`); `celery -A tasks reconcile --dry-run` only prints. Each part can be called by itself, as
often as one likes: all that it does is fenced, so that a disagreement which has gone meanwhile is left alone.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from db.records import Holder, Row, now
from tasks.broker.ledger import Ledger, ledger_of
from tasks.job import close_attempt
from tasks.leftovers import remove_temp_files_of_row
from tasks.rows import request_of_row

if TYPE_CHECKING:
    from db.store import Store
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

# A message is on its way for so long before it can count as lost; an end has been told to others by then.
SETTLED_AFTER_S: Final = 5.0
LOOK_AGAIN_AFTER_S: Final = 10.0
PRUNE_EVERY_S: Final = 3600.0
IN_ONE_LOOK: Final = 5000


@dataclass(frozen=True)
class Finding:
    """A disagreement: which part found it, on what, in words; and what mends it."""

    part: str
    subject: str
    text: str
    mend: Callable[[], Any]


class Reconciler:
    """One deployment's; `round` finds and mends."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._ledger: Ledger | None = None
        self._looked: dict[str, _Look] = {}
        self._prune_due = 0.0

    def round(self) -> list[Finding]:
        """Mend all that is found. What can't be mended is said, and found again by the next round."""
        mended = []
        for finding in self.findings():
            logger.warning("%s: %s: %s", finding.part, finding.subject, finding.text)
            try:
                finding.mend()
                mended.append(finding)
            except Exception:
                logger.exception("%s: %s could not be mended now", finding.part, finding.subject)
        self._prune()
        return mended

    def findings(self) -> Iterator[Finding]:
        """All disagreements, found one after the other."""
        yield from self.dead_holders()
        yield from self.untold_ends()
        yield from self.expired_jobs()
        yield from self.lost_messages()

    # The parts

    def dead_holders(self) -> Iterator[Finding]:
        """Attempts whose worker died are closed: queued again, or failed after too many deaths."""
        for holder in self._app.store.holders():
            if holder.lease == self._app.lease or not self._app.leases.is_dead(holder):
                continue
            for row in self._app.store.held_by(holder):
                text = f"its worker {holder.worker_id} is dead; attempt {row['attempt']} is closed"
                yield Finding(
                    "dead holders", row["job_id"], text, partial(close_attempt, self._app, row, "its worker died")
                )
            yield Finding("dead holders", holder.worker_id, "the worker is dead", partial(self._forget, holder))

    def untold_ends(self) -> Iterator[Finding]:
        """Chords, chains and errbacks that have not heard of the end of a job."""
        for row in self._app.store.unsettled(now() - timedelta(seconds=SETTLED_AFTER_S)):
            text = f"it is {row['status']}, and what waits for it has not been told"
            yield Finding("untold ends", row["job_id"], text, partial(self._app.backend.tell, row))

    def expired_jobs(self) -> Iterator[Finding]:
        """Queued jobs whose time is over are cancelled."""
        for row in self._app.store.expired():
            text = f"it expired at {row['expires_at']:%Y-%m-%d %H:%M:%S} UTC"
            yield Finding("expired jobs", row["job_id"], text, partial(self._revoke, row, "expired"))

    def lost_messages(self) -> Iterator[Finding]:
        """Queued jobs whose message the broker no longer has are published again.

        The embedded broker is asked for each job. RabbitMQ and Redis only count, and keep their order. A queue that
        holds fewer messages than jobs wait which no worker has reserved has lost some, and which ones can't be told;
        else those jobs have lost theirs that others have overtaken. What is still so ten seconds later is published
        again; of two messages the guard takes one.
        """
        before = now() - timedelta(seconds=SETTLED_AFTER_S)
        published = self._app.store.published(before)
        ledger = self._opened_ledger() if published else None
        if ledger is None:
            return
        reserved = {job_id for worker in self._app.live_workers() for job_id in worker["reserved_tasks"]}
        for queue, jobs in published.items():
            ready = ledger.ready(queue)
            for row in self._missing(ledger, queue, ready, jobs, before, reserved):
                text = f"the broker has no message of it in {queue}; it is published again"
                again = partial(self._app.store.republish, row["job_id"], row["publication"], "its message was lost")
                yield Finding("lost messages", row["job_id"], text, again)

    # How they do it

    def _forget(self, holder: Holder) -> None:
        for row in self._app.store.cancelled_under(holder):  # who was to end them has died before it did
            remove_temp_files_of_row(self._app, row)
        self._app.store.worker_lost(holder.worker_id, holder.lease)
        self._app.store.forget_lease(holder.lease)

    def _revoke(self, row: Mapping[str, Any], reason: str) -> None:
        request = request_of_row(row, publication=row["publication"])
        self._app.backend.mark_as_revoked(row["job_id"], reason, request=request)

    def _opened_ledger(self) -> Ledger | None:
        if self._ledger is None:
            self._ledger = ledger_of(self._app)
        return self._ledger

    def _missing(
        self, ledger: Ledger, queue: str, ready: int, jobs: int, before: datetime, reserved: set[str]
    ) -> list[Mapping[str, Any]]:
        look = self._looked.setdefault(queue, _Look())
        rows = self._app.store.published_in(queue, before, after_id=look.after_id, limit=IN_ONE_LOOK)
        if (held := ledger.held([row["job_id"] for row in rows])) is not None:
            look.after_id = rows[-1]["id"] if len(rows) == IN_ONE_LOOK else 0
            return [row for row in rows if row["job_id"] not in held]
        # No paging here: the same jobs have to be seen twice, and those published again make room for the next.
        unheld = {(row["job_id"], row["publication"]): row for row in rows if row["job_id"] not in reserved}
        # A worker may have reserved as many as it has slots since its last heartbeat.
        live = self._app.live_workers()
        slots = sum(worker["concurrency"] for worker in live if queue in worker["capabilities"])
        waiting = jobs - (len(rows) - len(unheld))
        is_short = bool(unheld) and (ready == 0 or waiting - ready > slots)
        suspects = unheld if is_short else look.overtaken(unheld, queue, self._app.store)
        return look.again(suspects)

    def _prune(self) -> None:
        if time.monotonic() < self._prune_due:
            return
        before = now() - timedelta(days=self._app.settings.retention_days)
        if self._app.store.prune(before) == 0:
            self._prune_due = time.monotonic() + PRUNE_EVERY_S
            self._app.store.forget_ended_pauses()
            self._app.leases.sweep()


_Publication = tuple[str, int]
_Rows = Mapping[_Publication, Row]


class _Look:
    """What was seen of one queue, to be seen again some time later."""

    def __init__(self) -> None:
        self.after_id = 0
        self._suspects: set[_Publication] = set()
        self._suspected_at = 0.0
        self._newest_then: dict[_Publication, int] = {}

    def overtaken(self, unheld: _Rows, queue: str, store: "Store") -> _Rows:
        """The jobs whose messages are older than that of one which runs, and of no higher priority than theirs.

        A first message is as old as its row; any other is not known to be older than the first look at it.
        """
        newest = store.newest()
        self._newest_then = {key: self._newest_then.get(key, newest) for key in unheld}
        running = store.newest_running(queue).items()

        def is_overtaken(key: _Publication, row: Mapping[str, Any]) -> bool:
            is_first = row["publication"] == 1 and row["run_after_utc"] is None
            sent_before = row["id"] if is_first else self._newest_then[key]
            return any(priority <= row["priority"] and last > sent_before for priority, last in running)

        return {key: row for key, row in unheld.items() if is_overtaken(key, row)}

    def again(self, suspects: _Rows) -> list[Mapping[str, Any]]:
        """The jobs that were suspected some time ago, and at each look since."""
        self._suspects &= suspects.keys()
        if not self._suspects:
            self._suspects, self._suspected_at = set(suspects), time.monotonic()
            return []
        if time.monotonic() - self._suspected_at < LOOK_AGAIN_AFTER_S:
            return []
        still = [row for key, row in suspects.items() if key in self._suspects]
        self._suspects = set()
        return still
