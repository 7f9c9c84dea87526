"""One deployment and one worker for each module; tests that kill a worker start one of their own."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from db import schema
from tests.acceptance.deployment import Deployment, deployed
from tests.tooling.worker import Worker


@pytest.fixture(scope="module")
def module_server_dir() -> Iterator[Path]:
    """A short path: unix sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="mt-")).resolve()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def deployment(
    request: pytest.FixtureRequest, module_server_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """The embedded broker and SQLite; no worker yet."""
    with deployed(module_server_dir, tmp_path_factory.mktemp("deployment")) as deployment:
        request.node.stash[DEPLOYMENT] = deployment
        yield deployment


@pytest.fixture(scope="module")
def worker(deployment: Deployment) -> Worker:
    """The module's worker: two pool children, every capability."""
    return deployment.start_worker("--concurrency=2")


@pytest.fixture
def own_env() -> dict[str, Any]:
    """The settings of a test's own deployment; a module may give others."""
    return {}


@pytest.fixture
def own(server_dir: Path, tmp_path: Path, own_env: dict[str, Any]) -> Iterator[Deployment]:
    """A deployment of this test's own, to be harmed."""
    with deployed(server_dir, tmp_path, own_env) as deployment:
        yield deployment


@pytest.fixture(params=["embedded", "rabbitmq", "redis"])
def broker(request: pytest.FixtureRequest) -> str:
    """A test that takes it, or `own_on_broker`, runs on each; on fewer by `parametrize("broker", …, indirect=True)`."""
    return str(request.param)


@pytest.fixture
def own_on_broker(
    request: pytest.FixtureRequest, broker: str, server_dir: Path, tmp_path: Path, own_env: dict[str, Any]
) -> Iterator[Deployment]:
    """As `own`, on a broker: the embedded one with SQLite, RabbitMQ or Redis with PostgreSQL."""
    env = dict(own_env)
    if broker != "embedded":
        env["CELERY_BROKER_URL"] = request.getfixturevalue(f"fresh_{broker}_url")
        env["DATABASE_URL"] = request.getfixturevalue("fresh_postgres_url")
    with deployed(server_dir, tmp_path, env) as deployment:
        if broker != "embedded":
            schema.upgrade(deployment.app.store.database)
        yield deployment


@pytest.fixture
def task(own: Deployment) -> Any:
    """Its tasks, by name."""
    return own.task


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the logs of the module's workers with a failure."""
    report = yield
    module = item.getparent(pytest.Module)
    deployment = module.stash.get(DEPLOYMENT, None) if module else None
    if report.failed and deployment is not None:
        for worker in deployment.workers:
            report.sections.append((f"worker {worker.pid}", worker.log()[-8000:]))
    return report


DEPLOYMENT = pytest.StashKey[Deployment]()
