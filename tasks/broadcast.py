"""What a worker says to others: two threads of its main process, which no job waits for.

In: the worker's state and the log. Out: its capability and the events of jobs, through a sink. One thread shows the
capability and asks no database; the other one relays the log, if this worker has that duty.
"""

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from celery import bootsteps
from celery.worker import state
from sqlalchemy.exc import SQLAlchemyError

from tasks import request
from tasks.duty import Duty
from tasks.heartbeat import slots
from tasks.relay import Relay

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

DUTY: Final = "relay"
LOOK_EVERY_S: Final = 0.4
SHORTEST_REST_S: Final = 0.005
AFTER_AN_ERROR_S: Final = 1.0
LAST_EVENTS_WITHIN_S: Final = 1.0


class Broadcast(bootsteps.StartStopStep):  # type: ignore[misc, unused-ignore]
    """Started after the pool has forked and the upkeep has begun, before the consumer; stopped before the upkeep."""

    requires = ("tasks.upkeep:Upkeep",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._app: Final[MediaTasks] = worker.app
        self._worker: Final = worker
        self._has_begun = False
        worker.broadcast = self

    def start(self, worker: Any) -> None:
        from tasks.sinks.mqtt import MqttSink  # now that the pool has forked: its children need no MQTT client

        self._stopping = threading.Event()
        self._look, self._poll = threading.Event(), threading.Event()
        self._sink = MqttSink(self._app.settings, self._app.worker_id, (self._look, self._poll))
        # A holder that is stopped (SIGSTOP) keeps its lock, and counts as dead only after a minute, since its jobs must
        # not run twice. Events may be told twice: the holder, when it goes on, finds before it reads on that the duty
        # has moved, and until it does the events wait in the table.
        duty = Duty(self._app, DUTY, passes_from_silent=True)
        self._relay = Relay(self._app, self._sink, duty)
        worker.upkeep.watch(duty)
        self._is_silent = False
        self._begin()
        self._sink.start()
        self._threads = [
            threading.Thread(target=self._show, name="capability", daemon=True),
            threading.Thread(target=self._tell, name="relay", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _begin(self) -> None:
        """Fix where the log is told from before the consumer, the last step to start, can claim a job.

        While the database is away nobody claims one, and the relay's first round does it.
        """
        try:
            self._relay.begin()
        except SQLAlchemyError as exc:
            logger.warning("events are told later: %s", exc)
            self._is_silent = True

    def stop(self, worker: Any) -> None:  # noqa: ARG002 (Celery's signature)
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._look.set()
        self._poll.set()
        for thread in self._threads:
            thread.join(timeout=2 * LAST_EVENTS_WITHIN_S)
        self._sink.stop()

    terminate = stop

    def _show(self) -> None:
        """Show the worker from when it consumes; what changes is seen within half a second."""
        while not self._stopping.is_set():
            self._look.clear()
            try:
                self._has_begun = self._has_begun or self._consumes()
                if self._has_begun:
                    self._show_now()
            except Exception:
                logger.exception("the worker's capability could not be shown; the next look follows")
            self._look.wait(LOOK_EVERY_S)

    def _show_now(self) -> None:
        """A worker that drains takes no job, however many of its slots are free.

        It does from when it is asked to stop: the event loop, which drains it, waits for the job in the pool solo.
        """
        is_draining = self._worker.upkeep.is_draining or request.stopping.is_set()
        idle_count = 0 if is_draining else max(slots(self._worker) - len(state.active_requests), 0)
        self._sink.show(sorted(self._app.amqp.queues.consume_from), idle_count, is_draining=is_draining)

    def _consumes(self) -> bool:
        return getattr(getattr(self._worker, "consumer", None), "task_consumer", None) is not None

    def _tell(self) -> None:
        """Relay, and at the end what was written until now."""
        while not self._stopping.is_set():
            try:
                self._go_round()
                continue
            except SQLAlchemyError as exc:
                if not self._is_silent:
                    logger.warning("events are told later: %s", exc)
                self._is_silent = True
            except Exception:
                logger.exception("a round of the relay failed; the next one follows")
            self._poll.wait(AFTER_AN_ERROR_S)
        self._tell_the_rest()

    def _go_round(self) -> None:
        """One round of the relay; while it is on duty, round after round on one connection to the database."""
        self._round()
        if self._relay.is_on_duty:
            with self._app.store.kept_connection():
                while self._relay.is_on_duty and not self._stopping.is_set():
                    self._round()

    def _round(self) -> None:
        self._poll.clear()
        began = time.monotonic()
        pause = self._relay.round()
        self._is_silent = False
        if pause.ends_early:
            self._poll.wait(pause.seconds)
        elif pause.seconds:
            # Costs a third of a wait that can be ended. Rounds keep their pace, however much there is to tell.
            time.sleep(max(began + pause.seconds - time.monotonic(), SHORTEST_REST_S))

    def _tell_the_rest(self) -> None:
        deadline = time.monotonic() + LAST_EVENTS_WITHIN_S
        try:
            self._relay.round()
            while self._sink.is_open and self._sink.unconfirmed and time.monotonic() < deadline:
                time.sleep(0.01)
            self._relay.leave()
        except SQLAlchemyError as exc:
            logger.warning("the last events are told by another worker: %s", exc)
