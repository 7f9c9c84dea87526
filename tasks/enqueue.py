"""Enqueue: the row first, then the broker.

In: a call of `send_task` (from `.delay()`, a retry, a chain, a chord, or by name). Out: a queued row with what is
needed to publish it again, and one message that carries the row's publication; or, for what is due later and with
ENQUEUE=outbox, a row that rests until a worker's dispatcher publishes it. If a strict publish fails, the row is failed
before the error reaches the caller, so that a caller who tries again gets one job.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from celery import Celery
from celery.canvas import maybe_signature
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.functional import maybe_list
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps
from kombu.utils.url import maybe_sanitize_url

from db.records import Event, Fence, NewJob, Publication, Sequel, Status, now
from tasks import capabilities
from tasks.broker.errors import BrokerError
from tasks.errors import InvalidArguments, PermanentError, UnknownQueue, UnknownTask
from tasks.job import Job, follows_up
from tasks.options import check_options, due, expiry, refused
from tasks.rows import PRIORITIES, PRIORITY_DEFAULT, describe, json_fault, parameters_of, unsent
from tasks.values import LONGEST_NAME, LONGEST_S, is_name, moment_of

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

T = TypeVar("T")
logger = logging.getLogger(__name__)

_NOT_KEPT: Final = (
    "producer",
    "publisher",
    "connection",
    "router",
    "result_cls",
    "task_type",
    "add_to_parent",
)
_SEND_TASK: Final = inspect.signature(Celery.send_task)
_UNBOUND: Final = (None,) * 4  # self, name, args, kwargs
_OWN_HEADERS: Final = ("publication", "published_at", "expires")


class BrokerAway(OperationalError):
    """The broker does not answer; the message names it, without its password."""


def send(app: "MediaTasks", name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
    """Write the row, then publish its message, or leave that to a dispatcher.

    A job id that is known already is not sent again, unless its job has failed or was cancelled (then it is replayed)
    or this is its own retry. Within a worker (the next step of a chain, say) nothing is raised for a job that can't
    work: it fails, with what depends on it, and not the job that submits it.

    Raises:
        UnknownTask, UnknownQueue: Nobody can run it; nothing was written.
        InvalidArguments: The arguments can't work; nothing was written.
        OperationalError: The broker did not take it; its row has failed. Not within a worker, where it rests.
        SoftTimeLimitExceeded: It struck the body that submits this job, which is queued all the same.
    """
    task = options.get("task_type") or app.tasks.get(name)
    current = app.current_worker_task
    is_patient = current is not None or follows_up.get()
    if isinstance(args, (str, bytes, Mapping)):
        raise refused(name, "args", args, "a list or a tuple of arguments")
    args, kwargs = list(args or ()), dict(kwargs or {})
    task_id = options["task_id"] = options.get("task_id") or app.new_id()
    publication: Publication | None
    if current is not None and current.request.id == task_id:
        if not options.get("routing_key"):  # it replaces itself; a retry goes back to its own queue
            options["queue"] = _queue_of(app, task, name, options.get("queue"))
        options["expires"] = moment_of(current.request.expires)  # row and message go on saying the same
        publication = _requeue(app, current.request, name, args, kwargs, options)
    else:
        try:
            job = new_job(app, task, name, args, kwargs, options)
        except PermanentError as exc:
            if not is_patient:
                raise
            app.backend.mark_as_failure(task_id, exc, request=unsent(name, args, kwargs, options))
            return app.AsyncResult(task_id)
        args, kwargs = job.message["args"], job.message["kwargs"]
        task_id, publication = _enqueue(app, job, is_patient=is_patient)
    if publication is not None and not publication.is_resting:
        _publish(app, name, args, kwargs, options, publication, is_patient=is_patient)
    return app.AsyncResult(task_id)


def by_name(positional: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call of `send_task`; Celery's also takes them by their place, behind the arguments.

    Raises:
        TypeError: There are too many, or one is given twice.
    """
    if not positional:
        return options
    bound = dict(_SEND_TASK.bind(*_UNBOUND, *positional, **options).arguments)
    more: dict[str, Any] = bound.pop("options", {})
    return dict(list(bound.items())[len(_UNBOUND) :]) | more


def prepared(app: "MediaTasks", name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of a job without a row, checked as those of others are, with absolute paths; `options` get its
    queue, and its priority as the broker has it.

    Raises:
        InvalidArguments: The arguments can't work, or the options need a row.
    """
    if options.get("unique_key") is not None or options.get("unique_for") is not None:
        raise InvalidArguments(f"{name}: unique jobs need the job table: ENQUEUE=strict or outbox, and MIRROR=on")
    options["queue"] = options.get("queue") or name
    current = app.current_worker_task
    is_own = current is not None and current.request.id == options.get("task_id")
    is_retry = is_own and options.get("retries")  # which has the priority of its message
    if isinstance(options.get("priority"), int) and not is_retry:
        options["priority"] = app.wire_priority(options["priority"])
    if (task := app.tasks.get(name)) is not None and current is None:
        args, kwargs = task.arguments.absolute(args or (), kwargs or {})
        if app.settings.mirror:
            for check in (check_options, due, expiry):
                check(name, options)
            task.checked(args, kwargs)
    return args, kwargs


def new_job(
    app: "MediaTasks", task: Any, name: str, args: list[Any], kwargs: dict[str, Any], options: dict[str, Any]
) -> NewJob:
    """The row of a job as it is submitted, checked; `options` gets what follows from it.

    Raises:
        UnknownTask, UnknownQueue, InvalidArguments: As `send`.
    """
    check_options(name, options)
    parent = app.current_worker_task
    request = parent.request if parent is not None else None
    if parent is None and isinstance(task, Job):
        args, kwargs = task.arguments.absolute(args, kwargs)
    options["queue"] = _queue_of(app, task, name, options.get("queue"))
    if fault := json_fault([args, kwargs]):
        raise InvalidArguments(f"{name}: an argument is no JSON: {fault}")
    unique_key, unique_until = _uniqueness(name, args, kwargs, options)
    run_after_utc, delay_s = due(name, options)
    if options.get("link"):
        options["link"] = [_with_id(step, app) for step in maybe_list(options["link"])]
    expires_at = options["expires"] = expiry(name, options)  # row and message say the same
    has_sequel = any(options.get(what) for what in ("chain", "chord", "link_error"))
    return NewJob(
        job_id=options["task_id"],
        task_type=name,
        queue=options["queue"],
        parameters=task.checked(args, kwargs) if isinstance(task, Job) else {"args": args, **kwargs},
        priority=_priority(name, options.get("priority")),
        max_retries=getattr(task, "max_retries", None),
        retry_count=options.get("retries") or 0,
        run_after_utc=run_after_utc,
        delay_s=delay_s,
        expires_at=expires_at,
        root_id=options.get("root_id") or (request and (request.root_id or request.id)) or options["task_id"],
        parent_id=options.get("parent_id") or (request and request.id),
        group_id=options.get("group_id"),
        group_index=options.get("group_index"),
        in_chord=options.get("chord") is not None,
        sequel=Sequel.PENDING if has_sequel else None,
        unique_key=unique_key,
        unique_until=unique_until,
        message={"args": args, "kwargs": kwargs, "options": _kept(options)},
    )


def _with_id(step: Any, app: "MediaTasks") -> Any:
    """A callback that keeps its id: an attempt that dies between sending it and its own end sends it again."""
    step = maybe_signature(step, app=app, clone=True)
    step.freeze(step.options.get("task_id"))
    return step


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to publish the message again."""
    kept = {key: value for key, value in options.items() if key not in _NOT_KEPT and value is not None}
    if headers := kept.pop("headers", None):
        kept["headers"] = {key: value for key, value in headers.items() if key not in _OWN_HEADERS}
    return kept


def _enqueue(app: "MediaTasks", job: NewJob, *, is_patient: bool) -> tuple[str, Publication | None]:
    """A job of a producer, which is told of a database that doesn't answer; or one of a worker: a step of a chain, say,
    whose predecessor has succeeded and must not fail for it. A worker may send one twice, so it replays only what has
    failed without ever being sent: a step that failed with its predecessor, which was replayed.
    """
    store = app.store
    is_told = follows_up.get() and app.current_worker_task is None  # no pool child: the dispatcher sends it
    is_resting = is_told or app.settings.enqueue == "outbox" or job.is_due_later

    def enqueued() -> tuple[str, Publication | None]:
        job_id, publication = job.job_id, None
        if job.unique_key is not None:
            job_id, publication = store.enqueue_unique(job, is_resting=is_resting)
        else:
            publication = store.enqueue(job, is_resting=is_resting)
        if publication is None and job_id == job.job_id:  # it is known, and may have failed
            publication = store.replay(job_id, job=job, is_resting=is_resting, only_unsent=is_patient)
        return job_id, publication

    if not is_patient:
        return _twice(app, enqueued)
    return app.patiently(enqueued) if _interrupts_body(app, job.job_id) else app.in_the_end(enqueued)


def _twice(app: "MediaTasks", call: Callable[[], T]) -> T:
    """Call, and again if a server's answer was lost: the row may be written, and a caller who is told of an error will
    submit a second job. The second call finds it.
    """
    from db.errors import DatabaseUnavailable

    try:
        return call()
    except DatabaseUnavailable:
        if app.store.database.is_sqlite:
            raise
    return call()


def _requeue(
    app: "MediaTasks", request: Any, name: str, args: list[Any], kwargs: dict[str, Any], options: Mapping[str, Any]
) -> Publication | None:
    """A retry, or a job that replaces itself: the running attempt ends; its row, with the error, is queued under the
    next publication, and keeps what is to run then.
    """
    error = request.get("retry_error")
    run_after_utc, delay_s = due(name, options)
    return app.in_the_end(
        lambda: app.store.requeue(
            request.id,
            attempt=request.attempt,
            event=Event.RETRY if name == request.task else Event.REPLACED,
            retry_count=options.get("retries") or 0,
            run_after_utc=run_after_utc,
            delay_s=delay_s,
            failure=describe(error) if error is not None else None,
            changed=_changed(app, request, name, args, kwargs, options),
        )
    )


def _changed(
    app: "MediaTasks", request: Any, name: str, args: list[Any], kwargs: dict[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The columns of a row that a retry or a replacement changes: none, if it runs as before."""
    before = (request.task, list(request.args or ()), dict(request.kwargs or {}))
    queue = options.get("queue") or request.delivery_info.get("routing_key")
    if before == (name, args, kwargs) and queue == request.delivery_info.get("routing_key"):
        return {}
    return {
        "task_type": name,
        "queue": queue or name,
        "parameters": parameters_of(app.tasks.get(name), args, kwargs),
        "message": {"args": args, "kwargs": kwargs, "options": _kept(options)},
    }


def _publish(
    app: "MediaTasks",
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    options: dict[str, Any],
    publication: Publication,
    *,
    is_patient: bool,
) -> None:
    """Send the message of a row. If that fails, a producer is told, and its job failed. A worker's job rests: it is the
    dispatcher who sends it when the broker takes it, or fails it if none would.

    Raises:
        SoftTimeLimitExceeded: It struck the body that submits the job, which rests.
    """
    expires_at = options.pop("expires", None)
    task_id = options["task_id"]
    try:
        app.publish(
            name,
            args,
            kwargs,
            publication=publication.number,
            priority=publication.priority,
            has_begun=publication.has_begun,
            expires=expires_at.isoformat() if expires_at is not None else None,
            options=options,
        )
    except Exception as exc:
        if not is_patient:
            error = as_broker_away(exc, app.settings.broker_url)
            fence = Fence(publication=publication.number, may_run=True)  # it may have been sent all the same
            app.store.end(task_id, Status.FAILED, describe(error), fence=fence)
            if error is exc:
                raise
            raise error from exc
        logger.warning("%s[%s] could not be published, and rests: %r", name, task_id, exc)
        app.patiently(lambda: app.store.rest(task_id, publication.number))
        if isinstance(exc, SoftTimeLimitExceeded) and _interrupts_body(app, task_id):
            raise


def _interrupts_body(app: "MediaTasks", task_id: str) -> bool:
    """Whether a time limit that strikes while a job is submitted has a body to end: not one that has returned, and
    whose next step is sent, nor one that has just queued its own job again.
    """
    current = app.current_worker_task
    return current is not None and current.request.id != task_id and bool(current.request.get("is_in_body"))


def as_broker_away(exc: Exception, broker_url: str) -> Exception:
    """The error of a broker on another machine with its address and what helps; the embedded one's says both itself."""
    if not isinstance(exc, OperationalError) or isinstance(exc, (BrokerError, BrokerAway)):
        return exc
    urls = ";".join(maybe_sanitize_url(url) for url in broker_url.split(";"))
    return BrokerAway(
        f"the broker does not answer at {urls} ({exc}); start it, or set CELERY_BROKER_URL to one that runs "
        "(with ENQUEUE=outbox jobs wait for it)"
    )


def _queue_of(app: "MediaTasks", task: Any, name: str, queue: Any) -> str:
    """The queue to publish to: the task's own name, unless the caller names one that is known."""
    wanted = str(getattr(queue, "name", queue) or getattr(task, "queue", None) or name)
    if name == wanted and name in app.tasks:
        return wanted
    declared = set(capabilities.names(app))
    served = {served for worker in app.live_workers() for served in worker["capabilities"]}
    known = declared | served | {queue.name for queue in app.conf.task_queues or ()}
    if name not in declared and name not in served and wanted not in served:
        raise UnknownTask(f"no worker serves {name}{capabilities.nearest(name, known)}")
    if wanted not in known:
        raise UnknownQueue(f"no worker serves the queue {wanted}{capabilities.nearest(wanted, known)}")
    return wanted


def _priority(name: str, priority: Any) -> int:
    if priority is None:
        return PRIORITY_DEFAULT
    if not isinstance(priority, int) or isinstance(priority, bool) or priority not in PRIORITIES:
        raise refused(name, "priority", priority, "a whole number from 1 to 10 (10 runs first)")
    return priority


def _uniqueness(
    name: str, args: list[Any], kwargs: Mapping[str, Any], options: dict[str, Any]
) -> tuple[str | None, datetime | None]:
    """The key under which only one job may live, and until when."""
    key, for_s = options.pop("unique_key", None), options.pop("unique_for", None)
    if any(True for step in _canvas_of(options) if _is_unique(step)):
        raise InvalidArguments(f"{name}: a step of a canvas can't be unique; submit that job by itself")
    if key is None and for_s is None:
        return None, None
    if any(options.get(what) for what in ("chain", "chord", "group_id", "root_id", "parent_id")):
        raise InvalidArguments(f"{name}: unique_key and unique_for can't be used inside a canvas; submit it by itself")
    if for_s is not None and not (isinstance(for_s, (int, float)) and 0 < for_s <= LONGEST_S):
        raise refused(name, "unique_for", for_s, f"a number of seconds above 0, {LONGEST_S:,} at most")
    if key is None:
        text = dumps([name, args, kwargs], sort_keys=True)
        key = f"{name}:{hashlib.sha256(text.encode()).hexdigest()}"
    elif not is_name(key):
        raise refused(name, "unique_key", key, f"a printable text of 1 to {LONGEST_NAME} characters")
    return key, now() + timedelta(seconds=for_s) if for_s is not None else None


def _canvas_of(options: Mapping[str, Any]) -> Iterator[Any]:
    """The signatures that a job's options hold: what follows it."""
    for what in ("chain", "chord", "link", "link_error"):
        value = options.get(what)
        yield from value if isinstance(value, (list, tuple)) else [value] if value else []


def _is_unique(step: Any) -> bool:
    if not isinstance(step, Mapping):
        return False
    options, kwargs = step.get("options") or {}, step.get("kwargs") or {}
    if options.get("unique_key") is not None or options.get("unique_for") is not None:
        return True
    nested = [*(kwargs.get("tasks") or []), kwargs.get("body"), *_as_list(kwargs.get("header"))]
    return any(_is_unique(inner) for inner in nested if inner)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
