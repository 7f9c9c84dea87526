"""What the log looks like: LOG_LEVEL, LOG_FORMAT, and no payloads in it.

In: Celery's logging set-up of a worker. Out: the same with one JSON object a line if asked for, and without arguments
and results.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from celery import signals
from celery.utils.log import get_multiprocessing_logger

SUCCEEDED: Final = "Task %(name)s[%(id)s] succeeded in %(runtime)ss"

APPLY: Final = "TaskPool: Apply"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, process, message; a task's name and id."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.processName,
            "message": record.getMessage(),
        }
        if isinstance(record.args, dict) and "id" in record.args:
            entry |= {"task": record.args.get("name"), "task_id": record.args["id"]}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def connect(log_format: str) -> None:
    """Have Celery's loggers formatted as `log_format` (console or json) says, once they are set up."""
    logging.getLogger("celery.app.trace").addFilter(_without_result)
    logging.getLogger("celery.pool").addFilter(_without_arguments)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new database is made without a word
    logging.getLogger("pyvips").setLevel(logging.WARNING)  # libvips says several things a job: a tenth of its time
    if log_format == "json":
        for signal in (signals.after_setup_logger, signals.after_setup_task_logger):
            signal.connect(_on_logger_set_up, dispatch_uid="media_tasks.log_format", weak=False)


def _on_logger_set_up(logger: logging.Logger, **_: Any) -> None:
    """The pool's own logger, which tells how a child died, has a handler that no signal speaks of."""
    for handler in (*logger.handlers, *get_multiprocessing_logger().handlers):
        handler.setFormatter(JsonFormatter())


def _without_arguments(record: logging.LogRecord) -> bool:
    """At DEBUG Celery's pool logs each call with its arguments."""
    if isinstance(record.args, tuple) and str(record.msg).startswith(APPLY):
        record.msg, record.args = f"{APPLY} %s", record.args[:1]
    return True


def _without_result(record: logging.LogRecord) -> bool:
    """Celery logs what a task returned; a result is the user's and stays in the table."""
    if isinstance(record.args, dict) and "return_value" in record.args:
        record.msg = SUCCEEDED
    return True
