"""Fixtures for real servers and real workers.

Where RabbitMQ, Redis, PostgreSQL or Mosquitto answer on their standard local ports, or their programs are installed,
the tests that need them run; elsewhere they skip with a line that says what was missing. With CI=true a missing
server is a failure.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from tests import services
from tests.tooling import waiting
from tests.tooling.environment import forget_host_settings, is_setting
from tests.tooling.worker import Worker

Server = TypeVar("Server")
Private = TypeVar("Private", bound=services.PrivateServer)


def pytest_configure() -> None:
    """Before any module is collected: some read their settings when they are imported.

    What nohup or a shell without job control has made this process ignore, the workers of tests would ignore, too.
    """
    forget_host_settings()
    for signum, as_in_a_terminal in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, as_in_a_terminal)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures know whether their test failed."""
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


FAILED = pytest.StashKey[bool]()


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"true", "1"}


def missing(what: str) -> NoReturn:
    """Skip the test with the reason; fail it in CI."""
    if in_ci():
        pytest.fail(f"{what} (a missing server is a failure in CI)", pytrace=False)
    pytest.skip(what)


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Turn what is missing into the outcome of the test."""
    try:
        yield
        return
    except services.ServiceMissing as exc:
        reason = str(exc)
    missing(reason)


@contextlib.contextmanager
def standard_or_private(
    name: str, port: int, standard: Server | None, private: type[services.PrivateServer]
) -> Iterator[Server]:
    """The server that answers on its standard port, else one of our own, started for the whole test run."""
    if standard is not None:
        yield standard
        return
    with required():
        try:
            server = private()
        except services.ServiceMissing as exc:
            raise services.ServiceMissing(f"{name} gives no access on local port {port}, and {exc}") from None
    try:
        server.start()
        yield server.server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[services.PostgresServer]:
    """A PostgreSQL server; `with postgres_server.database() as url` makes a database."""
    with standard_or_private("PostgreSQL", 5432, services.standard_postgres(), services.PrivatePostgres) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres_server: services.PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of a database of this test run."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def fresh_postgres_url(postgres_server: services.PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[services.RabbitmqServer]:
    """A RabbitMQ server in which vhosts can be made; `with rabbitmq_server.vhost() as url` makes one.

    A server on the standard port that does not let this user run rabbitmqctl is passed over for one of our own; if
    the program isn't installed either, the default vhost is shared (see `rabbitmq_queue_prefix`).
    """
    standard = services.standard_rabbitmq()
    if standard and not standard.control and services.find_program("rabbitmq-server"):
        standard = None
    with standard_or_private("RabbitMQ", 5672, standard, services.PrivateRabbitmq) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_url(rabbitmq_server: services.RabbitmqServer) -> Iterator[str]:
    """AMQP URL of a vhost of this test run (the default vhost where none can be made)."""
    if not rabbitmq_server.control:
        yield rabbitmq_server.url()
        return
    with required(), rabbitmq_server.vhost() as url:
        yield url


@pytest.fixture(scope="session")
def rabbitmq_queue_prefix(rabbitmq_server: services.RabbitmqServer) -> str:
    """Empty in a vhost of our own; in a shared default vhost, what the names of all queues must begin with."""
    return "" if rabbitmq_server.control else f"{services.unique_name()}_"


@pytest.fixture
def fresh_rabbitmq_url(rabbitmq_server: services.RabbitmqServer) -> Iterator[str]:
    """AMQP URL of an empty vhost of this test (takes about 2 s)."""
    if not rabbitmq_server.control:
        missing(
            "no vhost can be made: run the tests as root or as the user rabbitmq, or install RabbitMQ's server here"
        )
    with required(), rabbitmq_server.vhost() as url:
        yield url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[services.RedisServer]:
    """A Redis server; `with redis_server.database() as url` takes a database number."""
    with standard_or_private("Redis", 6379, services.standard_redis(), services.PrivateRedis) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: services.RedisServer) -> Iterator[str]:
    """URL of a database number of this test run."""
    with required(), redis_server.database() as url:
        yield url


@pytest.fixture
def fresh_redis_url(redis_server: services.RedisServer) -> Iterator[str]:
    """URL of an empty database number of this test."""
    with required(), redis_server.database() as url:
        yield url


@pytest.fixture(scope="session")
def redis_options() -> dict[str, str]:
    """Broker transport options that keep the keys of this test run apart even in a shared database number."""
    return {"global_keyprefix": f"{services.unique_name()}:"}


@pytest.fixture(scope="session")
def mosquitto_server() -> Iterator[services.MosquittoServer]:
    with standard_or_private("Mosquitto", 1883, services.standard_mosquitto(), services.PrivateMosquitto) as server:
        yield server


@pytest.fixture
def mosquitto(mosquitto_server: services.MosquittoServer) -> Iterator[services.MosquittoServer]:
    """An MQTT broker: `host`, `port`, and the `topic_prefix` of this test; nothing retained under it stays."""
    with mosquitto_server.prefix() as mine:
        yield mine


def _private(kind: type[Private]) -> Iterator[Callable[..., Private]]:
    with contextlib.ExitStack() as running:

        def start(*args: Any, **kwargs: Any) -> Private:
            with required():
                server = kind(*args, **kwargs)
            running.callback(server.remove)
            server.start()
            return server

        yield start


@pytest.fixture
def private_postgres() -> Iterator[Callable[..., services.PrivatePostgres]]:
    """`private_postgres(port=None)` starts a PostgreSQL that the test may stop, freeze or kill; takes about 2 s."""
    yield from _private(services.PrivatePostgres)


@pytest.fixture
def private_redis() -> Iterator[Callable[..., services.PrivateRedis]]:
    """`private_redis(*options, port=None)` starts a Redis that the test may stop, freeze or kill."""
    yield from _private(services.PrivateRedis)


@pytest.fixture
def private_rabbitmq() -> Iterator[Callable[..., services.PrivateRabbitmq]]:
    """`private_rabbitmq(port=None)` starts a RabbitMQ that the test may stop, freeze or kill; takes about 5 s."""
    yield from _private(services.PrivateRabbitmq)


@pytest.fixture
def private_mosquitto() -> Iterator[Callable[..., services.PrivateMosquitto]]:
    """`private_mosquitto(*lines, port=None, allow_anonymous=True)` starts an MQTT broker to stop, freeze or kill."""
    yield from _private(services.PrivateMosquitto)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting of Media Tasks or Celery in the environment, whatever earlier tests left; restored afterwards."""
    for name in filter(is_setting, list(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def server_dir() -> Iterator[Path]:
    """An empty CL_SERVER_DIR, also set in this process's environment.

    Its path is short: a unix socket's path holds about 100 bytes, and pytest's own folders are longer than that.
    """
    path = Path(tempfile.mkdtemp(prefix="mt-")).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_SERVER_DIR", str(path))
        yield path
    if (loaded := sys.modules.get("tasks.celery")) is not None:  # it may have read its settings since the test's end
        from tests.acceptance.deployment import forget_settings

        forget_settings(loaded.app)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """`eventually(predicate, timeout_s=10, message="")`; also importable from tests.tooling.waiting."""
    return waiting.eventually


@pytest.fixture
def run_worker(request: pytest.FixtureRequest, tmp_path: Path, server_dir: Path) -> Iterator[Callable[..., Worker]]:
    """Start real workers: `run_worker("-Q", "image_resize", env={...}, app="tasks", ready_timeout_s=30)`.

    The environment is this process's without its settings, plus CL_SERVER_DIR=server_dir and BROADCAST_TYPE=noop, plus
    `env`. Waits for the line that says "ready."; `ready_timeout_s=0` doesn't wait. At the end of the test every worker
    is killed, and the test fails if a process of one is left. The logs of a failed test are printed.
    """
    workers: list[Worker] = []
    numbers = itertools.count(1)

    def start(
        *args: str,
        app: str = "tasks",
        env: dict[str, Any] | None = None,
        cwd: Path | None = None,
        ready_timeout_s: float = 30.0,
    ) -> Worker:
        settings = {"CL_SERVER_DIR": server_dir, "BROADCAST_TYPE": "noop", **(env or {})}
        where = {"cwd": cwd} if cwd else {}
        worker = Worker(*args, app=app, env=settings, log_path=tmp_path / f"worker-{next(numbers)}.log", **where)
        workers.append(worker)
        if ready_timeout_s:
            worker.wait_until_ready(ready_timeout_s)
        return worker

    yield start
    if request.node.stash.get(FAILED, False):
        for worker in workers:
            print(f"\n--- log of worker {worker.pid}: {' '.join(worker.args[2:])}\n{worker.log()}")
    with contextlib.ExitStack() as ending:
        for worker in workers:
            ending.callback(worker.clean_up)
