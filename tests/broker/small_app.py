"""A Celery app for the broker's tests; SMALL_BROKER is its URL and SMALL_OPTIONS its transport options as JSON."""

import json
import os
import time
from pathlib import Path

from celery import Celery

import tasks.broker


def make_app(url: str, **options: object) -> Celery:
    tasks.broker.register()
    app = Celery("small", broker=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=30,
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
    )
    return app


app = make_app(os.environ.get("SMALL_BROKER", "memory://"), **json.loads(os.environ.get("SMALL_OPTIONS", "{}")))


@app.task(name="record", bind=True)
def record(self, file: str, text: str = "", sleep_s: float = 0.0) -> None:
    """Append a line at the begin and at the end: the text, whether it came again, and how often it came."""
    redelivered = self.request.delivery_info["redelivered"]
    count = self.request.properties["delivery_info"]["delivery_count"]
    with Path(file).open("a") as stream:
        stream.write(f"begin {text} {redelivered} {count}\n")
    time.sleep(sleep_s)
    with Path(file).open("a") as stream:
        stream.write(f"end {text}\n")
