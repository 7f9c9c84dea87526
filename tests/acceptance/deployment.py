"""A deployment of Media Tasks for tests: settings, workers, and the app of this process as a producer of it."""

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kombu import pools

from tasks.settings import settings
from tests.tooling.waiting import eventually
from tests.tooling.worker import REPOSITORY, Worker

READY_TIMEOUT_S = 60.0


class Deployment:
    """One server directory, database and broker; `app` is this process's app, pointed at them."""

    def __init__(self, server_dir: Path, log_dir: Path, env: Mapping[str, Any] | None = None) -> None:
        from tasks import app

        self.app = app
        self.server_dir = server_dir
        self.env = {"CL_SERVER_DIR": server_dir, "BROADCAST_TYPE": "noop", **(env or {})}
        self.workers: list[Worker] = []
        self._log_dir = log_dir
        self._numbers = itertools.count(1)

    def start_worker(
        self,
        *args: str,
        env: Mapping[str, Any] | None = None,
        plug_in: str = "tests.acceptance.capabilities",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> Worker:
        """A real worker, which also finds the tests' capabilities; waits until it is ready."""
        number = next(self._numbers)
        plug_ins = install_entry_point(self._log_dir / f"plug-ins-{plug_in}", plug_in)
        path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(plug_ins)]), "WORKER_ID": f"w{number}"}
        log_path = self._log_dir / f"worker-{number}.log"
        worker = Worker(*args, env={**path, **self.env, **(env or {})}, log_path=log_path)
        self.workers.append(worker)
        if ready_timeout_s:
            worker.wait_until_ready(ready_timeout_s)
        return worker

    def stop(self, worker: Worker) -> None:
        worker.clean_up()
        self.workers.remove(worker)

    @property
    def task(self) -> "_Tasks":
        """`deployment.task.add` is the task of that name."""
        return _Tasks(self.app)

    def row(self, job: Any) -> Any:
        """The task_queue row of a result or an id."""
        row = self.app.store.job(_id(job))
        assert row is not None, f"{_id(job)} has no row"
        return row

    def events(self, job: Any) -> list[str]:
        """The changes of a job, in order; their sequence numbers must be without a gap."""
        logs = self.app.store.logs(_id(job))
        assert [log["sequence"] for log in logs] == list(range(1, len(logs) + 1))
        return [log["event_type"] for log in logs]

    def wait_for(self, job: Any, *statuses: str, timeout_s: float = 20.0) -> Any:
        """Wait until the row stands at one of `statuses`; return it."""

        def row_there() -> Any:
            row = self.app.store.job(_id(job))
            return row if row is not None and row["status"] in statuses else None

        return eventually(row_there, timeout_s, lambda: f"{_id(job)} {statuses}: {self._story(job)}")

    def _story(self, job: Any) -> str:
        row = self.app.store.job(_id(job))
        return f"{dict(row) if row else None}, {[dict(log) for log in self.app.store.logs(_id(job))]}"


class _Tasks:
    def __init__(self, app: Any) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        return self._app.tasks[name]


def _id(job: Any) -> str:
    return str(getattr(job, "id", job))


@contextmanager
def deployed(server_dir: Path, log_dir: Path, env: Mapping[str, Any] | None = None) -> Iterator[Deployment]:
    """Point this process's app at a deployment; its workers are killed at the end, and none may leave a process."""
    deployment = Deployment(server_dir, log_dir, env)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in deployment.env.items():
            patch.setenv(name, str(value))
        try:
            forget_settings(deployment.app)
            importlib.import_module("tests.acceptance.capabilities")
            deployment.app.load_capabilities()
            yield deployment
        finally:
            for worker in list(deployment.workers):
                deployment.stop(worker)
            forget_settings(deployment.app)
    forget_settings(deployment.app)


def forget_settings(app: Any) -> None:
    """Have the app read its settings again, and close what it opened with the old ones."""
    pools.reset()  # kombu keeps closed ones, and finds them again by their URL
    app._pool = app._conf = app._backend_cache = None
    if "store" in app.__dict__:
        app.store.database.close()
    for name in ("settings", "store", "amqp", "control", "worker_id", "leases", "lease"):
        app.__dict__.pop(name, None)
    settings.cache_clear()
    sys.modules.pop("celeryconfig", None)
    app.loader._conf = None
    # Forced, since Celery reads them at once only if it has read some before: `app.amqp` wants them to be read, and the
    # first test of a process would find it otherwise than all others.
    app.config_from_object("celeryconfig", force=True)
    app._local.__dict__.pop("backend", None)


def install_entry_point(directory: Path, module: str, package: str = "media-tasks-test-capabilities") -> Path:
    """What pip writes for a package with a capability; put `directory` on PYTHONPATH."""
    info = directory / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[media_tasks.capabilities]\ntests = {module}\n")
    return directory


def lines(file: Path, begin: str = "") -> list[str]:
    """What task bodies left in a file."""
    content = file.read_text().splitlines() if file.exists() else []
    return [line for line in content if line.startswith(begin)]


def kill_pool_child_that_notes(file: Path) -> None:
    """Kill the process that runs the task `note` on this file, as the OOM killer does."""
    os.kill(int(lines(file.with_suffix(".pid"))[-1]), signal.SIGKILL)
