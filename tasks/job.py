"""The base task: its guard decides, by one atomic claim on the job's row, whether a message may run.

In: a delivered message, however often and however late. Out: one running attempt with a fencing token, or nothing: a
message of another publication, of a job that has ended, or of one that a living worker holds is acknowledged without
effect. Arguments are made absolute and checked where a job is submitted, and paths again where it runs.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, Final

from celery import Task
from celery.canvas import Signature
from celery.exceptions import Ignore

from db.records import Claim, Decision, NewJob
from tasks.arguments import Arguments, named
from tasks.errors import AttemptLost, InvalidArguments, MediaTasksError, TransientError, WorkerLost

logger = logging.getLogger(__name__)

_UNSAFE: Final = re.compile(r"[^\w.-]")
PROGRESS_INTERVAL_S: Final = 0.5
RETRY_FIRST_S: Final = 2.0
RETRY_LONGEST_S: Final = 600.0


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
    """

    abstract = True
    throws = (MediaTasksError,)  # logged as one line: what was wrong with a file is no bug that needs a traceback
    validate: Callable[..., Any] | None = None
    requires: tuple[str, ...] = ()
    extra: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Claim the job, run the body, and turn a transient error into a retry."""
        if self.request.called_directly or not self.app.is_recorded(self.name):
            return super().__call__(*args, **kwargs) if self.request.called_directly else self.run(*args, **kwargs)
        self._claim(args, kwargs)
        try:
            bound = self.arguments.bind_absolute(args, kwargs)
            return self.run(*bound.args, **bound.kwargs)
        except TransientError as exc:
            raise self.retry(exc=exc, countdown=retry_delay_s(self.request.retries)) from exc
        except AttemptLost as exc:
            logger.warning("%s[%s]: %s", self.name, self.request.id, exc)
            raise Ignore(str(exc)) from exc
        except Ignore as exc:
            if self._owns():  # it has neither replaced itself nor lost its job: nobody else ends the row
                self.backend.mark_as_revoked(self.request.id, f"ignored: {exc}", request=self.request)
            raise

    def progress(self, percent: float, stage: str | None = None) -> None:
        """Say how far the body is, 0-100. Written at most twice a second; the end is the completion's to write."""
        request = self.request
        if percent >= 100.0 or request.called_directly or not self.app.is_recorded(self.name):
            return
        at = time.monotonic()
        if at - (request.get("progress_at") or request.get("claimed_at") or 0.0) < PROGRESS_INTERVAL_S:
            return
        request.progress_at = at
        self.app.store.progress(request.id, request.attempt, percent=min(max(percent, 0.0), 100.0), stage=stage)

    def confirm(self) -> None:
        """The fencing check, to be called when an output is complete and before it becomes visible.

        Raises:
            AttemptLost: Another attempt has taken over, or the job was cancelled.
        """
        request = self.request
        if request.called_directly or not self.app.is_recorded(self.name):
            return
        if not self._owns():
            raise AttemptLost(f"attempt {request.attempt} no longer owns the job; its output is dropped")

    def _owns(self) -> bool:
        return bool(self.app.patiently(lambda: self.app.store.owns(self.request.id, self.request.attempt)))

    @property
    def token(self) -> str | None:
        """Names the temp files of this attempt, so that they can be found when it is dead; None outside of a job."""
        request = self.request
        attempt = request.get("attempt")
        return f"{_UNSAFE.sub('_', str(request.id))}.{attempt}" if attempt else None

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; the error that led to it is kept for the row."""
        self.request.retry_error = kwargs.get("exc") or (args[2] if len(args) > 2 else None)
        return super().retry(*args, **kwargs)

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Signature:
        """As Celery's, with relative paths made absolute here, where the job is put together."""
        kwargs = more[0] if more else options.pop("kwargs", None)
        args, kwargs = self.arguments.absolute(args or (), kwargs or {})
        return super().signature(args, kwargs, *more[1:], **options)

    subtask = signature

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

    def _claim(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Take the job for this attempt, or raise `Ignore`; its fencing token goes into the request."""
        request, settings = self.request, self.app.settings
        job = job_of_request(self, request, args, kwargs)
        claim: Claim = self.app.patiently(
            lambda: self.app.store.claim(
                job,
                publication=request.get("publication") or 1,
                worker_id=self.app.worker_id,
                is_redelivered=bool((request.delivery_info or {}).get("redelivered")),
                holder_timeout_s=settings.lease_timeout_s,
                max_deaths=settings.max_deaths,
            )
        )
        if claim.decision in (Decision.RUN, Decision.POISON):
            request.attempt = claim.attempt
            request.claimed_at = time.monotonic()
        if claim.decision is Decision.POISON:
            raise WorkerLost(
                f"{claim.deaths} workers died while running this job (MAX_DEATHS={settings.max_deaths}); "
                "look at its input, then replay it"
            )
        if claim.decision is Decision.COMPLETED and request.chord:
            self.backend.on_chord_part_return(request, "SUCCESS", None, is_again=True)
        if claim.decision is not Decision.RUN:
            held = f" by {claim.holder}" if claim.holder else ""
            logger.info("%s[%s] not run: %s%s", self.name, request.id, claim.decision.value, held)
            raise Ignore(claim.decision.value)


def job_of_request(task: Any, request: Any, args: Any, kwargs: Mapping[str, Any]) -> NewJob:
    """The row of a message that has none: what can be told from the message itself."""
    delivery = request.delivery_info or {}
    name = getattr(task, "name", None) or getattr(request, "task", None) or "unknown"
    return NewJob(
        job_id=request.id,
        task_type=name,
        queue=delivery.get("routing_key") or name,
        parameters=_parameters(task, args, kwargs),
        max_retries=getattr(task, "max_retries", None),
        retry_count=request.retries or 0,
        root_id=request.root_id,
        parent_id=request.parent_id,
        group_id=request.group,
        group_index=request.group_index,
        in_chord=bool(request.chord),
    )


def _parameters(task: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, or as they came, if they don't fit."""
    if isinstance(task, Job):
        with suppress(InvalidArguments):
            return named(task.arguments.bind(args, kwargs))
    return {"args": list(args), **kwargs}


def retry_delay_s(retries: int) -> float:
    """Exponential backoff 2, 4, 8 ... 600 s with a jitter of a quarter around it, so that it never comes at once."""
    return min(RETRY_FIRST_S * 2.0**retries, RETRY_LONGEST_S) * random.uniform(0.75, 1.25)  # noqa: S311 (no secret)
