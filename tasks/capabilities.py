"""Discovery: which task types exist here. A task type is declared once, in a module that is found, and nowhere else.

In: the built-in modules and the entry points of installed packages (group `media_tasks.capabilities`, each naming a
module that declares tasks with `@app.task`). Out: tasks in the registry; queue, route, rows and CLI follow from them.
"""

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from tasks.errors import SettingsError
from tasks.settings import settings

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)

GROUP: Final = "media_tasks.capabilities"
BUILT_IN: Final = ("tasks.images",)
OWN_PREFIX: Final = "celery."


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


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean image_resize?"`, or nothing."""
    matches = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
