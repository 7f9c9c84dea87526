"""`celery -A tasks submit CAPABILITY ...`: one command per capability, made from its declaration."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tasks.cli.app import IntegerRange, ParamType, app_of, readable_errors
from tasks.cli.text import clock, console_for, printable, remark
from tasks.cli.times import Patience

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from tasks.celery import MediaTasks
    from tasks.job import Job

LOOK_EVERY_S = 2.0


class _Capabilities(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        from tasks import capabilities

        return capabilities.names(_app(ctx))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from tasks import capabilities

        app = _app(ctx)
        known = capabilities.names(app)
        if name not in known:
            hint = capabilities.nearest(name, known) or f"; known: {', '.join(known)}"
            raise click.ClickException(f"no capability is called {printable(name)}{hint}")
        return _command_of(app.tasks[name])


@click.command(cls=_Capabilities, short_help="Submit a job: submit image_resize in.jpg out.webp --width 800 --wait")
def submit() -> None:
    """Submit a job to a capability; its options are those of its declaration."""


def _app(ctx: click.Context) -> "MediaTasks":
    from tasks import capabilities

    app = app_of(ctx)
    with readable_errors():
        app.load_capabilities()
        capabilities.check_strategies(app, is_quiet=True)
    return app


def _command_of(task: "Job") -> click.Command:
    summary, described = _documentation(task.__doc__ or "")
    parameters = _declared(task, described)
    parameters += [
        _own(task, "priority", type=IntegerRange(1, 10), help="10 runs first.  [default: 5]"),
        _own(task, "wait", is_flag=True, help="Show progress until the job has ended; fail if it failed."),
        _own(task, "timeout", type=Patience(), help="With --wait: seconds to wait at most."),
    ]

    def run(*, job_priority: int | None, job_wait: bool, job_timeout: float | None, **given: Any) -> None:
        args, kwargs = _called_with(task, given)
        with readable_errors():
            result = task.apply_async(args, kwargs, priority=job_priority)
            if job_wait:
                _wait(task, result, job_timeout)
                return
            click.echo(result.id)
            if why := _why_it_waits(task):
                remark(f"queued; {why}")

    return click.Command(task.name, params=parameters, callback=run, help=summary)


def _own(task: "Job", name: str, **options: Any) -> click.Option:
    """An option of `submit` itself. A capability may have an argument of the same name: its own goes first."""
    flag = f"--job-{name}" if name in _parameters(task) else f"--{name}"
    return click.Option([flag, f"job_{name}"], **options)


# From a declaration to options


def _parameters(task: "Job") -> Mapping[str, inspect.Parameter]:
    return inspect.signature(task.run).parameters


def _called_with(task: "Job", given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What was given, by name; by place only where any number of arguments may follow."""
    kwargs = {name: value for name, value in given.items() if value is not None}
    args: list[Any] = []
    parameters = list(_parameters(task).values())
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        last = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        args = [kwargs.pop(parameter.name) for parameter in parameters[:last] if parameter.name in kwargs]
        args += kwargs.pop(parameters[last].name)
    return args, kwargs


def _declared(task: "Job", described: Mapping[str, str]) -> list[click.Parameter]:
    """An argument or option for each parameter of the body."""
    from typing import get_type_hints

    body: Any = task.run
    hints = get_type_hints(inspect.unwrap(getattr(body, "__func__", body)))
    declared: list[click.Parameter] = []
    for name, parameter in _parameters(task).items():
        is_required = parameter.default is inspect.Parameter.empty
        kind = _kind_of(hints.get(name, str))
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            declared.append(click.Argument([name], type=kind, nargs=-1))
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            declared.append(_option(name, kind, parameter.default, is_required, described.get(name, "")))
        else:
            declared.append(click.Argument([name], type=kind, required=is_required))
    return declared


def _option(name: str, kind: Any, default: Any, is_required: bool, text: str) -> click.Option:
    flag = name.replace("_", "-")
    help_text = " ".join(filter(None, [text, "Comma-separated." if isinstance(kind, _List) else ""]))
    if not is_required and default is not None:
        shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default).lower()
        help_text += f"  [default: {shown}]"
    if kind is bool:
        return click.Option([f"--{flag}/--no-{flag}", name], default=None, required=is_required, help=help_text)
    return click.Option([f"--{flag}", name], type=kind, required=is_required, help=help_text)


def _kind_of(hint: Any) -> Any:
    """How Click reads a value: an int for `int | None`, a choice for a Literal, a list for a sequence."""
    import types
    from typing import Annotated, Literal, Union, get_args, get_origin

    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind_of(arguments[0])
    if origin is Literal:
        return click.Choice([str(argument) for argument in arguments]) if _are_texts(arguments) else _Item(object)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _kind_of(kinds[0]) if len(kinds) == 1 else _Item(object)
    container = origin or hint
    if isinstance(container, type) and not issubclass(container, str):
        if issubclass(container, Mapping):
            return _Json()
        if issubclass(container, Sequence):
            return _List(arguments[0] if arguments else str)
    return hint if hint in (int, float, bool, str) else _Item(object) if hint in (object, Any) else str


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


class _Item(ParamType):
    """A value that may be a number or text: a whole number becomes one, unless text is what was declared."""

    name = "value"

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or self._kind is str:
            return value
        if self._kind in (int, float):
            return click.types.convert_type(self._kind).convert(value, param, ctx)
        return int(value) if value.isascii() and value.removeprefix("-").isdecimal() else value


class _List(ParamType):
    """`400,800,1600x900`."""

    name = "list"

    def __init__(self, kind: Any) -> None:
        self._item = _Item(kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        items = (item.strip() for item in value.split(","))
        return [self._item.convert(item, param, ctx) for item in items if item]


class _Json(ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            document = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            document = None
        if not isinstance(document, dict):
            self.fail(f"""{value!r} is no JSON object such as '{{"key": 1}}'""", param, ctx)
        return document


def _documentation(docstring: str) -> tuple[str, dict[str, str]]:
    """What stands before a docstring's Args section, and its Args by name; a deeper line goes on with the one above."""
    text, _, section = inspect.cleandoc(docstring).partition("Args:\n")
    described: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        head, separator, rest = line.strip().partition(": ")
        if separator and head.isidentifier() and not line.startswith(" " * 8):
            name = head
            described[name] = rest
        elif name and line.strip():
            described[name] += f" {line.strip()}"
    return text.strip(), described


# Waiting


def _wait(task: "Job", result: "AsyncResult", timeout_s: float | None) -> None:
    """Show the job's progress until it has ended; print its result, or fail with its error."""
    from celery.exceptions import TimeoutError as ResultTimeout

    from db.records import Status

    if not task.app.is_recorded(task.name):
        setting = "ENQUEUE=broker" if task.app.settings.mirror else "MIRROR=off"
        raise click.ClickException(f"{result.id} is submitted; with {setting} nobody here can wait for it")
    look = f"celery -A tasks jobs show {result.id}"
    try:
        value = _followed(task, result, timeout_s)
    except ResultTimeout:
        raise click.ClickException(f"{result.id} has not ended within {timeout_s:g} s and goes on: {look}") from None
    except KeyboardInterrupt:
        raise click.ClickException(f"no longer waiting; {result.id} goes on: {look}") from None
    row = task.app.store.job(result.id)
    if row is not None and row["status"] != Status.COMPLETED:
        raise click.ClickException(
            f"{result.id} {row['status']}: {row['error_type']}: {printable(row['error_message'])}"
        )
    click.echo(_as_json(value))


def _as_json(value: Any) -> str:
    """A result as its row holds it: what JSON has no type for (bytes, times), with its type beside it. Only what a
    terminal can't show is escaped.
    """
    from kombu.utils.json import dumps

    text = str(dumps(value, indent=2, ensure_ascii=False))
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _followed(task: "Job", result: "AsyncResult", timeout_s: float | None) -> Any:
    """The job's result, or its error, once it has ended; a bar on stderr shows the way there.

    Why it waits stands beside the bar; where that is no terminal, on a line of its own, as soon as it is known.
    """
    import time

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from db.records import Status

    store = task.app.store
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    console = console_for(click.get_current_context(), stderr=True)
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(task.name, total=100)
        look_at, why = 0.0, ""

        def show() -> None:
            nonlocal look_at, why
            row = store.job(result.id)
            if row is None:
                return
            if row["status"] != Status.QUEUED:
                why = ""
            elif time.monotonic() >= look_at:
                before, why = why, _why_it_waits(task)
                look_at = time.monotonic() + LOOK_EVERY_S
                if why and why != before and not console.is_terminal:
                    remark(f"queued; {why}")
            state = f"{row['status']}; {why}" if why else row["status"]
            bars.update(bar, completed=row["progress"], description=printable(f"{task.name} {state}"))

        try:
            return result.get(timeout=timeout_s, on_interval=show, propagate=False)
        finally:
            show()


def _why_it_waits(task: "Job") -> str:
    """What keeps its queue from being served; empty when nothing does, or nobody knows."""
    if not task.app.is_recorded(task.name):
        return ""
    reasons = []
    if not any(task.name in worker["capabilities"] for worker in task.app.live_workers()):
        reasons.append(f"no live worker serves {task.name}: celery -A tasks worker -Q {task.name}")
    for pause in task.app.store.paused():
        if pause["queue"] == task.name:
            until = f" until {clock(pause['paused_until'])}" if pause["paused_until"] else ""
            reason = f" ({pause['reason']})" if pause["reason"] else ""
            reasons.append(f"it is paused{until}{reason}: celery -A tasks queues resume {task.name}")
    return "; ".join(reasons)
