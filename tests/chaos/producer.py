"""The producer: a thread that submits the orders when they are due. In: a workload. Out: accepted jobs, and refusals.

A call that fails is made again with the same job ids, as an application does that wants one job. A chord can't be: its
caller starts another one, and what the first one left must come to an end all the same.
"""

import threading
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heapify, heappop, heappush
from typing import Any

from kombu.exceptions import OperationalError

from db.errors import DatabaseUnavailable
from tests.chaos.workload import Job, Order, Workload

AGAIN_AFTER_S = 0.5


@dataclass(frozen=True)
class Refusal:
    """A call that raised. One that `is_clear` says to its caller that broker or database can't be used now."""

    at: datetime
    error: str
    trace: str
    is_clear: bool


class Producer(threading.Thread):
    """Ends when every order is accepted, or `give_up` is called."""

    def __init__(self, app: Any, workload: Workload) -> None:
        super().__init__(name="producer", daemon=True)
        self._app = app
        self._workload = workload
        self._orders = [(order.at_s, number, order) for number, order in enumerate(workload.orders)]
        heapify(self._orders)
        self._over = threading.Event()
        self._number = len(self._orders)
        self.jobs: list[Job] = []
        self.refusals: list[Refusal] = []

    def run(self) -> None:
        start = time.monotonic()
        while self._orders and not self._over.is_set():
            at_s, _, order = heappop(self._orders)
            if self._over.wait(max(0.0, at_s - (time.monotonic() - start))):
                return
            self._submit(order, start)

    def give_up(self) -> None:
        self._over.set()

    @property
    def unsent(self) -> int:
        return len(self._orders)

    def _submit(self, order: Order, start: float) -> None:
        try:
            order.submit(self._app)
        except Exception as exc:
            is_clear = isinstance(exc, (OperationalError, DatabaseUnavailable))
            error = f"{type(exc).__name__}: {exc}"
            self.refusals.append(Refusal(datetime.now(UTC), error, traceback.format_exc(), is_clear))
            if order.is_chord:
                self.jobs += order.jobs
                order = self._workload.again(order)
            self._number += 1
            heappush(self._orders, (time.monotonic() - start + AGAIN_AFTER_S, self._number, order))
            return
        for job in order.jobs:
            job.accepted_at = datetime.now(UTC)
        self.jobs += order.jobs
