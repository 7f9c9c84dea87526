"""`celery -A tasks submit CAPABILITY ...`: one command per capability, made from its declaration."""

import inspect
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import click
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult

from db.models import Status
from tasks import capabilities
from tasks.cli.app import readable_errors
from tasks.job import Job

POLL_S = 0.1


class _Capabilities(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return capabilities.names(_app(ctx))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        app = _app(ctx)
        if name not in capabilities.names(app):
            raise click.UsageError(
                f"no capability is called {name}{capabilities.nearest(name, capabilities.names(app))}", ctx
            )
        return _command_of(app.tasks[name])


@click.command(cls=_Capabilities, short_help="Submit a job: submit image_resize in.jpg out.webp --width 800 --wait")
def submit() -> None:
    """Submit a job to a capability; its options are those of its declaration."""


def _app(ctx: click.Context) -> Any:
    app = ctx.find_root().obj.app
    app.load_capabilities()
    return app


def _command_of(task: Job) -> click.Command:
    hints = get_type_hints(inspect.unwrap(getattr(task.run, "__func__", task.run)), include_extras=True)
    described = _described(task.__doc__ or "")
    parameters: list[click.Parameter] = []
    for name, parameter in task.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parameters.append(_option(name, parameter, hints.get(name, str), described.get(name)))
        else:
            parameters.append(click.Argument([name], required=parameter.default is inspect.Parameter.empty))
    parameters += [
        click.Option(["--priority"], type=click.IntRange(1, 10), help="10 runs first (default 5)."),
        click.Option(["--wait/--no-wait"], default=False, help="Show progress until the job has ended."),
        click.Option(["--timeout"], type=float, help="With --wait: seconds to wait at most."),
    ]

    def run(*, priority: int | None, wait: bool, timeout: float | None, **arguments: Any) -> None:
        given = {name: value for name, value in arguments.items() if value is not None and value != ()}
        with readable_errors():
            result = task.apply_async(kwargs=given, priority=priority)
            if wait:
                _wait(task.app.store, result, timeout)
            else:
                click.echo(result.id)

    summary = (task.__doc__ or "").split("Args:")[0].strip()
    return click.Command(task.name, params=parameters, callback=run, help=summary)


def _option(name: str, parameter: inspect.Parameter, hint: Any, text: str | None) -> click.Option:
    flag = "--" + name.replace("_", "-")
    is_required = parameter.default is inspect.Parameter.empty
    kind, is_many = _kind_of(hint)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    if is_many:
        return click.Option([flag, name], type=_List(kind), required=is_required, help=f"{text or ''} Comma-separated.")
    default = "" if parameter.default in (None, inspect.Parameter.empty) else f" [{parameter.default}]"
    return click.Option([flag, name], type=kind, required=is_required, help=(text or "") + default)


def _kind_of(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether the option takes several: int for `int | None`, (str, True) for a sequence."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind_of(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _kind_of(kinds[0]) if len(kinds) == 1 else (object, False)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _kind_of(arguments[0])[0], True
    return (hint if hint in (int, float, bool, str) else str), False


class _List(click.ParamType):
    """`400,800,1600x900`: whole numbers become numbers unless the items are text."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002 (Click's)
        if not isinstance(value, str):
            return value
        items = [item.strip() for item in value.split(",") if item.strip()]
        return [int(item) if self._kind is not str and item.isdecimal() else item for item in items]


def _described(docstring: str) -> dict[str, str]:
    """The lines of a docstring's Args section, by argument."""
    lines = docstring.partition("Args:")[2].splitlines()
    pairs = (line.strip().partition(": ") for line in lines)
    return {name: text for name, separator, text in pairs if separator and name.isidentifier()}


def _wait(store: Any, result: AsyncResult, timeout_s: float | None) -> None:
    """Show the job's progress until it has ended; exit 1 if it failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(result.id, total=100)

        def show() -> None:
            row = store.job(result.id)
            bars.update(bar, completed=row["progress"], description=f"{row['task_type']} {row['status']}")

        try:
            value = result.get(timeout=timeout_s, on_interval=show, propagate=False)
        except ResultTimeout:
            show()
            raise click.ClickException(
                f"{result.id} has not ended within {timeout_s:g} s; it goes on: celery -A tasks jobs show {result.id}"
            ) from None
        show()
    row = store.job(result.id)
    if row["status"] != Status.COMPLETED:
        raise click.ClickException(f"{result.id} {row['status']}: {row['error_type']}: {row['error_message']}")
    click.echo(json.dumps(value, indent=2))
