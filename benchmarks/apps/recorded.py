"""The app of `tasks` with a capability that does nothing but tell when it began: a job with its row."""

import time
from typing import Any

from tasks.celery import app

__all__ = ["app", "tell_job_time"]


@app.task
def tell_job_time(*, sleep_s: float = 0.0) -> dict[str, Any]:
    """When the body began, in ns since 1970."""
    now_ns = time.time_ns()
    time.sleep(sleep_s)
    return {"began_ns": now_ns}
