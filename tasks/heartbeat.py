"""The heartbeat: what a worker says of itself becomes rows. In: the worker's state. Out: worker_heartbeats, task_logs.

What the database can't take now, the next heartbeat says again.
"""

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from db import records
from db.records import Event, Status, WorkerStatus, now
from tasks import request

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)


class Heartbeat:
    """One worker, as its row shows it."""

    def __init__(self, app: "MediaTasks", worker: Any) -> None:
        self._app = app
        self._worker = worker
        self._started_at = now()
        self.paused: set[str] = set()
        """Queues that it would serve, were they not paused."""
        self.status: WorkerStatus | None = None
        """Draining or stopped; otherwise it follows from the jobs that run."""

    def beat(self) -> None:
        """Renew the lease, and show the worker. Raises what the store raises."""
        self._app.leases.renew()
        self._app.store.heartbeat(self._record())

    def say(self, event: Event) -> None:
        """Record a change of the worker, if the database takes it."""
        try:
            self._app.store.heartbeat(self._record())
            self._app.store.log_worker(self._app.worker_id, event, f"worker {event}")
        except SQLAlchemyError as exc:
            logger.warning("the worker's %s could not be recorded: %s", event, exc)

    def _record(self) -> records.Heartbeat:
        running = [job.id for job in request.running()]
        return records.Heartbeat(
            worker_id=self._app.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            capabilities=sorted({*self._app.amqp.queues.consume_from, *self.paused}),
            concurrency=slots(self._worker),
            status=self.status or (WorkerStatus.BUSY if running else WorkerStatus.IDLE),
            strategy=",".join(f"{queue}={way}" for queue, way in self._app.settings.queue_strategy.items()),
            lease=self._app.lease,
            current_tasks=running,
            reserved_tasks=request.reserved(),
            tasks_processed=request.processed[Status.COMPLETED],
            tasks_failed=request.processed[Status.FAILED],
            started_at=self._started_at,
        )


def slots(worker: Any) -> int:
    """How many jobs a worker's pool runs at a time. The solo pool reports `-c`, and runs one."""
    pool = getattr(worker, "pool", None)
    if type(pool).__module__ == "celery.concurrency.solo":
        return 1
    return int(getattr(pool, "num_processes", None) or getattr(pool, "limit", None) or 1)
