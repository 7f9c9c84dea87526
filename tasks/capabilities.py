"""Discovery: which task types exist here. A task type is declared once, in a module that is found, and nowhere else.

In: the built-in modules and the entry points of installed packages (group `media_tasks.capabilities`, each naming a
module that declares tasks with `@app.task`). Out: tasks in the registry; queue, route, rows and CLI follow from them.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from tasks.errors import SettingsError
from tasks.settings import settings

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

GROUP: Final = "media_tasks.capabilities"
BUILT_IN: Final = ("tasks.images",)
OWN_PREFIX: Final = "celery."
TRY_WITHIN_S: Final = 30.0
TRIES: Final = 3
NOT_INSTALLED: Final = "is not installed"


@dataclass(frozen=True, slots=True)
class Engines:
    """What they can't do here. `unusable`: {module: what is wrong with it}, `formats`: {image format: why it fails}."""

    unusable: dict[str, str]
    formats: dict[str, str] = field(default_factory=dict)

    def lacked_by(self, task: Any) -> dict[str, str]:
        """{module: what is wrong with it} of those that a task needs."""
        return {module: self.unusable[module] for module in getattr(task, "requires", ()) if module in self.unusable}


def load_built_in() -> None:
    """Import the modules of this distribution that declare tasks."""
    for module in BUILT_IN:
        import_module(module)


def load_installed() -> None:
    """Import the plug-ins of installed packages; a broken one is named in the log with its reason, and left out."""
    for entry_point in entry_points(group=GROUP):
        try:
            entry_point.load()
        except Exception as exc:
            package = entry_point.dist.name if entry_point.dist else "an unknown package"
            logger.error(
                "capability plug-in %r of %s is left out: it can't be imported (%s)",
                entry_point.name,
                package,
                _reason(exc),
                exc_info=exc if _is_debugging() else None,
            )


def _reason(exc: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())


def _is_debugging() -> bool:
    """Whether tracebacks are wanted; plug-ins are imported before a worker's log is set up."""
    return settings().log_level == "DEBUG" or logger.isEnabledFor(logging.DEBUG)


def names(app: "MediaTasks") -> list[str]:
    """All capabilities that are declared, sorted."""
    return sorted(name for name in app.tasks if not name.startswith(OWN_PREFIX))


def check_strategies(app: "MediaTasks", *, is_quiet: bool = False) -> None:
    """Look for slips in QUEUE_STRATEGY. A queue that is no capability's is warned of: `-Q` may serve it by its name.

    Raises:
        SettingsError: It is nearly a capability's name.
    """
    known = names(app)
    for queue in app.settings.queue_strategy:
        if queue == "*" or queue in known:
            continue
        if hint := nearest(queue, known):
            raise SettingsError(f"QUEUE_STRATEGY: no queue is called {queue}{hint}")
        if not is_quiet:
            logger.warning(
                "QUEUE_STRATEGY: %s is no capability's queue; it counts for workers with -Q %s only (known: %s, *)",
                queue,
                queue,
                ", ".join(known),
            )


def try_engines(tasks: Iterable[Any]) -> Engines:
    """Try the engines that these tasks need, in a process of its own: libvips touched before a fork hangs children."""
    needed = sorted({module for task in tasks for module in getattr(task, "requires", ())})
    found = Engines({module: NOT_INSTALLED for module in needed if find_spec(module) is None})
    left = [module for module in needed if module not in found.unusable]
    while left:
        left = left[_try_some(left, found) :]
    return found


def _try_some(modules: Sequence[str], found: Engines) -> int:
    """Try the first of them, up to one that ends the process; how many that were."""
    for _ in range(TRIES):
        said, end, is_killed = _try(modules)
        if not is_killed:  # by somebody else: engines don't end themselves so
            break
    tried = 0
    for line in said.splitlines():
        answer = json.loads(line)
        if "format" in answer:
            found.formats[answer["format"]] = answer["reason"]
            continue
        tried += 1
        if answer["reason"] is not None:
            found.unusable[answer["module"]] = f"can't be used: {answer['reason']}"
    if tried < len(modules):
        found.unusable[modules[tried]] = end
        tried += 1
    return tried


def _try(modules: Sequence[str]) -> tuple[str, str, bool]:
    """What the process says, how it ended, and whether it was killed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "tasks.media.engines", *modules]
    try:
        done = subprocess.run(  # noqa: S603 (names of modules that tasks declare)
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRY_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stdout or b""
        return said.decode() if isinstance(said, bytes) else said, f"does not load within {TRY_WITHIN_S:g} s", False
    *_, last = ["", *done.stderr.splitlines()]
    end = f"can't be used: its import ends the process with code {done.returncode} {last}".rstrip()
    return done.stdout, end, -done.returncode in (signal.SIGKILL, signal.SIGTERM)


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean image_resize?"`, or nothing."""
    matches = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
