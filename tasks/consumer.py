"""The consumer: Celery's own, for messages that can be run; all others end here, each with a reason and a failed row.

In: whatever stands in a queue. Out: tasks for the pool; for the rest a failed row (or, without a job id, a log row) and
one line in the log. What a message holds is its sender's and is never logged. Stock Celery logs it whole, and dies of
some such messages: of one without an id, say, again and again, since it is redelivered.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from celery.app.task import Context
from celery.concurrency.asynpool import AsynPool
from celery.platforms import EX_FAILURE
from celery.worker.consumer import Consumer
from sqlalchemy.exc import SQLAlchemyError

from db.records import Event, Status, now
from tasks import capabilities
from tasks.broker.errors import BrokerUnusable
from tasks.errors import PermanentError, UnknownTask
from tasks.job import Job
from tasks.rows import job_of_request
from tasks.values import HIGHEST, LONGEST_S, is_limit, is_name, is_whole, moment_of

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

_TEXTS: Final = ("root_id", "parent_id", "group")
_CANVAS: Final = ("callbacks", "errbacks", "chain", "chord")
_LEAST: Final = {"publication": 1, "retries": 0, "group_index": 0}


class MalformedMessage(PermanentError):
    """A message that is no task message, or a damaged one. Send jobs with a Celery client of version 4 or newer."""


class MediaConsumer(Consumer):  # type: ignore[misc, unused-ignore]
    """Hands on what can be run, refuses the rest."""

    app: "MediaTasks"

    def start(self) -> None:
        """As Celery's; a broker's file that no waiting makes usable ends the worker in one line."""
        try:
            super().start()
        except BrokerUnusable as exc:
            logger.critical("%s", exc)
            raise SystemExit(EX_FAILURE) from exc

    def on_close(self) -> None:
        """As Celery's, when the connection is lost. By itself it ends or blocks a worker whose child has died, too:

        - Before the event loop has run for the first time the pool can't give the queues of a dead child to a new one.
        - A child whose pipe was seen to close before it could be waited for is watched no more, and stays in the pool:
          then the pool can't be registered with the event loop of the next connection.
        - The pool goes on listening to the results of children that died in mid-job. With the next connection it
          listens to whatever has got their file numbers: it would take a job from its own pipe, and wait for the rest.
        """
        if (upkeep := getattr(self.controller, "upkeep", None)) is not None:  # not with MIRROR=off
            upkeep.renew_soon()
        pool: Any = getattr(self.pool, "_pool", None)
        if not isinstance(pool, AsynPool) or self.hub is None:
            super().on_close()
            return
        if pool.on_process_down is None:
            self.hub.reset()  # as the loop does it, when it is the one that loses the connection
            self.pool.register_with_event_loop(self.hub)
        super().on_close()
        for process in pool._pool:
            if getattr(process, "_sentinel_poll", -1) is None:
                del process._sentinel_poll  # it is made anew
        pool._fileno_to_outq.clear()
        pool._fileno_to_outq.update({process.outqR_fd: process for process in pool._pool})

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """The callback of each message: looked through first, since Celery trusts what it reads."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            if fault := fault_in(message):
                self._refuse(message, MalformedMessage(f"{fault}; the message was dropped"))
            elif not self._goes_to_rest(message):
                handle(message)

        return on_task_received

    def _goes_to_rest(self, message: Any) -> bool:
        """Put a job that is due later into its row, where it needs no memory and no worker: another client sent it so,
        or a producer without the database. A dispatcher publishes it when it is due.
        """
        eta = message.headers.get("eta")
        task = self.app.tasks.get(message.headers.get("task") or "")
        if not eta or not isinstance(task, Job) or not self.app.is_recorded(task.name):
            return False
        try:
            due = moment_of(eta)
            if due is None or due <= now():
                return False
            request = _request_of(message)
            job = job_of_request(task, request, request.args, request.kwargs)
            self.app.store.enqueue(replace(job, run_after_utc=due), is_resting=True)
        except (TypeError, ValueError, SQLAlchemyError) as exc:
            logger.warning("a job that is due later waits in memory: %s", exc)
            return False
        message.ack_log_error(logger, self.connection_errors)
        return True

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 (Celery's signature)
        name = message.headers.get("task") or message.payload["task"]
        known = capabilities.names(self.app)
        self._refuse(message, UnknownTask(f"no task is called {name} here{capabilities.nearest(name, known)}"))

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002 (Celery's signature)
        self._refuse(message, MalformedMessage("it names no task; the message was dropped"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 (Celery's signature)
        self._refuse(message, MalformedMessage(f"its fields can't be read ({type(exc).__name__}); it was dropped"))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self.on_invalid_task(None, message, exc)

    def _refuse(self, message: Any, error: PermanentError) -> None:
        """Fail the job of a message, with what waits for it; never raises for what the message holds."""
        request = _request_of(message)
        queue = request.delivery_info.get("routing_key")
        logger.error("a message in the queue %s is refused: %s[%s]: %s", queue, request.task, request.id, error)
        try:
            if request.id is None:
                if self.app.settings.mirror:
                    self.app.store.log_worker(self.app.worker_id, Event.REJECTED, str(error))
            elif self.app.is_recorded(request.task):
                row = self.app.store.job(request.id)
                if row is None or row["status"] == Status.QUEUED:
                    self.app.backend.mark_as_failure(request.id, error, request=request)
        except Exception as exc:
            logger.warning("the refused message could not be recorded: %s", type(exc).__name__)
        message.reject_log_error(logger, self.connection_errors)


def fault_in(message: Any) -> str | None:
    """What is wrong with a message, in words that hold nothing of its content; None if Celery can read it."""
    headers = message.headers
    if not isinstance(headers, Mapping):
        return "it has no headers"
    try:
        payload = message.payload
    except Exception as exc:
        return f"its body can't be decoded as {message.content_type!r:.60} ({type(exc).__name__})"
    fields = _fields_of(headers, payload)
    if "task" not in fields:
        return "it names no task"
    if isinstance(payload, Mapping) and ("args" in payload or "task" not in headers):
        arguments = [payload.get("args", []), payload.get("kwargs", {}), None]
    elif isinstance(payload, list) and len(payload) == 3:
        arguments = payload
    else:
        return "its body does not hold args, kwargs and options"
    args, kwargs, embed = arguments
    if not (isinstance(args, list) and isinstance(kwargs, Mapping) and isinstance(embed, Mapping | None)):
        return "its body does not hold args, kwargs and options"
    for name in _CANVAS:
        if not _are_signatures((embed or {}).get(name), is_one=name == "chord"):
            return f"its field {name!r} holds no signatures"
    return fault_in_fields(fields)


def _fields_of(headers: Mapping[str, Any], payload: Any) -> Mapping[str, Any]:
    """The fields of a message: of protocol 2 in its headers, of protocol 1 in its body, of some clients in both."""
    if not isinstance(payload, Mapping):
        return headers
    return {**payload, **headers} if "task" in headers else payload


def fault_in_fields(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with the headers of a task message, in words that hold nothing of their content."""
    for name in ("task", "id", *_TEXTS):
        value = fields.get(name)
        if not (is_name(value) or (value is None and name in _TEXTS)):
            return f"its field {name!r} is missing or no short text"
    if not isinstance(fields.get("shadow"), str | None):
        return "its field 'shadow' is no text"
    if not _are_stamps(fields.get("stamped_headers"), fields.get("stamps")):
        return "its fields 'stamped_headers' and 'stamps' are no list of names and their values"
    for name, least in _LEAST.items():
        if (value := fields.get(name)) is not None and not is_whole(value, least):
            return f"its field {name!r} is no whole number from {least} to {HIGHEST:,}"
    if not _are_limits(fields.get("timelimit")):
        return f"its field 'timelimit' is no pair of seconds (0 to {LONGEST_S:,}, or null)"
    for name in ("eta", "expires"):
        if (value := fields.get(name)) is not None and moment_of(value) is None:
            return f"its field {name!r} is no time"
    return None


def _are_limits(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return not value or (is_pair and all(limit is None or is_limit(limit) for limit in value))


def _are_signatures(value: Any, *, is_one: bool) -> bool:
    """Whether Celery can read what follows a job: all of it is JSON of `celery.Signature`, or there is none."""
    signatures = [value] if is_one else value
    return not value or (isinstance(signatures, list) and all(map(_is_signature, signatures)))


def _is_signature(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    parts = [value.get(name) for name in ("args", "kwargs", "options")]
    return is_name(value.get("task")) and all(map(isinstance, parts, (list, Mapping, Mapping)))


def _are_stamps(names: Any, stamps: Any) -> bool:
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return not names or (are_names and isinstance(stamps or {}, Mapping))


def _request_of(message: Any) -> Context:
    """What can be told of a job from its message, however damaged that is."""
    headers = message.headers if isinstance(message.headers, Mapping) else {}
    try:
        payload = message.payload
    except Exception:
        payload = None
    fields = _fields_of(headers, payload)
    priority = (message.properties or {}).get("priority")
    delivery_info = {**(message.delivery_info or {}), "priority": priority}
    known: dict[str, Any] = {"delivery_info": delivery_info, "args": [], "kwargs": {}}
    if fault_in(message) is None and isinstance(payload, list):
        known |= {"args": payload[0], "kwargs": payload[1], **(payload[2] or {})}
    for name in ("id", "task"):
        known[name] = fields.get(name) if is_name(fields.get(name)) else None
    known |= {"task": known["task"] or "unknown", "publication": 1}
    usable = {name: is_whole(fields.get(name), least) for name, least in _LEAST.items()}
    usable["timelimit"] = _are_limits(fields.get("timelimit"))
    usable["expires"] = moment_of(fields.get("expires")) is not None
    usable |= {name: is_name(fields.get(name)) for name in _TEXTS}
    usable["ignore_result"] = isinstance(fields.get("ignore_result"), bool)
    known |= {name: fields[name] for name, is_usable in usable.items() if is_usable and fields.get(name) is not None}
    return Context(known)
