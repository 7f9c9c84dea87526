"""A Celery app for the broker's tests. BROKER names the file, POLL and STRATEGY are transport options."""

import json
import os
import time
from pathlib import Path

from celery import Celery

import tasks.broker

tasks.broker.register()

app = Celery("small", broker=os.environ["BROKER"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=int(os.environ.get("MULTIPLIER", "1")),
    broker_transport_options=json.loads(os.environ.get("OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
)


@app.task
def nothing():
    pass


@app.task(bind=True)
def record(self, file, text="", sleep_s=0.0):
    """Append `text`, whether it came again and how often, before and after a sleep."""
    info = self.request.delivery_info
    count = self.request.properties["delivery_info"]["delivery_count"]
    with Path(file).open("a") as stream:
        stream.write(f"begin {text} {info['redelivered']} {count}\n")
    time.sleep(sleep_s)
    with Path(file).open("a") as stream:
        stream.write(f"end {text}\n")
