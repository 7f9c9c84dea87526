"""The app of `tasks` with capabilities that do nothing but tell when they ran: jobs with their rows."""

import os
import time
from pathlib import Path
from typing import Any

from tasks.celery import app
from tasks.errors import TransientError
from tasks.job import Job

__all__ = ["app", "fail_once", "stay", "tell_job_time"]


@app.task
def tell_job_time(*, sleep_s: float = 0.0) -> dict[str, Any]:
    """When the body began, in ns since 1970."""
    now_ns = time.time_ns()
    time.sleep(sleep_s)
    return {"began_ns": now_ns}


@app.task(bind=True)
def fail_once(self: Job) -> None:
    """An error that passes: the second attempt works."""
    if not self.request.retries:
        raise TransientError("the network is away")


@app.task
def stay(file: str, seconds: float) -> None:
    """Write down the process and the time at which it began, and stay for a while; the second time it goes at once."""
    began = Path(file)
    is_first = not began.exists()
    with began.open("a") as stream:
        stream.write(f"{os.getpid()} {time.time_ns()}\n")
    time.sleep(seconds if is_first else 0.0)
