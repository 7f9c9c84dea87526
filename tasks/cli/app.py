"""What every command needs: the app behind `-A tasks`, and errors as one line.

Celery loads the entry points of all commands whenever anybody runs `celery`, for whatever app. So the modules of this
package import nothing but Click at the top; the rest is imported by the command that runs.
"""

import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.cli.text import printable, remark

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older versions of Click can't be subscribed

T = TypeVar("T")


class IntegerRange(click.IntRange):
    """A whole number within limits; of what is none, Click's own would say that it is no "integer range"."""

    name = "integer"


def app_of(ctx: click.Context) -> "MediaTasks":
    """The app behind `-A`.

    Raises:
        click.ClickException: It is another project's, or none was named.
    """
    app: MediaTasks = ctx.find_root().obj.app
    ours = sys.modules.get("tasks.celery")
    is_ours = ours is not None and isinstance(app, ours.MediaTasks)
    if not is_ours:
        command = _command_of(ctx)
        raise click.ClickException(
            f"`{command}` is a command of Media Tasks, and this is another app ({app.main or 'without a name'}); "
            f"run: celery -A tasks {command}"
        )
    return app


def _command_of(ctx: click.Context) -> str:
    """The words after `celery`, without options and arguments."""
    return f"{_command_of(ctx.parent)} {ctx.info_name}".strip() if ctx.parent else ""


def with_app(command: Callable[..., Any]) -> Callable[..., Any]:
    """Call `command(app, ...)`; end with one line on an error."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        app = app_of(click.get_current_context())
        with readable_errors():
            return command(app, *args, **kwargs)

    return wrapper


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the command with the message of an error that its user can do something about."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as exc:
        message = _message(exc)
        if message is None:
            raise
        raise click.ClickException(printable(message)) from exc


def for_each(items: Iterable[T], do: Callable[[T], None]) -> None:
    """Do it for one after the other. Where it can't be done, that is said in one line, and the others follow.

    Raises:
        click.exceptions.Exit: Some could not be done; code 1.
    """
    from tasks.errors import MediaTasksError

    is_done = True
    for item in items:
        try:
            do(item)
        except (click.ClickException, MediaTasksError) as exc:
            is_done = False
            remark(f"Error: {exc.message if isinstance(exc, click.ClickException) else exc}")
    if not is_done:
        raise click.exceptions.Exit(1)


def _message(exc: Exception) -> str | None:
    import sqlite3

    from kombu.exceptions import OperationalError as BrokerError
    from sqlalchemy.exc import DBAPIError

    from tasks.enqueue import as_broker_away
    from tasks.errors import MediaTasksError
    from tasks.settings import settings

    if isinstance(exc, MediaTasksError):
        return str(exc)
    if isinstance(exc, DBAPIError):
        return f"the job database does not answer: {_first_line(exc.orig)}"
    if isinstance(exc, sqlite3.Error):
        return f"the job database does not answer: {_first_line(exc)}"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"the output can't be written: {exc.strerror}"
    if isinstance(exc, BrokerError):
        return _first_line(as_broker_away(exc, settings().broker_url))
    return None


def _first_line(exc: object) -> str:
    return str(exc).strip().partition("\n")[0]
