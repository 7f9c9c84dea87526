"""A Celery app that needs no server, for the tests of the worker fixture."""

import os
import subprocess

from celery import Celery
from celery.signals import worker_process_init

app = Celery("sample", broker="memory://")
app.conf.worker_proc_alive_timeout = 30


@worker_process_init.connect
def on_worker_process_init(**_: object) -> None:
    """Start, if the test asks for it, a grandchild that leaves the process group and outlives everyone."""
    if command := os.environ.get("SAMPLE_GRANDCHILD"):
        subprocess.Popen(command.split(), start_new_session=True)
