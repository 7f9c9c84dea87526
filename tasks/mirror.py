"""The mirror: Celery's signals of a worker become rows, for what neither the guard nor the result backend sees.

In: a worker's start and stop, the passing of time. Out: worker_heartbeats and task_logs.
Only a worker's main process runs it. A handler never raises (Celery would only log it) and never blocks a job: what the
database can't take now, the next heartbeat says again.
"""

import logging
import os
import socket
import threading
from typing import Any

from celery import signals
from celery.worker import state
from sqlalchemy.exc import SQLAlchemyError

from db.records import Heartbeat, now

logger = logging.getLogger(__name__)


def connect(app: Any) -> None:
    """Start to mirror this process's worker, unless MIRROR=off."""
    if not app.settings.mirror:
        return
    mirror = _Mirror(app)
    for name, handler in {
        "worker_ready": mirror.on_worker_ready,
        "worker_shutting_down": mirror.on_worker_shutting_down,
        "worker_shutdown": mirror.on_worker_shutdown,
    }.items():
        getattr(signals, name).connect(handler, dispatch_uid=f"media_tasks.{name}", weak=False)


class _Mirror:
    """One worker's heartbeat thread and its handlers."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._started_at = now()
        self._status = "idle"
        self._consumer: Any = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)

    def on_worker_ready(self, sender: Any, **_: Any) -> None:
        self._consumer = sender
        self._say("started")
        self._thread.start()

    def on_worker_shutting_down(self, **_: Any) -> None:
        """A signal handler's context: nothing may block here, so the thread says it."""
        self._status = "draining"

    def on_worker_shutdown(self, **_: Any) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._status = "stopped"
        self._say("stopped")

    def _beat_until_stopped(self) -> None:
        while not self._stopping.wait(self._app.settings.lease_renew_s):
            self._beat()

    def _say(self, event: str) -> None:
        self._beat()
        try:
            self._app.store.log_worker(self._app.worker_id, event, f"worker {event}")
        except SQLAlchemyError as exc:
            logger.warning("the worker's %s could not be recorded: %s", event, type(exc).__name__)

    def _beat(self) -> None:
        try:
            self._app.store.heartbeat(self._heartbeat())
        except SQLAlchemyError as exc:
            logger.warning("the job database does not answer (%s); the heartbeat is missing", type(exc).__name__)

    def _heartbeat(self) -> Heartbeat:
        running = [request.id for request in tuple(state.active_requests)]
        status = self._status
        return Heartbeat(
            worker_id=self._app.worker_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            capabilities=sorted(self._app.amqp.queues.consume_from),
            concurrency=getattr(getattr(self._consumer, "pool", None), "num_processes", None) or 1,
            status=("busy" if running else "idle") if status == "idle" else status,
            strategy=",".join(f"{queue}={way}" for queue, way in self._app.settings.queue_strategy.items()),
            current_tasks=running,
            started_at=self._started_at,
        )
