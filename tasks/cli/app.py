"""What every command needs: the app behind `-A tasks`, and errors as one line instead of a traceback."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from sqlalchemy.exc import DBAPIError

from tasks.errors import MediaTasksError


def with_app(command: Callable[..., Any]) -> Callable[..., Any]:
    """Call `command(app, ...)`; turn this project's errors into Click's."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        app = click.get_current_context().obj.app
        if not hasattr(app, "store"):
            raise click.UsageError("this command belongs to the app `tasks`: celery -A tasks ...")
        with readable_errors():
            app.load_capabilities()
            return command(app, *args, **kwargs)

    return wrapper


class readable_errors:  # noqa: N801 (reads as a verb at its use)
    """A context in which an error ends the command with its message."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        if isinstance(exc, MediaTasksError):
            raise click.ClickException(str(exc)) from exc
        if isinstance(exc, DBAPIError):
            raise click.ClickException(f"the job database does not answer: {exc.orig}") from exc
