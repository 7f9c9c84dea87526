"""What a call takes: a task's arguments, read from its declaration, and the options of `apply_async`.

In: positional and keyword arguments as somebody called, or as a message brought them. Out: the same with absolute
paths, or bound to their names, and options as times in UTC; or `InvalidArguments`. Nothing is opened.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

from tasks.errors import InvalidArguments, PathNotAllowed
from tasks.values import HIGHEST, LONGEST_NAME, LONGEST_S, is_limit, is_name, is_number, is_whole, moment_of

_PATH: Final = "path"
_POSITIONAL: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
_FORMS: Final[dict[Any, str]] = {
    inspect.Parameter.KEYWORD_ONLY: "{}=",
    inspect.Parameter.VAR_POSITIONAL: "*{}",
    inspect.Parameter.VAR_KEYWORD: "**{}",
}
InputPath = Annotated[str, _PATH, "input"]
"""A file to read: absolute by the time that a worker sees it. In a chain, the result of a job stands for its output."""
OutputPath = Annotated[str, _PATH, "output"]
"""A file or directory to write."""
MAPS: Final = ("celery.map", "celery.starmap", "celery.chunks")
"""Tasks that call another one many times in one message. No worker serves them: no row of theirs could tell how far."""
_CANVAS: Final = ("chain", "chord", "link", "link_error")
_SECONDS: Final = f"a number of seconds, such as 60 ({LONGEST_S:,} at most)"
_TIME: Final = "a datetime or ISO 8601 text, such as '2031-01-31T12:00:00Z'"
_SIGNATURE: Final = "a signature, such as image_conversion.s('/out.png', format='png'), or a list of them"


class Arguments:
    """What one task takes.

    Args:
        name: The task's, for messages.
        function: Its body, without `self`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name: Final = name
        self._signature: Final = inspect.signature(function)
        self.parameters: Final = self._signature.parameters
        hints = get_type_hints(function, include_extras=True)
        self.paths: Final = frozenset(name for name, hint in hints.items() if _PATH in get_args(hint))
        self.inputs: Final = frozenset(name for name in self.paths if "input" in get_args(hints[name]))
        self.outputs: Final = self.paths - self.inputs

    def absolute(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Make relative paths absolute against this process's directory.

        Where arguments are missing, a positional one counts as a path also if the parameter after its own is one:
        a chain puts the previous result before it.

        Raises:
            InvalidArguments: A path begins with a `~` of somebody who has no home.
        """
        names = [name for name, parameter in self.parameters.items() if parameter.kind in _POSITIONAL]
        places = 1 if self._is_whole(args, kwargs) else 2

        def is_path(index: int) -> bool:
            return any(name in self.paths for name in names[index : index + places] or names[-1:])

        return (
            [_absolute(value) if is_path(index) else value for index, value in enumerate(args)],
            {name: _absolute(value) if name in self.paths else value for name, value in kwargs.items()},
        )

    def _is_whole(self, args: Any, kwargs: Mapping[str, Any]) -> bool:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def input_megabytes(self, parameters: Mapping[str, Any]) -> float:
        """The size of the inputs that can be seen from here."""
        total = 0
        for name in self.inputs & parameters.keys():
            with suppress(OSError, ValueError, TypeError):
                total += Path(parameters[name]).stat().st_size
        return total / 1e6

    def bind(self, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Bind a call, with each path as text: a job's result stands for the file that it wrote.

        Raises:
            InvalidArguments: Unknown or missing ones, or a path that is none.
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise InvalidArguments(f"{self._name}: {exc}; it takes {self._taken()}") from exc
        for name in self.paths & bound.arguments.keys():
            value = bound.arguments[name]
            is_many = self.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            bound.arguments[name] = tuple(_path(name, one) for one in value) if is_many else _path(name, value)
        return bound

    def _taken(self) -> str:
        """`input, output, width=, height=`: how each one is given."""
        return ", ".join(_FORMS.get(taken.kind, "{}").format(name) for name, taken in self.parameters.items())

    def by_name(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a message by name, as far as they fit."""
        with suppress(TypeError):
            return named(self._signature.bind_partial(*args, **kwargs))
        return dict(kwargs)

    def bind_absolute(self, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Bind a call at a worker, where a path must be absolute already.

        Raises:
            InvalidArguments: As `bind`.
            PathNotAllowed: A path is still relative; this process stands elsewhere than the one that submitted the job.
        """
        bound = self.bind(args, kwargs)
        for name in self.paths & bound.arguments.keys():
            value = bound.arguments[name]
            for path in value if isinstance(value, tuple) else (value,):
                if not Path(path).is_absolute():
                    raise PathNotAllowed(
                        f"{name}={path!r} is relative, and a worker stands in another directory than its caller; "
                        "give an absolute path"
                    )
        return bound


def named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Bound arguments by name, as people and SQL tools want to read them."""
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return flat


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and value and "://" not in value:
        try:
            return str(Path(value).expanduser().absolute())
        except RuntimeError as exc:
            raise InvalidArguments(f"{value!r:.200}: {exc}; give an absolute path") from exc
    return value


def _path(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("output"), str):
        value = value["output"]
    if not isinstance(value, str) or not value or "\0" in value:
        has_many = isinstance(value, Mapping) and "outputs" in value
        takes = "the path of one of its `outputs`" if has_many else "a path, or a job's result that names its output"
        raise InvalidArguments(f"{name} is {value!r:.80}; give {takes}")
    if "://" in value:
        raise InvalidArguments(f"{name}={value!r}: this release reads and writes local paths only")
    return value


# The options of a call


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of `apply_async` that would fail the job at its worker, or have its message come back for ever.
    The times are left to `due` and `expiry`.

    Raises:
        InvalidArguments: An option is misspelt, of the wrong kind or out of its range; or the task, or what follows it,
            is one of `MAPS`.
    """
    if name in MAPS or any(_has_map(options.get(option)) for option in _CANVAS):
        raise InvalidArguments(f"{name}: no worker serves map, starmap and chunks; send a group of the calls instead")
    known = _known_options()
    for option in options.keys() - known - set(options.get("stamped_headers") or ()):
        if near := get_close_matches(option, known, n=1, cutoff=0.8):
            raise InvalidArguments(f"{name}: no option is called {option}; did you mean {near[0]}?")
    for option, (is_usable, takes) in _USABLE.items():
        value = options.get(option)
        if value is not None and not is_usable(value):
            raise refused(name, option, value, takes)
    soft_s, hard_s = options.get("soft_time_limit"), options.get("time_limit")
    if soft_s and hard_s and soft_s >= hard_s:
        raise refused(name, "soft_time_limit", soft_s, f"below time_limit={hard_s!r}")


@cache
def _known_options() -> frozenset[str]:
    """What Celery and kombu take by name. Anything else is a property of the message, which may mean something to its
    reader; so only what is nearly one of these is refused.
    """
    from celery import Celery
    from celery.app.amqp import AMQP
    from celery.app.task import Task
    from kombu import Producer

    takers: list[Any] = [Celery.send_task, Task.apply_async, AMQP.as_task_v2, Producer.publish]
    taken = {name for taker in takers for name in inspect.signature(taker).parameters}
    return frozenset(taken | {"queue", "unique_key", "unique_for"})


def _has_map(step: Any) -> bool:
    if isinstance(step, (list, tuple)):
        return any(map(_has_map, step))
    if not isinstance(step, Mapping):
        return False
    kwargs = step.get("kwargs") or {}
    return step.get("task") in MAPS or any(_has_map(kwargs.get(inner)) for inner in ("tasks", "header", "body"))


def due(name: str, options: Mapping[str, Any]) -> datetime | None:
    """When it may run; None for at once: whatever is due later rests in its row, not in a worker's memory."""
    eta = options.get("eta")
    moment = (
        _time(name, "eta", eta, f"{_TIME} (countdown takes seconds)")
        if eta is not None
        else _after(name, "countdown", options.get("countdown"), f"{_SECONDS}, from now")
    )
    return moment if moment is not None and moment > datetime.now(UTC) else None


def expiry(name: str, options: Mapping[str, Any]) -> datetime | None:
    """When it is no longer worth running."""
    expires = options.get("expires")
    read = _time if isinstance(expires, (str, datetime)) else _after
    return read(name, "expires", expires, f"{_SECONDS}, from now, or {_TIME}")


def refused(name: str, option: str, value: Any, takes: str) -> InvalidArguments:
    return InvalidArguments(f"{name}: {option}={value!r:.80} must be {takes}")


def _time(name: str, option: str, value: Any, takes: str) -> datetime:
    """A time in UTC, from a datetime or from text."""
    if (moment := moment_of(value)) is None:
        raise refused(name, option, value, takes)
    return moment


def _after(name: str, option: str, value: Any, takes: str) -> datetime | None:
    """A time in UTC, from seconds from now."""
    if value is None:
        return None
    if not (is_number(value) and -LONGEST_S <= value <= LONGEST_S):
        raise refused(name, option, value, takes)
    return datetime.now(UTC) + timedelta(seconds=value)


def _are_signatures(value: Any) -> bool:
    steps = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(step, Mapping) for step in steps)


_USABLE: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "task_id": (is_name, f"a printable text of 1 to {LONGEST_NAME} characters"),
    "time_limit": (is_limit, _SECONDS),
    "soft_time_limit": (is_limit, _SECONDS),
    "unique_for": (is_number, _SECONDS),
    "retries": (is_whole, f"a whole number from 0 to {HIGHEST:,}"),
    "serializer": (lambda value: value == "json", "'json', which is all that workers accept"),
    "headers": (lambda value: isinstance(value, Mapping), "a dict"),
    "link": (_are_signatures, _SIGNATURE),
    "link_error": (_are_signatures, _SIGNATURE),
}
