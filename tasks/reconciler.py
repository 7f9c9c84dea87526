"""The reconciler: finds where table and broker disagree with what is true, and mends it.

In: the tables, the broker, the locks of this host. Out: findings, each with what mends it. One worker at a time has
this duty (`tasks.upkeep`); `celery -A tasks reconcile --dry-run` only prints. Each part can be called by itself, as
often as one likes: all that it does is fenced, so that a disagreement which has gone meanwhile is left alone.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from db.records import EAGER, Holder, Row, now
from tasks.guard import close_attempt, close_eager
from tasks.leftovers import remove_temp_files_of_row
from tasks.lost_messages import LostMessages
from tasks.rows import request_of_row

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

# A message is on its way for so long before it can count as lost; an end has been told to others by then.
SETTLED_AFTER_S: Final = 5.0
PRUNE_EVERY_S: Final = 3600.0


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
        self._lost_messages: Final = LostMessages(app)
        self._prune_due = 0.0

    def round(self, goes_on: Callable[[], None] = lambda: None) -> list[Finding]:
        """Mend all that is found, one after the other; `goes_on` is called before each. What can't be mended is said,
        and found again by the next round.
        """
        mended = []
        for finding in self.findings():
            goes_on()
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
            for row in self._app.store.held_by(holder.worker_id, holder.lease):
                yield self._dead(row)
            what = "a process that ran jobs by apply()" if holder.is_eager else "the worker"
            yield Finding("dead holders", holder.worker_id, f"{what} is dead", partial(self._forget, holder))
        # Claimed by one that was taken for dead meanwhile, and died before it could renew.
        for row in self._app.store.held_by_nobody(for_s=self._app.settings.lease_timeout_s):
            yield self._dead(row)

    def _dead(self, row: Row) -> Finding:
        """An attempt whose process is dead, as the row stands at it."""
        text = f"its worker {row['claimed_by']} is dead; attempt {row['attempt']} is closed"
        mend: Callable[[], Any] = partial(close_attempt, self._app, row, "its worker died")
        if row["lease"].startswith(EAGER):
            text, mend = "the process that ran it by apply() is dead; it fails", partial(close_eager, self._app, row)
        return Finding("dead holders", row["job_id"], text, mend)

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
        """Queued jobs whose message the broker no longer has are published again."""
        for queue, row in self._lost_messages.find(now() - timedelta(seconds=SETTLED_AFTER_S)):
            text = f"the broker has no message of it in {queue}; it is published again"
            again = partial(self._app.store.republish, row["job_id"], row["publication"], "its message was lost")
            yield Finding("lost messages", row["job_id"], text, again)

    # How they do it

    def _forget(self, holder: Holder) -> None:
        # Who was to end them has died before it did.
        for row in self._app.store.cancelled_under(holder.worker_id, holder.lease):
            remove_temp_files_of_row(self._app, row)
        self._app.store.worker_lost(holder.worker_id, holder.lease)
        self._app.store.forget_lease(holder.lease)

    def _revoke(self, row: Mapping[str, Any], reason: str) -> None:
        request = request_of_row(row, publication=row["publication"])
        self._app.backend.mark_as_revoked(row["job_id"], reason, request=request)

    def _prune(self) -> None:
        if time.monotonic() < self._prune_due:
            return
        before = now() - timedelta(days=self._app.settings.retention_days)
        if self._app.store.prune(before) == 0:
            self._prune_due = time.monotonic() + PRUNE_EVERY_S
            self._app.store.forget_ended_pauses()
            self._app.leases.sweep()
