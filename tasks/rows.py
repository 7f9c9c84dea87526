"""Rows as Celery knows them, and back: requests, errors and task meta. Asks no database and sends no message."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from traceback import format_exception
from typing import Any, Final

from celery import states
from celery.app.task import Context
from celery.exceptions import ChordError, TaskRevokedError
from celery.utils.functional import maybe_list
from kombu.exceptions import EncodeError
from kombu.utils.json import dumps

from db.records import Failure, NewJob, Sequel, Status
from tasks.arguments import named
from tasks.errors import InvalidArguments, PermanentError
from tasks.values import moment_of

PRIORITY_DEFAULT: Final = 5
PRIORITIES: Final = range(1, 11)
MESSAGE_LIMIT: Final = 4000
LARGEST: Final = 2**63 - 1
STATES: Final = {
    Status.QUEUED: states.PENDING,
    Status.CLAIMED: states.RECEIVED,
    Status.RUNNING: states.STARTED,
    Status.COMPLETED: states.SUCCESS,
    Status.FAILED: states.FAILURE,
    Status.CANCELLED: states.REVOKED,
}


# Requests


def job_of_request(task: Any, request: Any, args: Any, kwargs: Mapping[str, Any]) -> NewJob:
    """The row of a message that has none: what can be told from the message itself, enough to publish it again."""
    delivery = request.delivery_info or {}
    name = getattr(task, "name", None) or getattr(request, "task", None) or "unknown"
    queue = delivery.get("routing_key") or name
    options = {
        "queue": queue,
        "task_id": request.id,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "group_id": request.group,
        "group_index": request.group_index,
        "chord": request.chord,
        "chain": request.chain,
        "link": request.callbacks,
        "link_error": request.errbacks,
        "reply_to": request.reply_to,
        "ignore_result": request.ignore_result,
    }
    limits = request.timelimit or (None, None)
    options |= {"time_limit": limits[0], "soft_time_limit": limits[1]}
    return NewJob(
        job_id=request.id,
        task_type=name,
        queue=queue,
        parameters=parameters_of(task, args, kwargs),
        priority=_priority(task, delivery.get("priority")),
        max_retries=getattr(task, "max_retries", None),
        retry_count=request.retries or 0,
        expires_at=moment_of(request.expires),
        root_id=request.root_id,
        parent_id=request.parent_id,
        group_id=request.group,
        group_index=request.group_index,
        in_chord=bool(request.chord),
        sequel=Sequel.PENDING if request.chord or request.chain or request.errbacks else None,
        message={
            "args": list(args),
            "kwargs": dict(kwargs),
            "options": {name: value for name, value in options.items() if value is not None},
        },
    )


def _priority(task: Any, on_the_wire: Any) -> int:
    """The row's priority of a message; 5 if it has none that a row can have."""
    app = getattr(task, "app", None)
    if not isinstance(on_the_wire, int) or app is None:
        return PRIORITY_DEFAULT
    priority = app.wire_priority(on_the_wire)  # its own inverse
    return priority if priority in PRIORITIES else PRIORITY_DEFAULT


def json_fault(value: Any) -> str | None:
    """Why no row can hold a value, in whichever database: it is no JSON, or holds a number that is none."""
    try:
        dumps(value, allow_nan=False)
    except (TypeError, ValueError) as exc:
        return str(exc)
    return None


def require_json(result: Any) -> None:
    """Refuse what no row can hold.

    Raises:
        EncodeError: Of which the tracer fails the job.
    """
    if fault := json_fault(result):
        raise EncodeError(f"the result is no JSON: {fault}")
    if isinstance(result, int) and abs(result) > LARGEST:
        raise EncodeError("the result is a number of more than 64 bits, which SQLite would round; return it in a dict")


def parameters_of(task: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, or as they came, if they don't fit."""
    if (arguments := getattr(task, "arguments", None)) is not None:
        with suppress(InvalidArguments):
            return named(arguments.bind(args, kwargs))
    return {"args": list(args), **kwargs}


def unsent(name: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Context:
    """A request in the place of one that was never sent, so that what follows from its failure can be told."""
    return Context(
        id=options["task_id"],
        task=name,
        args=args,
        kwargs=kwargs,
        root_id=options.get("root_id"),
        parent_id=options.get("parent_id"),
        group=options.get("group_id"),
        group_index=options.get("group_index"),
        chord=options.get("chord"),
        chain=options.get("chain"),
        errbacks=maybe_list(options.get("link_error")),
        delivery_info={"routing_key": options.get("queue") or name},
        is_unsent=True,
    )


def message_of_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The args, kwargs and options to publish a job with again."""
    return row["message"] or {"args": [], "kwargs": row["parameters"], "options": {}}


def request_of_row(row: Mapping[str, Any], publication: int | None = None) -> Context:
    """The request of a job, from what its row keeps to publish it again.

    With `publication` it can end the job only while that waits; without, also a running attempt.
    """
    message = message_of_row(row)
    options = {**message["options"], "task_id": row["job_id"], "queue": row["queue"]}
    request = unsent(row["task_type"], message["args"], message["kwargs"], options)
    request.retries, request.publication = row["retry_count"], publication
    return request


# Errors


def describe(exc: Any, traceback: Any = None) -> Failure:
    """What the row says of an error: its type, its message (the log keeps a bug's traceback), never a secret."""
    message = _text_of(exc)[:MESSAGE_LIMIT]
    if not isinstance(exc, BaseException):
        return Failure(error_type="Exception", error_message=message, error_module="builtins")
    details = None
    if not isinstance(exc, (PermanentError, TaskRevokedError, ChordError)):
        text = traceback if isinstance(traceback, str) else "".join(format_exception(exc))
        details = {"traceback": text[-MESSAGE_LIMIT:]}
    return Failure(
        error_type=type(exc).__name__,
        error_message=message,
        error_module=type(exc).__module__,
        details=details,
    )


def _text_of(exc: Any) -> str:
    """What an error says, whatever its class makes of that."""
    try:
        return str(exc)
    except Exception as unsaid:
        return f"it can't be printed: {type(unsaid).__name__}"


def meta_of(task_id: str, row: Any) -> dict[str, Any]:
    """Celery's task meta of a row; PENDING for a job that is not known."""
    meta: dict[str, Any] = {
        "task_id": task_id,
        "status": states.PENDING,
        "result": None,
        "traceback": None,
        "children": [],
    }
    if row is None:
        return meta
    status = Status(row["status"])
    meta |= {"status": STATES[status], "name": row["task_type"], "date_done": row["completed_at"]}
    if status is Status.QUEUED and row["retry_count"]:
        meta["status"] = states.RETRY
    if status is Status.COMPLETED:
        meta["result"] = row["result_data"]
    elif status in (Status.FAILED, Status.CANCELLED) or meta["status"] == states.RETRY:
        meta["result"] = exception_of(row)
    elif status is Status.RUNNING:
        meta["result"] = {"progress": row["progress"], "stage": row["stage"]}
    return meta


def exception_of(row: Any) -> BaseException:
    """The error of a row as an exception of its own type, where that is known here and takes one message."""
    error: Exception
    if row["error_type"] == "TaskRevokedError":
        error = TaskRevokedError(row["error_message"])
        return error
    cls = getattr(sys.modules.get(row["error_module"] or ""), row["error_type"] or "", None)
    if isinstance(cls, type) and issubclass(cls, Exception):
        with suppress(TypeError):
            error = cls(row["error_message"])
            return error
    return RuntimeError(f"{row['error_type']}: {row['error_message']}")
