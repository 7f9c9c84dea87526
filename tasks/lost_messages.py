"""Lost messages: queued jobs whose message the broker no longer has.

In: the rows that are published, the broker's ledger, and what workers say that they have reserved. Out: rows, to be
published again. What one call can't prove is remembered until the next.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final

from db.records import Row
from tasks.broker.ledger import CountingLedger, EmbeddedLedger, Ledger, ledger_of

if TYPE_CHECKING:
    from db.store import Store
    from tasks.celery import MediaTasks

LOOK_AGAIN_AFTER_S: Final = 10.0
IN_ONE_LOOK: Final = 5000

_Publication = tuple[str, int]
_Rows = Mapping[_Publication, Row]


class LostMessages:
    """Those of one deployment; `find` them again and again."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._ledger: Ledger | None = None
        self._after_ids: Final[dict[str, int]] = {}
        self._suspicions: Final[dict[str, _Suspicion]] = defaultdict(_Suspicion)

    def find(self, before: datetime) -> Iterator[tuple[str, Row]]:
        """Queue and row of the jobs that were published before this time and have lost their messages.

        The embedded broker is asked for each job, so many of a queue at a call. RabbitMQ and Redis only count, and keep
        their order. A queue that holds fewer messages than jobs wait which no worker has reserved has lost some, and
        which ones can't be told; else those jobs have lost theirs that others have overtaken. They are found when it is
        still so ten seconds later, and may have their messages nevertheless: of two the guard takes one.
        """
        if not (published := self._app.store.published(before)):
            return
        if self._ledger is None:
            self._ledger = ledger_of(self._app)
        if self._ledger.names_messages:
            yield from self._by_id(self._ledger, published, before)
        else:
            yield from self._by_count(self._ledger, published, before)

    def _by_id(self, ledger: EmbeddedLedger, queues: Iterable[str], before: datetime) -> Iterator[tuple[str, Row]]:
        for queue in queues:
            after_id = self._after_ids.get(queue, 0)
            rows = self._app.store.published_in(queue, before, after_id=after_id, limit=IN_ONE_LOOK)
            held = ledger.held([row["job_id"] for row in rows])
            self._after_ids[queue] = rows[-1]["id"] if len(rows) == IN_ONE_LOOK else 0
            yield from ((queue, row) for row in rows if row["job_id"] not in held)

    def _by_count(
        self, ledger: CountingLedger, published: Mapping[str, int], before: datetime
    ) -> Iterator[tuple[str, Row]]:
        live = self._app.live_workers()
        reserved = {job_id for worker in live for job_id in worker["reserved_tasks"]}
        ready = ledger.ready(published)
        for queue, jobs in published.items():
            # No paging here: the same jobs have to be seen twice, and those published again make room for the next.
            rows = self._app.store.published_first_in(queue, before, limit=IN_ONE_LOOK)
            unheld = {(row["job_id"], row["publication"]): row for row in rows if row["job_id"] not in reserved}
            # A worker may have reserved as many as it has slots since its last heartbeat.
            slots = sum(worker["concurrency"] for worker in live if queue in worker["capabilities"])
            waiting = jobs - (len(rows) - len(unheld))
            is_short = bool(unheld) and (ready[queue] == 0 or waiting - ready[queue] > slots)
            suspicion = self._suspicions[queue]
            suspects = unheld if is_short else suspicion.overtaken(unheld, queue, self._app.store)
            yield from ((queue, row) for row in suspicion.confirmed(suspects))


class _Suspicion:
    """The jobs of one queue that seem to have lost their messages, to be seen again some time later."""

    def __init__(self) -> None:
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

        def is_overtaken(key: _Publication, row: Row) -> bool:
            is_first = row["publication"] == 1 and row["run_after_utc"] is None
            sent_before = row["id"] if is_first else self._newest_then[key]
            return any(priority <= row["priority"] and last > sent_before for priority, last in running)

        return {key: row for key, row in unheld.items() if is_overtaken(key, row)}

    def confirmed(self, suspects: _Rows) -> list[Row]:
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
