"""A task's arguments, read from its declaration.

In: positional and keyword arguments as somebody called, or as a message brought them. Out: the same with absolute
paths, or bound to their names; or `InvalidArguments`. Nothing is opened.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

from tasks.errors import InvalidArguments, PathNotAllowed

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
