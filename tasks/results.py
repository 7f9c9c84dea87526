"""The result backend is the job table: completion is one write, by the pool child, before the message is acknowledged.

In: what Celery's tracer says of a task (`mark_as_*`). Out: rows in their terminal state, chord bodies published once,
and task meta for `AsyncResult`. A write of an attempt that has lost its job changes nothing; nothing follows from it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from celery import states
from celery.app.task import Context
from celery.backends.base import BaseBackend
from celery.canvas import _chain, chord, group, maybe_signature
from celery.exceptions import ChordError, SoftTimeLimitExceeded, TaskRevokedError, TimeoutError  # noqa: A004 (Celery's own name)

from db.records import UNFENCED, Fence, NewJob, Row, Status
from tasks.errors import ResultsNotRead
from tasks.job import follows_up
from tasks.remedy import is_transient
from tasks.rows import STATES, describe, exception_of, job_of_request, meta_of, request_of_row, require_json, unsent

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

POLL_S: Final = 0.05
UNKNOWN_AFTER_S: Final = 3.0
"""So long a job may have no row before whoever waits for it is told: a transaction may be about to commit it."""


class JobBackend(BaseBackend):
    """Celery's result backend on the job table."""

    app: "MediaTasks"
    supports_native_join = True
    supports_autoexpire = True
    persistent = True

    # Written by the tracer

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Complete the row, also with `ignore_result`; then count it in its chord."""
        attempt = _attempt(request)
        require_json(result)
        if attempt is not None and not self.app.in_the_end(lambda: self.app.store.complete(task_id, attempt, result)):
            logger.warning("%s: attempt %d lost its job before it was done", task_id, attempt)
            return
        if request and request.chord:
            self.on_chord_part_return(request, state, result)
            self.app.patiently(lambda: self.app.store.settle(task_id))

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Fail the row; then its chord, the rest of its chain, and its errbacks, unless the write came too late."""
        self._finish(task_id, exc, Status.FAILED, request, traceback, call_errbacks)

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Cancel the row: revoked or expired before it ran, or terminated while it ran; then what waits for it."""
        self._finish(task_id, TaskRevokedError(reason or "revoked"), Status.CANCELLED, request)

    def tell(self, row: Row) -> None:
        """Tell chord, chain and errbacks of the end of a job whose process died before it had told them all.

        They may hear of it twice: rows and chords take no notice, an errback is called again. What no later call could
        tell either, as the job's message is damaged, is left untold.
        """
        try:
            self._tell_again(row)
        except Exception as exc:
            if is_transient(exc):
                raise
            logger.exception("%s: what waits for its end can't be told of it", row["job_id"])
        self.app.store.settle(row["job_id"])

    def _tell_again(self, row: Row) -> None:
        request, status = request_of_row(row), Status(row["status"])
        if status is Status.COMPLETED:
            self.on_chord_part_return(request, states.SUCCESS, None, is_again=True)
        else:
            exc = exception_of(row)
            # Celery's part would report it to its chord as news. One that has counted it, and whose body nobody has
            # failed since, takes notice of a repetition only, which follows.
            chord_of_it, request.chord = request.chord, None
            self._pass_on(row["job_id"], exc, status, request)
            if chord_of_it:
                request.chord = chord_of_it
                self.on_chord_part_return(request, STATES[status], exc, is_again=True)

    def _finish(
        self, task_id: str, exc: Any, status: Status, request: Any, traceback: Any = None, call_errbacks: bool = True
    ) -> None:
        """End the row, tell what waits for it, and note that this has been told; nothing, if the end comes too late."""
        if self._end(task_id, exc, status, traceback, request):
            self._pass_on(task_id, exc, status, request, traceback, call_errbacks)
            if request and (request.chord or request.chain or request.errbacks):
                self.app.patiently(lambda: self.app.store.settle(task_id))

    def _pass_on(
        self, task_id: str, exc: Any, status: Status, request: Any, traceback: Any = None, call_errbacks: bool = True
    ) -> None:
        """Celery's part: the chord, the rest of the chain, the errbacks of a failure. It is to store results whatever
        the task does with its own, since the steps of the chain have rows to end.
        """
        options = {"call_errbacks": call_errbacks and status is Status.FAILED, "state": STATES[status]}
        if request and isinstance(request.chain, (list, tuple)):
            request.chain = _with_parents(request.chain, self.app, request.root_id or request.id, request.id)
        with _following_up():
            super().mark_as_failure(task_id, exc, traceback, request, store_result=True, **options)

    def mark_as_retry(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the row was queued again before the retry was published."""

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """End the row where `update_state` or the canvas says so; its progress is the task's own to write."""
        if state == states.SUCCESS:
            self.mark_as_done(task_id, result, request)
        elif state in states.READY_STATES:
            status = Status.CANCELLED if state == states.REVOKED else Status.FAILED
            self._end(task_id, result, status, traceback, request)
        return result

    def _end(self, task_id: str, exc: Any, status: Status, traceback: Any, request: Any) -> bool:
        """Write it; False if it came too late, or there is no such row: a group's, say, whose members have rows."""
        name = getattr(request, "task", None)
        if name is not None and not self.app.is_recorded(name):
            return True
        failure, fence = describe(exc, traceback), _fence(request)
        unknown = None if request is None else partial(_job, self.app, task_id, request)
        was_sent = bool(request and request.delivery_info and not request.get("is_unsent"))
        return self.app.in_the_end(
            lambda: self.app.store.end(task_id, status, failure, fence=fence, unknown=unknown, was_sent=was_sent)
        )

    # Read by AsyncResult

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        self._require_database()
        return meta_of(task_id, self.app.store.job(task_id))

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = POLL_S,
        no_ack: bool = True,
        on_interval: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Poll the row every 50 ms until the job has ended. One warning says that no job has this id so far.

        Raises:
            celery.exceptions.TimeoutError: It has not ended within `timeout` seconds; the message says how far it is.
        """
        self._ensure_not_eager()
        self._require_database()
        look_at = time.monotonic() + UNKNOWN_AFTER_S
        for _ in _polls(timeout, on_interval):
            meta: dict[str, Any] = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
            if time.monotonic() >= look_at:
                look_at = math.inf
                if self._is_unknown(task_id):
                    logger.warning("no job has the id %s here yet; still waiting", task_id)
        raise TimeoutError(self._unfinished(task_id, timeout or 0))

    def get_many(
        self,
        task_ids: Any,
        timeout: float | None = None,
        interval: float = POLL_S,
        no_ack: bool = True,
        on_message: Callable[[dict[str, Any]], None] | None = None,
        on_interval: Callable[[], None] | None = None,
        **_: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (task id, meta) of each job as it ends; one query a poll for all that are still missing."""
        self._require_database()
        missing = {task_id if isinstance(task_id, str) else task_id.id for task_id in task_ids}
        for _poll in _polls(timeout, on_interval):
            for row in self.app.store.jobs_by_id(sorted(missing)):
                if not Status(row["status"]).is_terminal:
                    continue
                meta = meta_of(row["job_id"], row)
                if on_message is not None:
                    on_message(meta)
                missing.discard(row["job_id"])
                yield row["job_id"], meta
            if not missing:
                return
        several = f"{len(missing)} jobs have not ended in time; one of them: " if len(missing) > 1 else ""
        raise TimeoutError(several + self._unfinished(min(missing), timeout or 0))

    def _unfinished(self, job_id: str, waited_s: float) -> str:
        """What is known of a job that somebody has waited for in vain."""
        if (row := self.app.store.job(job_id)) is not None:
            said = f"{row['task_type']} is {row['status']} after {waited_s:g} s"
            return f"{job_id}: {said}; celery -A tasks jobs explain {job_id} says why"
        said = "no job has this id here" if self._is_unknown(job_id) else "the job before it has not ended"
        return f"{job_id}: {said}"

    def _is_unknown(self, job_id: str) -> bool:
        """Whether there is no such job, nor one that it follows: a step of a chain gets its row when it is sent."""
        return self.app.store.job(job_id) is None and not self.app.store.unfinished_that_name(job_id)

    def _require_database(self) -> None:
        if self.app.is_without_database:
            raise ResultsNotRead(
                "ENQUEUE=broker: this producer has no job database, so it can read no results; set ENQUEUE=strict and "
                "DATABASE_URL, or ask a process that has them"
            )

    def _forget(self, task_id: str) -> None:
        """The row stays: it is the record of the job, not only its result."""

    # Groups and chords

    def _save_group(self, group_id: str, result: Any) -> Any:
        self._require_database()
        self.app.store.save_group(group_id, result.as_tuple())
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        from celery.result import result_from_tuple

        members = self.app.store.group(group_id)
        return {"result": result_from_tuple(members, self.app)} if members else None

    def _delete_group(self, group_id: str) -> None:
        self.app.store.forget_group(group_id)

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Note how many members a chord has. A producer without the database can't: the body says it as well."""
        if not self.app.is_without_database:
            self.app.store.set_chord_size(group_id, chord_size)

    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> None:
        """Nothing to set up: members are counted by their rows, so no `chord_unlock` polls."""
        self.ensure_chords_allowed()

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, *, is_again: bool = False, **kwargs: Any
    ) -> None:
        """Count the members that have ended; the one call that finds the last publishes the body, once.

        A second delivery of a member (`is_again`) may mean that a process died before it published the body: it is
        published again, and as its ids were fixed when the chord was put together, that makes no second job.
        """
        body = maybe_signature(request.chord, app=self.app)
        size = body.get("chord_size") or body.options.get("chord_size")
        parts = self.app.patiently(lambda: self.app.store.chord_parts(request.group, size))
        if parts.results is not None:
            self._begin_body(body, parts.results, request)
        elif parts.is_mine or (is_again and parts.is_failed):
            self._fail_body(body, self._reason(request, state, result), request, is_news=parts.is_mine)

    def _begin_body(self, body: Any, results: Sequence[Any], member: Any) -> None:
        """Submit the body of a chord with its members' results; one that can't be submitted fails. A second time it
        changes nothing, as its id is fixed.
        """
        try:
            with _following_up():
                body.delay(list(results))
        except SoftTimeLimitExceeded:
            raise
        except Exception as exc:
            if is_transient(exc):
                raise
            self._fail_body(body, exc, member, is_news=False)

    def _reason(self, request: Any, state: str, result: Any) -> ChordError:
        """Why a chord fails: the error of the member that failed, whichever member's end has brought it to light."""
        if (failed := self.app.patiently(lambda: self.app.store.failed_member(request.group))) is not None:
            error = ChordError(f"member {failed['job_id']} of the chord {failed['status']}: {failed['error_message']}")
            error.__cause__ = exception_of(failed)
            return error
        return ChordError(f"member {request.id} of the chord {state.lower()}: {result}")

    def _fail_body(self, body: Any, error: Exception, member: Any, *, is_news: bool) -> None:
        """End all jobs of the body, as those behind the member that has brought it to light; then Celery's part."""
        parent_id = member.id
        for request in _unsent_jobs(body, self.app, member.id):
            request.chord, request.root_id, parent_id = None, member.root_id, request.id
            is_news = self._end(request.id, error, Status.FAILED, None, request) or is_news
        if not is_news:
            return
        if chain := body.options.get("chain"):
            body.options["chain"] = _with_parents(chain, self.app, member.root_id, parent_id)
        try:
            raise error  # Celery reads it from the stack, and only a worker's pool child has one
        except Exception:
            self.chord_error_from_stack(body, error)

    def _fail_chain(self, chain: Any, exc: Any, *args: Any, state: str = states.FAILURE, **kwargs: Any) -> None:
        """As Celery's, which ends the steps behind a failed one by their own ids. Nobody waits for that of a group or a
        chord: the jobs in them, which are never sent now, are ended in its place.
        """
        for step in chain if isinstance(chain, (list, tuple)) else ():
            if isinstance(maybe_signature(step, app=self.app), (group, chord)):
                for request in _unsent_jobs(step, self.app, step["options"].get("parent_id")):
                    request.root_id = step["options"].get("root_id")
                    if state == states.REVOKED:
                        self.mark_as_revoked(request.id, str(exc), request=request)
                    else:
                        self.mark_as_failure(request.id, exc, request=request)
        super()._fail_chain(chain, exc, *args, state=state, **kwargs)


@contextmanager
def _following_up() -> Iterator[None]:
    """What is submitted in this block follows from the end of a job."""
    token = follows_up.set(True)
    try:
        yield
    finally:
        follows_up.reset(token)


def _with_parents(chain: Sequence[Any], app: "MediaTasks", root_id: str, parent_id: str) -> list[Any]:
    """The steps behind a job, the next one last, as if they had been sent: each names its root and its parent."""
    steps = []
    for step in reversed(chain):
        signature = maybe_signature(step, app=app, clone=True)
        signature.options.update(root_id=root_id, parent_id=parent_id)
        steps.append(signature)
        parent_id = [parent_id, *(job_id for job_id, _, _ in _jobs_of(signature, app, parent_id))][-1]
    return steps[::-1]


def _unsent_jobs(signature: Any, app: "MediaTasks", parent_id: str | None = None) -> Iterator[Context]:
    """The requests of the jobs of a canvas that is never sent: a group's members, a chord's body, all steps of a chain.
    The headers of chords are left out: nobody waits for them. Nothing follows from the end of such a job but the chord
    that it is a member of.
    """
    for task_id, task, parent in _jobs_of(maybe_signature(signature, app=app), app, parent_id):
        options = {**task.options, "task_id": task_id, "parent_id": parent, "chain": None, "link_error": None}
        yield unsent(task.task, task.args, task.kwargs, options)


def _jobs_of(
    signature: Any, app: "MediaTasks", parent_id: str | None, own_id: str | None = None
) -> Iterator[tuple[str, Any, str | None]]:
    """Each job with its id and its parent's. `own_id` is that of a last step or a body which has none by itself."""
    if isinstance(signature, group):
        for member in signature.tasks:
            yield from _jobs_of(maybe_signature(member, app=app), app, parent_id)
    elif isinstance(signature, chord):  # its own id is that of its header
        yield from _jobs_of(maybe_signature(signature.body, app=app), app, parent_id, signature.id or own_id)
    elif isinstance(signature, _chain):
        *steps, last = (maybe_signature(step, app=app) for step in signature.tasks)
        for step in steps:
            if isinstance(step, group):  # the header of a chord with the next step as its body
                continue
            for job in _jobs_of(step, app, parent_id):
                yield job
                parent_id = job[0]
        yield from _jobs_of(last, app, parent_id, signature.id or own_id)
    elif task_id := signature.id or own_id:
        yield task_id, signature, parent_id


def _job(app: "MediaTasks", task_id: str, request: Any) -> NewJob:
    """The row of a job that ends without one."""
    request.id = request.id or task_id
    task = app.tasks.get(getattr(request, "task", None) or "")
    return job_of_request(task or request, request, request.args or (), request.kwargs or {})


def _fence(request: Any) -> Fence:
    """What a request may end: its attempt; or, before one began, its message's job, and what that runs if it is to be
    terminated. A request of no message may end whatever there is.
    """
    if request is None:
        return UNFENCED
    if (attempt := _attempt(request)) is not None:
        return Fence(attempt=attempt)
    return Fence(publication=request.get("publication"), may_run=bool(request.get("is_terminated")))


def _attempt(request: Any) -> int | None:
    return request.get("attempt") if request else None


def _polls(timeout_s: float | None, on_interval: Callable[[], None] | None) -> Iterator[None]:
    """Yield at once and then every 50 ms, until the time is over."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        yield
        if on_interval is not None:
            on_interval()
        left_s = POLL_S if deadline is None else deadline - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(POLL_S, left_s))
