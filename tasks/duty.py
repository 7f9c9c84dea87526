"""Duties: what one worker does for all. In: a duty's name. Out: whether this worker has it; of all that live one does.

The holder is named by its lease. Who dies, leaves, or (where that does no harm) falls silent loses its duties to
whoever asks next; of several that ask at once one gets them. So does who lives and is stuck in one: what it does then
is fenced, or does no harm when two do it, and it finds out when it goes on.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)


class Duty:
    """One duty, as one worker sees it.

    Args:
        passes_from_silent: Also take it from a holder that may live, but has not renewed its lease for LEASE_TIMEOUT_S:
            it is stopped, cut off, or could not reach the database. For a duty that two may do at the same time.
    """

    def __init__(self, app: "MediaTasks", name: str, *, passes_from_silent: bool = False) -> None:
        self._app: Final = app
        self._passes_from_silent: Final = passes_from_silent
        self._went_on_at = math.inf
        self.name: Final = name

    def is_held(self) -> bool:
        """Whether this worker has the duty; it takes one that nobody alive has. Raises what the store raises."""
        store, lease = self._app.store, self._app.leases.mine
        holder = store.duty_holder(self.name)
        if holder == lease:
            return True
        if holder is not None and not self._is_to_pass_from(holder):
            return False
        return store.take_duty(self.name, lease, after=holder)

    def leave(self) -> None:
        """Let another worker have it. Does nothing where this one does not hold it. Raises what the store raises."""
        self._app.store.leave_duty(self.name, self._app.leases.mine)

    @contextmanager
    def round(self) -> Iterator[None]:
        """What is done in the block may be stuck; who waits for the next round is not, however long that is."""
        self.goes_on()
        try:
            yield
        finally:
            self._went_on_at = math.inf

    def goes_on(self) -> None:
        """Called between two steps of what may take long."""
        self._went_on_at = time.monotonic()

    def leave_if_stuck(self, after_s: float) -> None:
        """Called by another thread: a disk or a server that does not answer may hold this one for ever."""
        if time.monotonic() - self._went_on_at > after_s:
            logger.warning("the %s has been stuck for %.0f s; another worker takes over", self.name, after_s)
            self.leave()  # what the database does not take now is tried again
            self._went_on_at = math.inf

    def _is_to_pass_from(self, lease: str) -> bool:
        holder = next((holder for holder in self._app.store.holders() if holder.lease == lease), None)
        if holder is None or self._app.leases.is_dead(holder):
            return True
        return self._passes_from_silent and holder.silent_s > self._app.settings.lease_timeout_s
