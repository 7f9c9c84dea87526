"""Commands run as their users run them: `celery` in a process of its own, or in this one on a store of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from db.engine import Database
from db.records import Claim, Heartbeat, Liveness, NewJob, now
from db.store import Store
from tasks.celery import MediaTasks
from tests.acceptance.deployment import install_entry_point
from tests.tooling.environment import without_settings

REPOSITORY = Path(__file__).resolve().parents[2]
TERMINAL = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """What it said last on stderr; a traceback, usage without a message, or nothing fails the test."""
        lines = self.stderr.strip().splitlines()
        assert "Traceback" not in self.stderr, self.stderr
        assert lines, f"exit code {self.returncode} without a word"
        assert lines[-1].startswith("Error: "), self.stderr
        return lines[-1]


@pytest.fixture
def celery(server_dir: Path, tmp_path: Path) -> Callable[..., Ran]:
    """`celery("jobs", "list", app="tasks", env={...}, cwd=...)` runs `celery -A tasks ...` on this test's files."""

    def run(
        *args: object,
        app: str | None = "tasks",
        env: dict[str, Any] | None = None,
        cwd: Path = tmp_path,
        stdout: Any = subprocess.PIPE,
    ) -> Ran:
        environment = {name: value for name, value in without_settings(os.environ).items() if name not in TERMINAL}
        environment |= {"PYTHONPATH": str(REPOSITORY), "CL_SERVER_DIR": str(server_dir), "BROADCAST_TYPE": "noop"}
        environment |= {name: str(value) for name, value in (env or {}).items()}
        command = [sys.executable, "-m", "celery", *(["-A", app] if app else []), *map(str, args)]
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def plug_ins(tmp_path: Path) -> dict[str, str]:
    """The environment of commands and workers that know the tests' capabilities as well."""
    directory = install_entry_point(tmp_path / "plug-ins", "tests.acceptance.capabilities")
    return {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(directory)])}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.effect_noise((320, 240), 40).convert("RGB").save(path)
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.jpg"
    path.write_text("this is no photo")
    return path


class Commands:
    """The commands of an app on a job table of its own, in this process; `store` is that table."""

    def __init__(self, path: Path) -> None:
        self.app = MediaTasks("commands", set_as_current=False, config_source="celeryconfig")
        self.store = self.app.store = Store(Database(f"sqlite:///{path}"))

    def run(self, command: click.Command, *args: str, columns: int | None = None) -> Result:
        context = SimpleNamespace(app=self.app, no_color=False)
        env = dict.fromkeys(TERMINAL) | {"COLUMNS": str(columns) if columns else None}
        return CliRunner(env=env).invoke(command, args, obj=context)

    def job(self, job_id: str, *, is_resting: bool = False, **columns: Any) -> NewJob:
        """A queued job; a resting one has no message."""
        parameters = {"input": "/data/photos/in.jpg", "output": "/data/out.webp", "width": 800}
        values = {"task_type": "image_resize", "queue": "image_resize", "parameters": parameters, **columns}
        message = {"args": [], "kwargs": values["parameters"], "options": {}}
        job = NewJob(job_id=job_id, **{"message": message, **values})
        assert self.store.enqueue(job, is_resting=is_resting)
        return job

    def worker(self, worker_id: str, *queues: str, concurrency: int = 1, **shown: Any) -> None:
        """A live worker, as its heartbeat shows it."""
        own = {"hostname": "here", "pid": 1, "status": "idle", "started_at": now(), **shown}
        self.store.heartbeat(Heartbeat(worker_id=worker_id, capabilities=queues, concurrency=concurrency, **own))

    def claim(self, job: NewJob, worker_id: str = "edge-1") -> Claim:
        """A claim as the guard makes it for a first delivery."""
        return self.store.claim(
            job.job_id,
            unknown=lambda: job,
            publication=1,
            worker_id=worker_id,
            lease=f"lease of {worker_id}",
            judge=lambda _holder: Liveness.ALIVE,
            max_deaths=3,
        )


@pytest.fixture
def commands(server_dir: Path) -> Iterator[Commands]:
    commands = Commands(server_dir / "media_store.db")
    yield commands
    commands.store.database.close()
