"""Examples run in a process and a terminal of their own; whatever they leave running fails the test."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tooling import processes
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
TERMINAL = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("demo.py", *arguments, env={...}, **popen)` starts an example with an empty HOME and TMPDIR of its own."""
    mark = f"MEDIA_TASKS_TEST_EXAMPLE={uuid.uuid4().hex}"
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *args: object, env: dict[str, Any] | None = None, **popen: Any) -> subprocess.Popen[str]:
        environment = {name: value for name, value in without_settings(os.environ).items() if name not in TERMINAL}
        for name in ("home", "tmp"):
            (tmp_path / name).mkdir(exist_ok=True)
        environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(REPOSITORY)}
        environment |= dict([mark.split("=")]) | {name: str(value) for name, value in (env or {}).items()}
        command = [sys.executable, str(REPOSITORY / "examples" / script), *map(str, args)]
        options: dict[str, Any] = {
            "cwd": tmp_path,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        process = subprocess.Popen(command, env=environment, **(options | popen))
        started.append(process)
        return process

    yield run
    left = {pid: processes.command_line(pid) for process in started for pid in processes.marked(mark)}
    processes.send(left, processes.signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    eventually(lambda: not processes.marked(mark), 5)
    assert left == {}, "an example left processes running"


@pytest.fixture
def finish(start) -> Callable[..., tuple[int, str]]:
    """`finish(script, *arguments, timeout_s=60)` runs an example to its end: its exit code and what it printed."""

    def run(script: str, *args: object, timeout_s: float = 60, **options: Any) -> tuple[int, str]:
        process = start(script, *args, **options)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    return run
