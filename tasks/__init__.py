"""Media jobs as Celery tasks. `from tasks import image_resize; image_resize.delay("in.jpg", "out.webp", width=800)`.

Importing this package does nothing: `app` and the task of each capability are resolved on first use, so that a producer
pays for what it names, and a submodule (the embedded broker, say) can be used without the app.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.celery import app as app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Resolve `app`, and the task of each known capability. Python asks here before it looks for a submodule."""
    if name.startswith("_") or find_spec(f"tasks.{name}") is not None:
        raise AttributeError(f"module 'tasks' has no attribute {name!r}")
    from tasks.celery import app

    if name == "app":
        return app
    app.load_capabilities()
    if name not in app.tasks:
        raise AttributeError(f"module 'tasks' has no attribute {name!r}; it is no capability that is installed here")
    return app.tasks[name]
