"""A plain Celery app, which knows nothing of jobs or rows: the broker alone, the same settings for each broker."""

import os
import time
from pathlib import Path

from celery import Celery

import tasks.broker

tasks.broker.register()

app = Celery("plain", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    task_default_queue="bench",
)


@app.task
def nothing() -> None:
    """The smallest task."""


@app.task
def tell_time(path: str) -> None:
    """Write when it began, in ns since 1970."""
    now_ns = time.time_ns()
    target = Path(path)
    target.with_suffix(".part").write_text(str(now_ns))
    target.with_suffix(".part").rename(target)
