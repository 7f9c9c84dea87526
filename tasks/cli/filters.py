"""The filter `--task`: what is said when it leaves nothing. In: the name as typed. Out: one line, or None."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


def unknown_task(app: "MediaTasks", task_type: str) -> str | None:
    """That neither a capability nor a job has this name, with the nearest name that one has; None if one has it."""
    from tasks import capabilities

    app.load_capabilities()
    served = {queue for worker in app.live_workers() for queue in worker["capabilities"]}
    known = {*capabilities.names(app), *served, *app.store.counts()}
    if task_type in known:
        return None
    hint = capabilities.nearest(task_type, known) or f"; known: {', '.join(sorted(known))}"
    return f"no job of {task_type}, and no capability has that name{hint}"
