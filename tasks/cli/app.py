"""What every command needs: the app behind `-A tasks`, errors as one line, and text that a terminal can take.

Celery loads the entry points of all commands whenever anybody runs `celery`, for whatever app. So the modules of this
package import nothing but Click at the top; the rest is imported by the command that runs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older versions of Click can't be subscribed

UNLIMITED_COLUMNS = 10_000


def app_of(ctx: click.Context) -> Any:
    """The app behind `-A`.

    Raises:
        click.ClickException: It is another project's, or none was named.
    """
    app = ctx.find_root().obj.app
    ours = sys.modules.get("tasks.celery")
    if ours is None or not isinstance(app, ours.MediaTasks):
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


def _message(exc: Exception) -> str | None:
    import sqlite3

    from kombu.exceptions import OperationalError as BrokerError
    from sqlalchemy.exc import DBAPIError

    from tasks.errors import MediaTasksError

    if isinstance(exc, MediaTasksError):
        return str(exc)
    if isinstance(exc, DBAPIError):
        return f"the job database does not answer: {_first_line(exc.orig)}"
    if isinstance(exc, sqlite3.Error):
        return f"the job database does not answer: {_first_line(exc)}"
    if isinstance(exc, BrokerError):
        return f"the broker does not answer: {_first_line(exc)}"
    return None


def _first_line(exc: object) -> str:
    return str(exc).strip().partition("\n")[0]


def console_for(ctx: click.Context, *, stderr: bool = False) -> "Console":
    """A console as wide as the terminal; without one, lines are never cut or folded, unless COLUMNS is set."""
    import os

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    is_limited = stream.isatty() or "COLUMNS" in os.environ
    no_color = True if ctx.find_root().obj.no_color else None
    return Console(
        stderr=stderr, width=None if is_limited else UNLIMITED_COLUMNS, no_color=no_color, highlight=False, emoji=False
    )


def printable(text: str) -> str:
    """`text` on one line, without what could steer a terminal: file names may hold newlines and escape codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
