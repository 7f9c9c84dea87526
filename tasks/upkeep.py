"""The upkeep of a worker: threads of its main process that go round once a second.

In: the passing of time. Out: the lease is renewed, the worker is shown, cancelled jobs end, attempts that nothing runs
are closed, paused queues are left alone; and, in the one worker whose duty that is, due jobs are published and the
tables reconciled. A round that fails (the database does not answer) is said once and made up for by the next.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from celery import bootsteps
from kombu.exceptions import OperationalError
from sqlalchemy.exc import SQLAlchemyError

from db.records import Event, WorkerStatus, now
from tasks import request
from tasks.duty import Duty
from tasks.guard import close_attempt, close_out_of_time
from tasks.heartbeat import Heartbeat
from tasks.outgoing import Dispatcher
from tasks.reconciler import Reconciler

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

ROUND_S: Final = 1.0
STOP_WITHIN_S: Final = 2.0
LOOK_FOR_DEAD_CHILDREN_S: Final = 0.25


class Housework:
    """What one worker does for all, in a thread of its own."""

    def __init__(self, duty: Duty, call: Callable[[], float]) -> None:
        self.duty: Final = duty
        self._call: Final = call

    def round(self) -> float:
        """Do it, if this is the worker; seconds until the next round."""
        with self.duty.round():
            return self._call() if self.duty.is_held() else ROUND_S


class Upkeep(bootsteps.StartStopStep):  # type: ignore[misc, unused-ignore]
    """Started after the pool has forked, stopped after the consumer has."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._app: Final[MediaTasks] = worker.app
        self._worker: Final = worker
        self._heartbeat: Final = Heartbeat(worker.app, worker)
        self._reconciler: Final = Reconciler(worker.app)
        self._dispatcher: Final = Dispatcher(worker.app)
        self._beat_due = self._reconcile_due = 0.0
        self._unclaimed: set[tuple[str, int]] = set()
        self._seen_at = now()
        self._stopping: Final = threading.Event()
        self._housework: Final = {
            name: Housework(Duty(worker.app, name), call)
            for name, call in {"dispatcher": self.dispatch, "reconciler": self.reconcile}.items()
        }
        self._watched: Final = [work.duty for work in self._housework.values()]
        # A thread each: a broker or a disk that does not answer must not keep the lease from being renewed, nor what is
        # due from being published.
        rounds = {"upkeep": self.round} | {name: work.round for name, work in self._housework.items()}
        self._wakes: Final = {name: threading.Event() for name in rounds}
        self._threads: Final = [
            threading.Thread(target=self._repeat, args=(name, call), name=name, daemon=True)
            for name, call in rounds.items()
        ]
        worker.upkeep = self

    def start(self, worker: Any) -> None:  # noqa: ARG002 (Celery's signature)
        self._heartbeat.say(Event.STARTED)
        for thread in self._threads:
            thread.start()

    def stop(self, worker: Any) -> None:  # noqa: ARG002 (Celery's signature)
        if self._stopping.is_set():
            return
        self._stopping.set()
        for wake in self._wakes.values():
            wake.set()
        for job in request.running():  # a way out that waited for none
            job.give_back("its worker was stopped")
        for thread in self._threads:
            thread.join(timeout=STOP_WITHIN_S)
        self._heartbeat.status = WorkerStatus.STOPPED
        self._heartbeat.say(Event.STOPPED)
        for leave in (*(work.duty.leave for work in self._housework.values()), self._app.leases.release):
            try:
                leave()
            except SQLAlchemyError as exc:
                logger.warning("left to others to clean up: %s", exc)

    terminate = stop

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Look for dead pool children more often than Celery does.

        A dying child closes its pipes before its parent can wait for it. When the parent is faster, Celery has seen the
        pipe close, found nobody dead, and looks again up to five seconds later.
        """
        if hasattr(worker.pool, "maintain_pool"):
            hub.call_repeatedly(LOOK_FOR_DEAD_CHILDREN_S, worker.pool.maintain_pool)

    def renew_soon(self) -> None:
        """Say at once that this worker lives: it has lost its broker, which hands its messages to others."""
        self._beat_due = 0.0
        self._wakes["upkeep"].set()

    def watch(self, duty: Duty) -> None:
        """Leave this duty, too, when who has it is stuck."""
        self._watched.append(duty)

    def drain(self) -> None:
        """The worker takes no more jobs; it is shown at once."""
        self._heartbeat.status = WorkerStatus.DRAINING
        self._beat_due = 0.0
        self._wakes["upkeep"].set()

    @property
    def is_draining(self) -> bool:
        """Whether it has ceased to take jobs."""
        return self._heartbeat.status is not None

    def _repeat(self, name: str, call: Callable[[], float]) -> None:
        is_silent = False
        while not self._stopping.is_set():
            wait_s = ROUND_S
            try:
                wait_s = call()
                is_silent = False
            except SQLAlchemyError as exc:
                if not is_silent:
                    logger.warning("%s: the job database does not answer: %s", name, exc)
                is_silent = True
                self._app.leases.interrupted()
                self._app.outage_at = time.monotonic()
            except OperationalError as exc:
                logger.warning("%s: the broker does not answer: %s", name, exc)
            except Exception:
                logger.exception("a round of the %s failed; the next one follows", name)
            self._wakes[name].wait(wait_s)
            self._wakes[name].clear()

    def round(self) -> float:
        """What this worker owes itself; seconds until the next round."""
        if time.monotonic() >= self._beat_due:
            self._beat_due = time.monotonic() + self._app.settings.lease_renew_s  # other threads may want it sooner
            try:
                self._heartbeat.beat()
                self._close_unclaimed()
            except BaseException:
                self._beat_due = 0.0
                raise
        self._notice_lost_time()
        self._stop_cancelled()
        self._notice_ends()
        self._keep_pauses()
        for duty in self._watched:
            duty.leave_if_stuck(self._app.settings.lease_timeout_s)
        return ROUND_S

    def reconcile(self) -> float:
        """Mend what disagrees, every LEASE_RENEW_S; seconds until the next round."""
        if time.monotonic() >= self._reconcile_due:
            self._reconcile_due = time.monotonic() + self._app.settings.lease_renew_s
            if self._reconciler.round(self._housework["reconciler"].duty.goes_on):
                self._wakes["dispatcher"].set()  # what was closed or lost is due now
        return ROUND_S

    def dispatch(self) -> float:
        """Publish what is due; seconds until the next round."""
        wait_s = self._dispatcher.round(self._housework["dispatcher"].duty.goes_on)
        if self._dispatcher.is_broker_away:
            self._housework["dispatcher"].duty.leave()
            return 2 * ROUND_S  # so that a worker which reaches the broker gets it
        return wait_s

    def _notice_lost_time(self) -> None:
        seen_at, self._seen_at = self._seen_at, now()
        if abs((self._seen_at - seen_at).total_seconds()) > self._app.settings.lease_timeout_s:
            self._app.leases.interrupted()  # the machine slept, or its clock was set: others are late, too

    def _stop_cancelled(self) -> None:
        """End the processes of jobs that were cancelled while they ran."""
        jobs = {job.id: job for job in request.running() if job.is_job}
        if not jobs:
            return
        for job_id in self._app.store.cancelled_of(jobs):
            self._soon(jobs[job_id].stop_cancelled, self._worker.pool)

    def _notice_ends(self) -> None:
        """A worker that stops leaves when its jobs have ended, also while the main thread, which hears that of the
        pool, waits for a broker that is away. What the database can't say now goes on running.
        """
        if request.stopping.is_set():
            jobs = [job for job in request.running() if job.is_job]
            rows = {row["job_id"]: row for row in self._app.store.jobs_by_id([job.id for job in jobs])}
            for job in jobs:
                if job.id in rows:
                    job.look_at(rows[job.id])

    def _close_unclaimed(self) -> None:
        """Close attempts of this worker that nothing runs: their processes died while the database was away."""
        held = self._app.store.held_by(self._app.worker_id, self._app.leases.mine)
        running = {job.id for job in request.running()} | set(request.reserved())
        unclaimed = {(row["job_id"], row["attempt"]): row for row in held if row["job_id"] not in running}
        for job_id, attempt in unclaimed.keys() & self._unclaimed:
            row = unclaimed[job_id, attempt]
            if (error := request.out_of_time.get(job_id)) is not None:
                close_out_of_time(self._app, row, error)
            else:
                close_attempt(self._app, row, "its process died, and nothing runs it any more")
            request.out_of_time.pop(job_id, None)
        self._unclaimed = set(unclaimed)

    def _keep_pauses(self) -> None:
        """Stop to take from queues that are paused, begin again with those that no longer are."""
        consumer = getattr(self._worker, "consumer", None)
        if consumer is None or getattr(consumer, "task_consumer", None) is None or self._heartbeat.status is not None:
            return
        paused = set(self._app.store.paused_queues())
        for queue in paused & set(self._app.amqp.queues.consume_from):
            logger.warning("the queue %s is paused", queue)
            self._heartbeat.paused.add(queue)
            self._soon(consumer.cancel_task_queue, queue)
        for queue in self._heartbeat.paused - paused:
            logger.warning("the queue %s is resumed", queue)
            self._heartbeat.paused.discard(queue)
            self._soon(consumer.add_task_queue, queue)

    def _soon(self, call: Callable[..., Any], *args: Any) -> None:
        """Call in the worker's event loop: pool and consumer belong to the main thread."""
        self._worker.consumer.call_soon(call, *args)
