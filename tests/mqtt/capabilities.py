"""Task types for the tests of MQTT, found by workers that are started with `plug_in="tests.mqtt.capabilities"`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from tasks.celery import app
from tasks.errors import TransientError
from tasks.job import Job


@app.task(bind=True)
def rise(self: Job, seconds: float, every_s: float = 0.01) -> int:
    """Say how far it is, all the time; how often it did."""
    started, reports = time.monotonic(), 0
    while (passed_s := time.monotonic() - started) < seconds:
        self.progress(100 * passed_s / seconds)
        reports += 1
        time.sleep(every_s)
    return reports


@app.task
def weigh(size_bytes: int) -> str:
    """A result of this length."""
    return "x" * size_bytes


@app.task
def hold() -> dict[str, Any]:
    """What this process holds: its connections over TCP, and modules of MQTT's client."""
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    ports = [int(row[2].rpartition(":")[2], 16) for row in rows if row[9] in inodes]
    return {"ports": ports, "modules": [name for name in sys.modules if name.startswith("paho")], "pid": os.getpid()}


@app.task(bind=True)
def follow(self: Job, file: str) -> None:
    """Say that it is as far as the file's last line says, up or down, until that is "end". "retry" fails it once."""
    while (line := _last_line(Path(file))) != "end":
        if line == "retry" and not self.request.retries:
            raise TransientError("one more attempt")
        if line.isdecimal():
            self.progress(float(line), stage=line)
        time.sleep(0.05)


def _last_line(file: Path) -> str:
    return ["", *(file.read_text().splitlines() if file.exists() else [])][-1]
