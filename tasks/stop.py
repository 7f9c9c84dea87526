"""Graceful stop: a worker that is asked to end lets its jobs finish, and gives back what it can't.

In: SIGTERM, SIGINT, SIGQUIT or SIGHUP. Out: at once no more jobs are taken, and those that wait in this process go back
to the broker. Running jobs have SHUTDOWN_GRACE_S to finish; at its end, at a second signal, or at SIGQUIT, their
attempts end in their rows (`released`: no death is counted), they are published anew, and the processes that ran them
are ended. After SIGHUP alone a worker without a terminal starts anew, as Celery's does; with one it ends.

Stock Celery waits for ever at SIGTERM, ignores a second one, and leaves rows running at SIGQUIT.
"""

import atexit
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from celery import signals
from celery.platforms import EX_OK
from celery.worker import state
from celery.worker.control import control_command

from tasks import request
from tasks.descendants import kill_descendants

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.worker import MediaWorker

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.1
IDLE_LOOKS: Final = 3
# How long the main thread may take to leave by itself: it can't where it runs the job, or waits for the broker.
LEAVE_WITHIN_S: Final = 8.0
# One that hangs in the kernel, on a file server that is away, say, is left as it is.
CHILDREN_END_WITHIN_S: Final = 2.0


class GracefulStop:
    """One worker's way out.

    A signal handler may only write to a pipe: it interrupts the main thread anywhere, with any lock held. A thread
    reads the pipe and does the rest.
    """

    def __init__(self, worker: "MediaWorker") -> None:
        self._worker: Final = worker
        self._pid: Final = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._seen: Final[set[int]] = set()

    def start(self) -> None:
        """Listen: from here on no signal ends the worker before it has given back what it holds."""
        self.take_signals()
        atexit.register(self._start_anew)
        threading.Thread(target=self._run, name="stop", daemon=True).start()

    def take_signals(self) -> None:
        """Take the signals that Celery has handlers for, also after it has set them."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(signum, self._on_signal)
        is_unsupported = self._worker.app.IS_macOS and not self._worker._isatty  # Celery's handler says so
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and not is_unsupported:
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, signum: int, _frame: Any) -> None:
        if os.getpid() == self._pid:
            self._seen.add(signum)
            with suppress(BlockingIOError):
                os.write(self._write, bytes([signum]))

    def _run(self) -> None:
        """Wait for the first signal, drain, wait for the end, leave."""
        signum = self._signal_within(math.inf)
        grace_s = 0.0 if signum == signal.SIGQUIT else self._worker.app.settings.shutdown_grace_s
        told = f"have {grace_s:g} s to finish; a second signal gives them back" if grace_s else "are given back at once"
        logger.warning("%s: running jobs %s", signal.Signals(signum or signal.SIGTERM).name, told)
        if not self._has_begun:
            state.should_stop = EX_OK
            time.sleep(LEAVE_WITHIN_S)
            self._leave_anyhow()
        signals.worker_shutting_down.send(sender=self._worker.hostname, sig=signum, how="Warm", exitcode=EX_OK)
        request.stopping.set()
        self._worker.consumer.call_soon(self._drain)
        if self._is_idle_within(grace_s):
            state.should_stop = EX_OK
        else:
            for job in request.unfinished():
                logger.warning("%s[%s]: given back, since the worker stops", job.name, job.id)
                job.give_back("its worker was stopped")
            state.should_terminate = EX_OK
        time.sleep(LEAVE_WITHIN_S)
        self._leave_anyhow()

    @property
    def _has_begun(self) -> bool:
        """Whether the worker consumes."""
        return getattr(getattr(self._worker, "consumer", None), "task_consumer", None) is not None

    def _drain(self) -> None:
        """In the event loop: take no more jobs, and give back those that no process runs yet."""
        if hasattr(self._worker, "upkeep"):
            self._worker.upkeep.drain()
        consumer = self._worker.consumer
        with suppress(*consumer.connection_errors, *consumer.channel_errors):
            consumer.task_consumer.cancel()
        if getattr(self._worker, "semaphore", None) is not None:
            self._worker.semaphore.clear()
        for waiting in request.waiting():
            state.task_ready(waiting)
            waiting.reject(requeue=True)

    def _is_idle_within(self, seconds: float) -> bool:
        """Wait until nothing runs; False at the end of the grace or at another signal.

        A job that was just handed to a child shows after a moment: one look is not enough. An end is heard of from
        the pool, or read in the row (`Upkeep`): while the broker is away the main thread only waits for that.
        """
        deadline, idle_looks = time.monotonic() + seconds, 0
        while idle_looks < IDLE_LOOKS:
            if time.monotonic() > deadline and request.unfinished():
                return False
            if self._signal_within(LOOK_EVERY_S) is not None and request.unfinished():
                return False
            idle_looks = 0 if request.unfinished() else idle_looks + 1
        return True

    def _signal_within(self, seconds: float) -> int | None:
        timeout = None if seconds == math.inf else seconds
        readable, _, _ = select.select([self._read], [], [], timeout)
        return os.read(self._read, 1)[0] if readable else None

    def _leave_anyhow(self) -> None:
        """A job in this very process can't be ended, nor a wait for a broker; but no attempt runs any more."""
        logger.warning("the worker leaves without waiting for its main thread; no attempt of it runs any more")
        for step in ("broadcast", "upkeep"):
            with suppress(Exception):
                getattr(self._worker, step).stop(self._worker)
        self._start_anew()
        os._exit(EX_OK)

    def _start_anew(self) -> None:
        """At the end of a process that got no signal but SIGHUP: begin it again, under its pid, with its command line.

        Celery's own restart forgets what stood before the arguments, as `python -m celery` does.
        """
        if self._seen == {signal.SIGHUP} and not self._worker._isatty and os.getpid() == self._pid:
            for stream in (sys.__stdout__, sys.__stderr__):
                with suppress(AttributeError, OSError, ValueError):
                    stream.flush()  # type: ignore[union-attr]
            _end_children()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 (the same command, no shell)


def _end_children() -> None:
    """Kill what this process has started, and wait for it: what is executed in its place knows of no children."""
    deadline = time.monotonic() + CHILDREN_END_WITHIN_S
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            kill_descendants(os.getpid())
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
            time.sleep(LOOK_EVERY_S / 10)


def shield_child(app: "MediaTasks") -> None:
    """In a pool child: ignore SIGTERM while it runs a job, and SIGHUP. A service manager, or a terminal that is closed,
    sends them to all processes of a worker, and only the main one decides whether a job may finish; it ends a child
    with SIGKILL.
    """
    exit_now = signal.getsignal(signal.SIGTERM)

    def on_sigterm(signum: int, frame: Any) -> None:
        if app.current_worker_task is None and callable(exit_now):
            exit_now(signum, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGHUP, lambda *_: None)  # not SIG_IGN, which programs that a job starts would inherit


@control_command(visible=False)  # type: ignore[untyped-decorator, unused-ignore]
def shutdown(state: Any, msg: str = "", **_: Any) -> None:  # noqa: ARG001 (Celery's signature)
    """Flower's button and `app.control.shutdown()`: in Celery's own way the lease would go before the jobs end."""
    os.kill(os.getpid(), signal.SIGTERM)
