"""Media jobs as Celery tasks. `from tasks import image_resize; image_resize.delay("in.jpg", "out.webp", width=800)`.

Importing this package does nothing: names are resolved on first use, so that a producer pays for what it names and
a submodule (the embedded broker, say) can be used without the app.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.celery import app as app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Resolve `app` and the task of each known capability."""
    if name.startswith("_"):
        raise AttributeError(name)
    from tasks.celery import app

    if name == "app":
        return app
    try:
        return app.tasks[name]
    except KeyError:
        raise AttributeError(f"module 'tasks' has no attribute {name!r}") from None
