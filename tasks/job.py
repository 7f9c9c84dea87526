"""The base task: what a body is given, and what becomes of its errors.

In: an attempt, which the guard has claimed. Out: its body's result or error, or what Celery is told in its place: a
retry, or that the job has moved on. Arguments are made absolute and checked where a job is submitted, and paths again
where it runs.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from celery import Task
from celery.canvas import Signature, _chain, chord, group
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.states import READY_STATES

from tasks import guard, remedy
from tasks.arguments import Arguments, named
from tasks.errors import (
    AttemptLost,
    InvalidArguments,
    JobTimeout,
    MediaTasksError,
    OutOfMemory,
    PermanentError,
)
from tasks.leftovers import token_of
from tasks.rows import parameters_of, require_json

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.results import JobBackend

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S: Final = 0.5

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
        guard.claim(self, args, kwargs)
        try:
            return self._call_body(args, kwargs)
        except BaseException as exc:
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
        if self.request.chain or self.request.callbacks:  # Celery sends what follows before the completion is written
            require_json(result)
            self.confirm()
        return result

    def _verdict(self, exc: BaseException) -> Any:
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
                return guard.given_back(self, reason) if exc.requeue else PermanentError(reason)
            case Retry():
                if self.request.is_eager or not self._owns():  # it is queued again
                    return exc
                return PermanentError(f"{self.name} raised Retry of its own; use raise self.retry(exc=...)")
            case SoftTimeLimitExceeded():
                if self._waited_s > guard.OUTAGE_S and self._is_spared():
                    return guard.given_back(self, guard.NO_ANSWER)
                error = JobTimeout(self.timeout_message("soft", self._limits()[0]))
                return self._retried(error) if self.retry_on_timeout else error
            case MemoryError():  # Celery's main process would take it for its own
                return OutOfMemory(f"{self.name} ran out of memory; give it a smaller input, or the worker more")
            case Exception():
                return self._retried(exc) if remedy.is_transient(exc) else exc
        if self.request.is_eager:  # who called is asked to end
            return exc
        return PermanentError(f"{self.name} raised {exc!r}, which is to end a process; look at its input, or mend it")

    @property
    def _waited_s(self) -> float:
        """How much of its time this attempt has spent in waiting for its claim, and since then for the job database."""
        request = self.request
        waited_s: float = request.claimed_at - request.asked_at + self.app.waited_s - request.waited_before_s
        return waited_s

    def _is_spared(self) -> bool:
        return self.app.patiently(lambda: guard.is_spared(self.app, self.request.id))

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
