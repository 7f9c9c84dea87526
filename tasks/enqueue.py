"""Enqueue: the row first, then the broker.

In: a call of `send_task` (from `.delay()`, a retry, a chain, a chord, or by name). Out: a queued row with what is
needed to publish it again, and one message that carries the row's publication. If the publish fails, the row is failed
before the error reaches the caller, so that a caller who tries again gets one job.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from celery.utils.time import maybe_iso8601

from db.records import NewJob, Publication, Status, now
from tasks import capabilities
from tasks.errors import InvalidArguments, PermanentError, UnknownQueue, UnknownTask
from tasks.job import Job
from tasks.results import describe, unsent

PRIORITY_DEFAULT: Final = 5
PRIORITIES: Final = range(1, 11)
_NOT_KEPT: Final = (
    "producer",
    "publisher",
    "connection",
    "router",
    "result_cls",
    "task_type",
    "add_to_parent",
    "headers",
)


def send(app: Any, publish: Callable[..., Any], name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Write the row, then call `publish` (Celery's own `send_task`) with its publication in the headers.

    A job id that is known already is not sent again, unless its job has failed or was cancelled (then it is replayed)
    or this is its own retry. Within a worker (the next step of a chain, say) nothing is raised for a job that can't
    work: it fails, with what depends on it, and not the job that submits it.

    Raises:
        UnknownTask, UnknownQueue: Nobody can run it; nothing was written.
        InvalidArguments: The arguments can't work; nothing was written.
    """
    task = options.get("task_type") or app.tasks.get(name)
    current = app.current_worker_task
    args, kwargs = list(args or ()), dict(kwargs or {})
    task_id = options["task_id"] = options.get("task_id") or app.new_id()
    if expires_at := _moment(options.get("expires")):
        options["expires"] = expires_at.isoformat()
    job = None
    if current is not None and current.request.id == task_id:
        if not options.get("routing_key"):  # it replaces itself; a retry goes back to its own queue
            options["queue"] = _queue_of(app, task, name, options.get("queue"))
        publication = _requeue(app, current.request, name, options)
    else:
        try:
            if current is None and isinstance(task, Job):
                args, kwargs = task.arguments.absolute(args, kwargs)
            options["queue"] = _queue_of(app, task, name, options.get("queue"))
            job = _new_job(task, name, args, kwargs, options, current)
        except PermanentError as exc:
            if current is None:
                raise
            app.backend.mark_as_failure(task_id, exc, request=unsent(name, args, kwargs, options))
            return app.AsyncResult(task_id)
        publication = _enqueue(app, job, is_patient=current is not None)
    if publication is None:
        return app.AsyncResult(task_id)
    options["headers"] = {**(options.get("headers") or {}), "publication": publication.number}
    # For the worker, which cancels it. Celery would give the message a time to live as well: it would vanish unsaid.
    options["headers"]["expires"] = options.get("expires")
    options["expires"] = None
    options["priority"] = app.wire_priority(publication.priority)
    try:
        return publish(name, args, kwargs, **options)
    except Exception as exc:
        if job is not None:
            app.store.end(job, Status.FAILED, describe(exc), publication=publication.number)
        raise


def _enqueue(app: Any, job: NewJob, *, is_patient: bool) -> Publication | None:
    """A job of a producer, which is told of a database that doesn't answer; or one of a worker: a step of a chain, say,
    whose predecessor has succeeded and must not fail for it. A worker may send one twice, so it replays none.
    """
    publication: Publication | None
    if is_patient:
        publication = app.patiently(lambda: app.store.enqueue(job))
    else:
        publication = app.store.enqueue(job) or app.store.replay(job.job_id)
    return publication


def _requeue(app: Any, request: Any, name: str, options: Mapping[str, Any]) -> Publication | None:
    """A retry, or a job that replaces itself: the running attempt ends; its row, with the error, is queued under the
    next publication.
    """
    error = request.get("retry_error")
    result: Publication | None = app.patiently(
        lambda: app.store.requeue(
            request.id,
            attempt=request.attempt,
            event="retry" if name == request.task else "replaced",
            retry_count=options.get("retries") or 0,
            run_after_utc=_due(options),
            failure=describe(error) if error is not None else None,
        )
    )
    return result


def _new_job(
    task: Any, name: str, args: list[Any], kwargs: dict[str, Any], options: Mapping[str, Any], parent: Any
) -> NewJob:
    request = parent.request if parent is not None else None
    return NewJob(
        job_id=options["task_id"],
        task_type=name,
        queue=options["queue"],
        parameters=task.checked(args, kwargs) if isinstance(task, Job) else {"args": args, **kwargs},
        priority=_priority(name, options.get("priority")),
        max_retries=getattr(task, "max_retries", None),
        retry_count=options.get("retries") or 0,
        run_after_utc=_due(options),
        expires_at=_moment(options.get("expires")),
        root_id=options.get("root_id") or (request and (request.root_id or request.id)) or options["task_id"],
        parent_id=options.get("parent_id") or (request and request.id),
        group_id=options.get("group_id"),
        group_index=options.get("group_index"),
        in_chord=options.get("chord") is not None,
        message={
            "args": args,
            "kwargs": kwargs,
            "options": {key: value for key, value in options.items() if key not in _NOT_KEPT and value is not None},
        },
    )


def _queue_of(app: Any, task: Any, name: str, queue: Any) -> str:
    """The queue to publish to: the task's own name, unless the caller names one that is known."""
    queue = getattr(queue, "name", queue) or getattr(task, "queue", None) or name
    if name == queue and name in app.tasks:
        return str(queue)
    declared = set(capabilities.names(app))
    served = {served for worker in app.live_workers() for served in worker["capabilities"]}
    known = declared | served | {queue.name for queue in app.conf.task_queues or ()}
    if name not in declared and name not in served and queue not in served:
        raise UnknownTask(f"no worker serves {name}{capabilities.nearest(name, known)}")
    if queue not in known:
        raise UnknownQueue(f"no worker serves the queue {queue}{capabilities.nearest(queue, known)}")
    return str(queue)


def _priority(name: str, priority: Any) -> int:
    if priority is None:
        return PRIORITY_DEFAULT
    if not isinstance(priority, int) or priority not in PRIORITIES:
        raise InvalidArguments(f"{name}: priority={priority!r} must be a whole number from 1 to 10 (10 runs first)")
    return priority


def _due(options: Mapping[str, Any]) -> datetime | None:
    return _moment(options.get("eta") or options.get("countdown"))


def _moment(value: Any) -> datetime | None:
    """A time in UTC from what Celery takes for one: seconds from now, ISO text, or a datetime."""
    if not value:
        return None
    if isinstance(value, (int, float)):
        return now() + timedelta(seconds=value)
    moment: datetime = maybe_iso8601(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=now().tzinfo)
