"""A message in a worker's main process: what becomes of its job when the pool child that ran it is gone.

In: what the pool says of a child: it died, was terminated, ran into its hard time limit. Out: the attempt is closed in
its row, which is published anew, and the message is settled. What the database can't take now is left to the upkeep,
which finds running rows of this worker that nothing runs.
"""

import logging
import os
import threading
import time
from contextlib import suppress
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any, Final

from billiard.common import TERM_SIGNAME
from billiard.exceptions import Terminated, TimeLimitExceeded
from celery.concurrency.base import BasePool
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError, WorkerLostError
from celery.worker import state
from celery.worker.request import Request
from sqlalchemy.exc import SQLAlchemyError

from db.records import Closed, Event, Row, Status, now
from tasks import remedy
from tasks.descendants import kill_descendants
from tasks.errors import JobTimeout
from tasks.guard import NO_ANSWER, OUTAGE_S, close_attempt, is_spared
from tasks.job import Job
from tasks.leftovers import remove_temp_files
from tasks.rows import describe

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

_GONE: Final = (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt)
out_of_time: Final[dict[str, JobTimeout]] = {}
"""Jobs whose processes were ended at their time limit, and what they fail with unless they are spared: the database did
not answer, so that nothing could be said of them at once.
"""

processed: Final = {Status.COMPLETED: 0, Status.FAILED: 0}
"""How many jobs of this process have ended, for its heartbeat."""

stopping: Final = threading.Event()
"""Set when this worker begins no more jobs."""


class JobRequest(Request):  # type: ignore[misc, unused-ignore]
    """Celery's request, which knows the job's row."""

    @property
    def is_job(self) -> bool:
        """Whether a row stands behind it: Celery's own tasks and those of another kind have none."""
        return isinstance(self.task, Job) and self.app.is_recorded(self.name)

    app: "MediaTasks"
    time_limits: tuple[float | None, float | None]
    is_given_back = False
    has_ended = False
    """Whether its row has been seen to say so; the pool's own word may wait for the broker."""
    _already_revoked: bool
    _outcome: Status | None = Status.COMPLETED

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_job:
            self._context.publication = self._publication  # another client's message carries none
        hard, soft = self.time_limits  # the message's; the task's own may grow with the input
        if self.is_job and self.task.seconds_per_megabyte and not (hard and soft):
            own_soft, own_hard = self.task.limits(self.task.arguments.by_name(*self._payload[:2]))
            self.time_limits = (hard or own_hard, soft or own_soft)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """The pool begins it. A pool of this very process (threads, solo) may have queued it before the worker was
        asked to stop: only here can it be kept from running.

        Raises:
            TaskRevokedError: The worker stops: the message goes back, and the body is not run.
        """
        if stopping.is_set() and pid == os.getpid():
            state.task_ready(self)
            self.reject(requeue=True)
            raise TaskRevokedError("its worker stops")
        super().on_accepted(pid, time_accepted)

    def acknowledge(self) -> None:
        if not self.acknowledged and self._outcome is not None:
            processed[self._outcome] += 1
        super().acknowledge()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """The job failed, in the child or with it. The attempt of a child that died is closed: its job is queued again,
        or fails after one death too many.
        """
        exc = getattr(exc_info.exception, "exc", exc_info.exception)
        self._outcome = None if isinstance(exc, (Retry, Ignore, Reject)) else Status.FAILED
        if self.is_job and isinstance(exc, TimeLimitExceeded):
            self._end_at_hard_limit(exc.args[0])
            return None
        if not (self.is_job and isinstance(exc, _GONE)):
            return super().on_failure(exc_info, send_failed_event, return_ok)
        if isinstance(exc, Terminated):
            self.app.patiently(self._remove_temp_files)
            return super().on_failure(exc_info, send_failed_event, return_ok)
        state.task_ready(self)
        with suppress(SQLAlchemyError):  # else whoever closes the attempt does it
            self._remove_temp_files()
        if not (self._already_revoked or self._already_cancelled or self.is_given_back):
            self._end_lost()
        return None

    def _end_lost(self) -> None:
        """Its process died: the attempt is closed, and the message settled."""
        closed = self._close("its process died")
        if closed is not None and closed.deaths >= self.app.settings.max_deaths:
            self.acknowledge()
        else:
            logger.warning("%s[%s]: its process died; it runs again", self.name, self.id)
            self.reject(requeue=closed is None)  # closed, it is published anew: this message may be settled already

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The hard limit: the child is killed; the job fails, or is tried again where its task says so."""
        if soft or not self.is_job:
            super().on_timeout(soft, timeout)
            return
        self._end_at_hard_limit(timeout)

    def _end_at_hard_limit(self, limit_s: float) -> None:
        """Kill the child, then fail the job, or queue its retry. The pool says it twice, as a failure and as a timeout:
        the second time nothing is done.

        The pool itself would kill the child only after this, when it may have opened another temp file.
        """
        if self._already_revoked:
            return
        self._already_revoked = True  # what the pool says of the killed child is no news either
        state.task_ready(self)
        self._kill_what_it_started()
        self._outcome = None
        error = JobTimeout(self.task.timeout_message("hard", limit_s))
        had_its_time = self._had_its_time(limit_s)
        self._kill_child()
        if not had_its_time and self._spare(error):
            return
        self.app.patiently(self._remove_temp_files)
        logger.error("%s[%s]: %s", self.name, self.id, error)
        if not (self.task.retry_on_timeout and self._retry(error)):
            self._outcome = Status.FAILED
            self._fail(error)
        self.acknowledge()

    def _had_its_time(self, limit_s: float) -> bool:
        """Whether the body had the time of its limit, or may have spent it in waiting for the job database.

        The child waits for the same database as this process: one write tells of an outage that goes on, and upkeep has
        seen one that is over. While the write waits the child's own may come first, and with it the job's end.
        """
        asked_at = time.monotonic()
        try:
            self.app.leases.renew()
            row = self.app.store.job(self.id)
            was_away = self.app.outage_at > asked_at - limit_s or time.monotonic() - asked_at > OUTAGE_S
            if row is None or row["publication"] != self._publication:
                return True
            is_waiting = row["status"] == Status.QUEUED
            began_late = bool(row["started_at"]) and (now() - row["started_at"]).total_seconds() < limit_s - OUTAGE_S
            return not (is_waiting or began_late or was_away)
        except SQLAlchemyError:
            return False

    def _spare(self, error: JobTimeout) -> bool:
        """Give the job back, at once or, as long as the database does not answer, by the upkeep; False if it was spared
        too often, and is to end with `error`.
        """
        closed = None
        try:
            row = self._own_row()
            if row is not None and row["status"] != Status.QUEUED:  # else it has not begun
                if not is_spared(self.app, self.id):
                    return False
                closed = close_attempt(self.app, row, NO_ANSWER, is_death=False)
        except SQLAlchemyError as exc:
            logger.warning("%s[%s] is closed later: %s", self.name, self.id, exc)
        logger.warning("%s[%s]: its time went by while the job database did not answer", self.name, self.id)
        if closed is None:
            out_of_time[self.id] = error
        self.reject(requeue=closed is None)
        return True

    def _fail(self, error: JobTimeout) -> None:
        """Fail the job, unless it is no longer this message's and this worker's."""
        row = self.app.patiently(self._own_row)
        if row is not None:
            self._context.attempt = row["attempt"]
            self.task.backend.mark_as_failure(self.id, error, request=self._context)

    def give_back(self, reason: str) -> None:
        """The worker stops: the attempt ends without fault of the job, which goes to another worker at once."""
        self.is_given_back = True
        self._kill_what_it_started()
        if self.is_job:
            self._close(reason, is_death=False)
        self._kill_child()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End the process that runs it, and what that has started.

        Not by SIGTERM, which a pool child only sees between two calls into C.
        """
        self._context.is_terminated = True
        if not _has_processes(pool):  # it runs to its end, for nothing
            self._announce_revoked("terminated", True, signal, False)
            return
        self._outcome = None
        self._kill_what_it_started()
        super().terminate(pool, "SIGKILL" if signal in (None, SIGTERM, "TERM", TERM_SIGNAME) else signal)

    def revoked(self) -> Any:
        """Whether Celery's list of revoked ids has it. A later publication may be that of a job which was replayed
        after its revoke, and is taken from the list: whether the job is cancelled its row says.
        """
        if self.is_job and self._publication > 1:
            state.revoked.discard(self.id)
        return super().revoked()

    def look_at(self, row: Row) -> None:
        """Note whether there is anything left to wait for: not if its job has ended, waits for another message, or runs
        elsewhere. A job that is queued under this message waits for the guard, in its process.
        """
        status = Status(row["status"])
        is_elsewhere = status is not Status.QUEUED and row["lease"] != self.app.lease
        self.has_ended = status.is_terminal or row["publication"] != self._publication or is_elsewhere

    def stop_cancelled(self, pool: Any) -> None:
        """Its row is cancelled: end the process that runs it. Pools without processes let it run, for nothing."""
        if _has_processes(pool) and self in state.active_requests and not self._already_revoked:
            logger.warning("%s[%s]: cancelled; its process %s is ended", self.name, self.id, self.worker_pid)
            self.terminate(pool)

    def _kill_what_it_started(self) -> None:
        if self.worker_pid and self.worker_pid != os.getpid():
            kill_descendants(self.worker_pid)

    def _kill_child(self) -> None:
        if self.worker_pid and self.worker_pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(self.worker_pid, SIGKILL)

    def _remove_temp_files(self) -> None:
        """Those of the attempt that it had, and of earlier ones. Another worker may have taken the job over: what that
        one writes is its own.
        """
        row = self.app.store.job(self.id)
        if row is not None:
            last = row["attempt"] if self._is_own(row) else row["attempt"] - 1
            remove_temp_files(self.task, self._payload[:2], self.id, up_to=last)

    def _close(self, reason: str, *, is_death: bool = True) -> Closed | None:
        """End the attempt; None if it is no longer this worker's, or if the database leaves that to the upkeep."""
        try:
            row = self._own_row()
            return None if row is None else close_attempt(self.app, row, reason, is_death=is_death)
        except SQLAlchemyError as exc:
            logger.warning("%s[%s] is closed later: %s", self.name, self.id, exc)
            return None

    def _own_row(self) -> Row | None:
        """The job's row, if it is this message's and this worker's."""
        row = self.app.store.job(self.id)
        return row if row is not None and self._is_own(row) else None

    def _is_own(self, row: Row) -> bool:
        return (row["lease"], row["publication"]) == (self.app.lease, self._publication)

    def _retry(self, error: JobTimeout) -> bool:
        """Queue the job for its next attempt, if it has one."""
        retries = self._context.retries or 0
        if self.task.max_retries is not None and retries >= self.task.max_retries:
            return False
        return self.app.patiently(lambda: self._requeue(error, retries))

    def _requeue(self, error: JobTimeout, retries: int) -> bool:
        row = self._own_row()
        if row is None:
            return False
        requeued = self.app.store.requeue(
            self.id,
            attempt=row["attempt"],
            event=Event.RETRY,
            retry_count=retries + 1,
            delay_s=remedy.delay_s(error, retries),
            failure=describe(error),
        )
        return requeued is not None

    @property
    def _publication(self) -> int:
        return int(self._request_dict.get("publication") or 1)


def _has_processes(pool: Any) -> bool:
    """Whether a job of this pool can be ended. The pools threads and solo inherit the method, which raises there."""
    return getattr(pool.terminate_job, "__func__", None) is not BasePool.terminate_job


def running() -> list[JobRequest]:
    """The requests that this worker's pool runs now."""
    return [request for request in _snapshot(state.active_requests) if isinstance(request, JobRequest)]


def unfinished() -> list[JobRequest]:
    """Those of `running` whose jobs have not been seen to end."""
    return [job for job in running() if not job.has_ended]


def reserved() -> list[str]:
    """The ids of jobs that this worker has and does not run yet."""
    return [request.id for request in waiting()]


def waiting() -> list[Any]:
    """The requests that this worker has reserved and does not run yet, those of Celery's own tasks among them."""
    known = {*_snapshot(state.reserved_requests), *_snapshot(state.scheduled_requests)}
    return list(known - {*_snapshot(state.active_requests)})


def _snapshot(requests: Any) -> tuple[Any, ...]:
    """The members of a set that the main thread goes on changing."""
    while True:
        with suppress(RuntimeError):
            return tuple(requests)
