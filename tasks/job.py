"""The base task: its guard decides, by one atomic claim on the job's row, whether a message may run.

In: a delivered message, however often and however late. Out: one running attempt with a fencing token, or nothing: a
message of another publication, of a job that has ended, or of one that a living worker holds is acknowledged without
effect. Arguments are made absolute and checked where a job is submitted, and paths again where it runs.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery import Task
from celery.canvas import Signature, _chain, chord, group
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.states import READY_STATES

from db.records import Claim, Closed, Decision, Event, Holder, Liveness, NewJob, Row, Status
from tasks import remedy
from tasks.arguments import Arguments, named
from tasks.errors import (
    AttemptLost,
    InvalidArguments,
    JobTimeout,
    MediaTasksError,
    OutOfMemory,
    PermanentError,
    WorkerLost,
)
from tasks.leases import LOOK_EVERY_S, Watch
from tasks.leftovers import remove_temp_files, remove_temp_files_of_row, token_of
from tasks.rows import job_of_request, parameters_of, request_of_row

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.results import JobBackend

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S: Final = 0.5
# A database that takes longer than this to answer has kept a job from its work.
OUTAGE_S: Final = 1.0

NO_ANSWER: Final = "the database did not answer"
# One attempt whose time went by in an outage says nothing of its job; a third one in a row does: it hangs.
SPARED_AT_MOST: Final = 2
_ENDS_ATTEMPT: Final = frozenset(
    {Event.RETRY, Event.REPLACED, Event.RELEASED, Event.LOST, Event.COMPLETED, Event.FAILED, Event.CANCELLED}
)

follows_up: Final[ContextVar[bool]] = ContextVar("follows_up", default=False)
"""Whether what is submitted follows from the end of another job, and so may be submitted twice."""


class Job(Task):
    """A task whose every change stands in the job table.

    Declare one with `@app.task`; its name is its queue and its capability. Annotate path arguments as `InputPath` and
    `OutputPath`. A second delivery of a message does not run the body twice; after a crash the body runs again from its
    beginning, so it must publish its outputs atomically, after `confirm()`.

    Attributes:
        validate: Called with the arguments where a job is submitted, to refuse what is cheap to refuse; it raises
            `InvalidArguments`.
        requires: Modules that the body imports; a worker without them does not serve this capability.
        extra: The extra of this distribution that installs them, for the message.
        retry_on_timeout: Whether a time limit is an error that may pass.
        seconds_per_megabyte: Added to `soft_time_limit` and `time_limit` for each megabyte of the inputs.
    """

    app: "MediaTasks"
    backend: "JobBackend"
    abstract = True
    typing = (
        False  # Celery's check counts `self`, does not say what a task takes, and fails the job before it in a chain
    )
    throws = (MediaTasksError,)  # logged as one line: what was wrong with a file is no bug that needs a traceback
    validate: Callable[..., Any] | None = None
    requires: tuple[str, ...] = ()
    extra: str = ""
    retry_on_timeout: bool = False
    seconds_per_megabyte: float = 0.0
    Request = "tasks.request:JobRequest"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Claim the job, run the body, and tell Celery what becomes of its errors: of a transient one a retry."""
        if self.request.called_directly:
            return super().__call__(*args, **kwargs)
        if not self._has_row:
            return self.run(*args, **kwargs)
        self._claim(args, kwargs)
        try:
            return self._call_body(args, kwargs)
        except Exception as exc:
            verdict = self._verdict(exc)
            if verdict is exc:
                raise
            raise verdict from exc

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's: the job runs in this process, now. Should that be killed, the job fails with `WorkerLost`: who
        called has died with it, and no message could run it again.
        """
        if not self.app.is_recorded(self.name):
            return super().apply(*args, **kwargs)
        with self.app.leases.of_eager_run():
            return super().apply(*args, **kwargs)

    def _call_body(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run it with absolute paths; while it runs, a soft time limit has somebody to interrupt."""
        bound = self.arguments.bind_absolute(args, kwargs)
        self.request.is_in_body = True
        try:
            result = self.run(*bound.args, **bound.kwargs)
        finally:
            self.request.is_in_body = False
        if self.request.chain or self.request.callbacks:
            self.confirm()  # Celery sends what follows before the completion is written
        return result

    def _verdict(self, exc: Exception) -> Any:
        """What Celery is told of an error of the body: the error itself or another one, a retry, or `Ignore` where the
        row has moved on.
        """
        match exc:
            case AttemptLost():
                logger.warning("%s[%s]: %s", self.name, self.request.id, exc)
                return Ignore(str(exc))
            case Ignore():
                if self._owns():  # it has neither replaced itself nor lost its job: nobody else ends the row
                    self.backend.mark_as_revoked(self.request.id, f"ignored: {exc}", request=self.request)
                return exc
            case Reject():
                reason = f"rejected: {exc.reason}"
                return self._given_back(reason) if exc.requeue else PermanentError(reason)
            case Retry():
                if self.request.is_eager or not self._owns():  # it is queued again
                    return exc
                return PermanentError(f"{self.name} raised Retry of its own; use raise self.retry(exc=...)")
            case SoftTimeLimitExceeded():
                if self._waited_s > OUTAGE_S and self._is_spared():
                    return self._given_back(NO_ANSWER)
                error = JobTimeout(self.timeout_message("soft", self._limits()[0]))
                return self._retried(error) if self.retry_on_timeout else error
            case MemoryError():  # Celery's main process would take it for its own
                return OutOfMemory(f"{self.name} ran out of memory; give it a smaller input, or the worker more")
        return self._retried(exc) if remedy.is_transient(exc) else exc

    @property
    def _waited_s(self) -> float:
        """How much of its time this attempt has spent in waiting for its claim, and since then for the job database."""
        request = self.request
        waited_s: float = request.claimed_at - request.asked_at + self.app.waited_s - request.waited_before_s
        return waited_s

    def _is_spared(self) -> bool:
        return self.app.patiently(lambda: is_spared(self.app, self.request.id))

    def _retried(self, exc: Exception) -> Any:
        """The retry that is on its way; the error itself after the last one, where a server wants to be left alone for
        too long, or in an eager run, which has no later.
        """
        if self.request.is_eager:
            return exc
        delay_s = remedy.delay_s(exc, self.request.retries)
        if delay_s > remedy.SERVER_LONGEST_S:
            told = "%s[%s] is not tried again: the server asks for %.0f s, and no retry waits for more than %.0f s"
            logger.warning(told, self.name, self.request.id, delay_s, remedy.SERVER_LONGEST_S)
            return exc
        return self.retry(exc=exc, countdown=delay_s, throw=False)

    def _given_back(self, reason: str) -> Any:
        """The attempt ends without fault of the job, which is queued again; an eager run has nobody to be given to."""
        request, close = self.request, self.app.store.close
        if request.is_eager:
            return PermanentError(reason)
        self.app.patiently(
            lambda: close(request.id, request.attempt, event=Event.RELEASED, reason=reason, is_death=False)
        )
        return Ignore("it was given back")

    def progress(self, percent: float, stage: str | None = None) -> None:
        """Say how far the body is, 0-100. Written at most twice a second; the end is the completion's to write.

        Raises:
            AttemptLost: The job was cancelled, or another attempt has taken over.
        """
        if percent < 100.0:
            self._tell(percent, stage, since=self.request.get("claimed_at"))

    def update_state(self, task_id: Any = None, state: Any = None, meta: Any = None, **options: Any) -> None:
        """As Celery's. `meta={"progress": 40, "stage": "encode"}` of this job is written as by `progress`, but the
        first one at once: it may be the only one. What is no number is left out.

        Raises:
            AttemptLost: As `progress`.
        """
        is_own = task_id in (None, self.request.id) and state not in READY_STATES
        if not (is_own and isinstance(meta, Mapping) and "progress" in meta):
            super().update_state(task_id, state, meta, **options)
            return
        try:
            percent = float(meta["progress"])
        except (TypeError, ValueError):
            return
        stage = meta.get("stage")
        self._tell(percent, None if stage is None else str(stage))

    def _tell(self, percent: float, stage: str | None, *, since: float | None = None) -> None:
        """Write it, unless the last one, or `since`, is too near. What the database doesn't take, the next one says."""
        request, at = self.request, time.monotonic()
        last_at = request.get("progress_at") or since
        if not self._has_row or (last_at is not None and at - last_at < PROGRESS_INTERVAL_S):
            return
        request.progress_at = at
        from db.errors import DatabaseUnavailable  # a producer loads no SQLAlchemy

        with suppress(DatabaseUnavailable):
            percent = min(max(0.0, percent), 100.0)  # in this order a NaN is 0
            if not self.app.store.progress(request.id, request.attempt, percent=percent, stage=stage):
                raise AttemptLost(f"attempt {request.attempt} no longer owns the job; it stops here")

    def confirm(self) -> None:
        """The fencing check, to be called when an output is complete and before it becomes visible.

        Raises:
            AttemptLost: Another attempt has taken over, or the job was cancelled.
        """
        if self._has_row and not self._owns():
            raise AttemptLost(f"attempt {self.request.attempt} no longer owns the job; its output is dropped")

    @property
    def _has_row(self) -> bool:
        """Whether a message is run: a plain call of the function has no row, nor has a task that is not recorded."""
        return not self.request.called_directly and self.app.is_recorded(self.name)

    def _owns(self) -> bool:
        return self.app.patiently(lambda: self.app.store.owns(self.request.id, self.request.attempt))

    def limits(self, parameters: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The soft and the hard time limit, seconds: those of the task, and more for larger inputs."""
        more_s = (
            self.seconds_per_megabyte * self.arguments.input_megabytes(parameters) if self.seconds_per_megabyte else 0
        )
        soft, hard = self.soft_time_limit, self.time_limit
        return (soft + more_s if soft else None), (hard + more_s if hard else None)

    def _limits(self) -> tuple[float | None, float | None]:
        """Those in force now: the message's own, else the task's."""
        hard, soft = self.request.timelimit or (None, None)
        own = self.limits(parameters_of(self, self.request.args or (), self.request.kwargs or {}))
        return soft or own[0], hard or own[1]

    def timeout_message(self, kind: str, limit_s: float | None) -> str:
        """What a job says that ran for too long."""
        name = "soft_time_limit" if kind == "soft" else "time_limit"
        return (
            f"{self.name} ran longer than its {kind} time limit of {limit_s or 0:g} s; give it a smaller input, "
            f"or more time: apply_async(..., {name}=...)"
        )

    @property
    def token(self) -> str | None:
        """Names the temp files of this attempt, so that they can be found when it is dead; None outside of a job."""
        request = self.request
        attempt = request.get("attempt")
        return token_of(request.id, attempt) if attempt else None

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; the error that led to it is kept for the row."""
        self.request.retry_error = kwargs.get("exc") or (args[2] if len(args) > 2 else None)
        return super().retry(*args, **kwargs)

    def replace(self, sig: Signature) -> Any:
        """As Celery's, with another task. In the place of a canvas nobody would hold the row while its steps run.

        Raises:
            InvalidArguments: With a chain, a group or a chord.
        """
        if isinstance(sig, (_chain, group, chord)) and self.app.is_recorded(self.name):
            raise InvalidArguments(
                f"{self.name} can't be replaced by a {type(sig).__name__.lstrip('_')}; submit that by itself and "
                "return its id, or replace it by one task"
            )
        return super().replace(sig)

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Signature:
        """As Celery's, with relative paths made absolute here, where the job is put together."""
        kwargs = more[0] if more else options.pop("kwargs", None)
        args, kwargs = self.arguments.absolute(args or (), kwargs or {})
        return super().signature(args, kwargs, *more[1:], **options)

    subtask = signature

    def _get_exec_options(self) -> dict[str, Any]:
        """As Celery's, without the task's own time limits, which grow: a message carries its caller's only."""
        options = super()._get_exec_options()
        return {name: value for name, value in options.items() if name not in ("time_limit", "soft_time_limit")}

    @cached_property
    def arguments(self) -> Arguments:
        """What this task takes, as its body declares it."""
        return Arguments(self.name, self.run)

    def checked(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, once all is refused that can be seen to be wrong without opening anything.

        Raises:
            InvalidArguments: Unknown, missing, contradictory or out of range.
        """
        parameters = named(self.arguments.bind(args, kwargs))
        if self.validate is not None:
            self.validate(**parameters)
        return parameters

    # The guard

    def _eager_publication(self) -> int:
        """The publication under which `apply()` runs a job in the caller's process, where no message says it: that of
        its row, if it has one. A retry is such a run inside of the attempt that asks for it, which is ended here.
        """
        store, request = self.app.store, self.request
        row = store.job(request.id)
        if row is None:
            return 1
        mine = (Status.RUNNING, self.app.leases.eager, self.app.worker_id)
        is_own = (row["status"], row["lease"], row["claimed_by"]) == mine
        if is_own and request.retries:
            store.requeue(request.id, attempt=row["attempt"], event=Event.RETRY, retry_count=request.retries)
        return int(row["publication"]) + (is_own and bool(request.retries))

    def _unknown_job(self, args: Any, kwargs: Mapping[str, Any]) -> NewJob:
        """The row of a message that has none: another client's. One of ours that is so old has outlived its job, which
        ended, and was removed.
        """
        sent_at, days = self.request.get("published_at"), self.app.settings.retention_days
        if isinstance(sent_at, (int, float)) and time.time() - sent_at > days * 86400:
            reason = f"its row is gone, and its message is older than RETENTION_DAYS={days:g}; submit it anew"
            logger.warning("%s[%s] not run: %s", self.name, self.request.id, reason)
            raise Ignore(reason)
        return job_of_request(self, self.request, args, kwargs)

    def _claim(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Take the job for this attempt; its fencing token goes into the request.

        Raises:
            Ignore: The message is to have no effect; or a soft time limit struck before the body began, and the attempt
                was given back.
            WorkerLost: The job was running on too many workers that died.
            Reject: A soft time limit struck while this waited for the database: the job has not begun.
        """
        self.request.asked_at = time.monotonic()
        try:
            claim = self._asked(args, kwargs)
            if claim.decision in (Decision.RUN, Decision.POISON):
                self._begin(claim, args, kwargs)
            else:
                self._pass_by(claim)
        except SoftTimeLimitExceeded as exc:
            if self.request.get("attempt"):
                raise self._given_back("its soft time limit struck before its body began") from exc
            raise Reject(str(exc), requeue=True) from exc

    def _asked(self, args: Any, kwargs: Mapping[str, Any]) -> Claim:
        """What the row says to this message. A job whose holder's lock can't be seen from here stays with it, and is
        the reconciler's; but one that the broker has lost is watched until it has renewed its lease, or should have.
        """
        app, delivery = self.app, self.request.delivery_info or {}
        if not (delivery.get("redelivered") and app.settings.broker_kind.is_redelivery_a_loss):
            return self._ask(args, kwargs, app.leases.judge)
        watch = Watch(app.leases, renew_s=app.settings.lease_renew_s)
        while (claim := self._ask(args, kwargs, watch.judge)).decision is Decision.UNCERTAIN:
            time.sleep(LOOK_EVERY_S)
        return claim

    def _ask(self, args: Any, kwargs: Mapping[str, Any], judge: Callable[[Holder], Liveness]) -> Claim:
        """Claim the row, however long the database takes."""
        request, app = self.request, self.app
        asked_at = time.monotonic()

        def judge_now(holder: Holder) -> Liveness:
            if time.monotonic() - asked_at > OUTAGE_S:  # the holder had to wait for the database as well
                app.leases.interrupted()
            return judge(holder)

        return app.patiently(
            lambda: app.store.claim(
                request.id,
                unknown=lambda: self._unknown_job(args, kwargs),
                publication=self._eager_publication() if request.is_eager else request.get("publication") or 1,
                worker_id=app.worker_id,
                lease=app.leases.eager if request.is_eager else app.lease,
                judge=judge_now,
                max_deaths=app.settings.max_deaths,
            )
        )

    def _begin(self, claim: Claim, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.request.attempt = claim.attempt
        self.request.claimed_at, self.request.waited_before_s = time.monotonic(), self.app.waited_s
        if claim.attempt > 1:  # whoever closed an earlier one may not have been able to clean up after it
            remove_temp_files(self, (args, kwargs), self.request.id, up_to=claim.attempt - 1)
        if claim.decision is Decision.POISON:
            raise poisoned(claim.deaths, self.app.settings.max_deaths)

    def _pass_by(self, claim: Claim) -> NoReturn:
        request, decision = self.request, claim.decision
        if decision is Decision.COMPLETED and request.chord:  # whoever completed it may have died before it told that
            self.backend.on_chord_part_return(request, "SUCCESS", None, is_again=True)
            self.app.store.settle(request.id)
        held = f" by {claim.holder}" if claim.holder else ""
        logger.info("%s[%s] not run: %s%s", self.name, request.id, decision.value, held)
        raise Ignore(decision.value)


def poisoned(deaths: int, max_deaths: int) -> WorkerLost:
    """The error of a job that was running whenever its workers died."""
    return WorkerLost(
        f"{deaths} workers died while running this job (MAX_DEATHS={max_deaths}); look at its input, then replay it"
    )


def is_spared(app: "MediaTasks", job_id: str) -> bool:
    """Whether an attempt whose time goes by in an outage of the job database is given back, instead of failing the job.

    A body that hangs does so too while the database comes and goes: after SPARED_AT_MOST such attempts in a row the
    limit holds.
    """
    ends = [log["message"] for log in app.store.logs(job_id) if log["event_type"] in _ENDS_ATTEMPT]
    return ends[-SPARED_AT_MOST:] != [NO_ANSWER] * SPARED_AT_MOST


def close_out_of_time(app: "MediaTasks", row: Row, error: JobTimeout) -> None:
    """End the attempt that a row stands at: its process was killed at its time limit, in an outage that let nobody say
    so. The job is given back, or fails with `error` if it was spared too often.
    """
    if is_spared(app, row["job_id"]):
        close_attempt(app, row, NO_ANSWER, is_death=False)
    else:
        _fail_attempt(app, row, error)


def close_eager(app: "MediaTasks", row: Row) -> None:
    """End the attempt that a row stands at, which a process ran by `apply()` that has died: the job fails."""
    _fail_attempt(app, row, WorkerLost("the process that ran it by apply() died; replay it, or call it again"))


def _fail_attempt(app: "MediaTasks", row: Row, error: Exception) -> None:
    """Fail the job of an attempt whose process is gone, unless that attempt runs no more."""
    remove_temp_files_of_row(app, row)
    request = request_of_row(row)
    request.attempt = row["attempt"]
    app.backend.mark_as_failure(row["job_id"], error, request=request)


def close_attempt(app: "MediaTasks", row: Row, reason: str, *, is_death: bool = True) -> Closed | None:
    """End the attempt that a row stands at, since its process is gone, or is about to be: its temp files are removed,
    and the job rests until it is published anew; after one death too many it fails.

    None, and nothing of the row is changed, if that attempt runs no more: so a second call does no harm. A process that
    dies in between leaves a job that rests, and that the next claim fails.
    """
    event = Event.LOST if is_death else Event.RELEASED
    closed = app.store.close(row["job_id"], row["attempt"], event=event, reason=reason, is_death=is_death)
    remove_temp_files_of_row(app, row)
    max_deaths = app.settings.max_deaths
    if closed is not None and is_death and closed.deaths >= max_deaths:
        error = poisoned(closed.deaths, max_deaths)
        logger.error("%s[%s]: %s", row["task_type"], row["job_id"], error)
        app.backend.mark_as_failure(row["job_id"], error, request=request_of_row(row, publication=closed.publication))
    return closed
