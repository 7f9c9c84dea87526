"""Where a process of a deployment is killed: loaded by workers as a plug-in, after the tests' capabilities.

`CRASH_AT=name` names a point, `CRASH_FILE` a file that is made there, so that only the first process to pass is killed.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.acceptance.capabilities  # noqa: F401 (its tasks)


def crash_once(name: str) -> None:
    """Die here as by `kill -9`, if this is the point and nobody has died there before."""
    if os.environ.get("CRASH_AT") != name:
        return
    try:
        Path(os.environ["CRASH_FILE"]).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, method: str, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    _wrap(owner, method, name, when, is_after=False)


def after(owner: Any, method: str, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    _wrap(owner, method, name, when, is_after=True)


def _wrap(owner: Any, method: str, name: str, when: Callable[..., bool], *, is_after: bool) -> None:
    original = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not is_after and when(*args, **kwargs):
            crash_once(name)
        result = original(*args, **kwargs)
        if is_after and when(*args, **kwargs):
            crash_once(name)
        return result

    setattr(owner, method, wrapped)


def install() -> None:
    """Wrap the functions around which it matters."""
    if "CRASH_AT" not in os.environ:
        return
    from db.store import Store
    from tasks.job import Job
    from tasks.outgoing import Outlet
    from tasks.request import JobRequest
    from tasks.results import JobBackend

    after(Store, "claim", "claimed")
    before(Job, "confirm", "before the rename")
    before(JobBackend, "mark_as_done", "before completed")
    after(Store, "complete", "completed")
    after(Store, "_fire", "chord fired")
    after(Store, "end", "failed", lambda *_, **__: True)
    after(Store, "requeue", "requeued")
    after(Store, "take_due", "due taken")
    after(Outlet, "send", "due sent")
    after(JobRequest, "_close", "closed")
    before(JobRequest, "acknowledge", "before the acknowledgement")


install()
