"""A deployment whose workers speak MQTT, and listeners."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.deployment import Deployment, deployed
from tests.conftest import FAILED
from tests.mqtt.certificates import certificates  # noqa: F401 (a fixture)
from tests.mqtt.listener import Listener
from tests.mqtt.tools import tools, tools_for  # noqa: F401 (fixtures)
from tests.services import MosquittoServer


@pytest.fixture
def prefix(mosquitto: MosquittoServer) -> str:
    """Topics and WORKER_IDs of this test begin with it; nothing retained below it stays."""
    return mosquitto.topic_prefix


@pytest.fixture
def listen(prefix: str) -> Iterator[Callable[..., Listener]]:
    """`listen(port)` subscribes to all of this test's topics, or to those below another `prefix`."""
    listeners: list[Listener] = []

    def start(port: int, **options: Any) -> Listener:
        listeners.append(Listener(port, **{"prefix": prefix} | options))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


@pytest.fixture
def deploy(
    request: pytest.FixtureRequest, server_dir: Path, tmp_path: Path, prefix: str
) -> Iterator[Callable[..., Deployment]]:
    """`deploy(port, **env)`: a deployment on the embedded broker, or on what `env` says."""
    with contextlib.ExitStack() as stack:

        def start(port: int, **env: Any) -> Deployment:
            mqtt = {
                "BROADCAST_TYPE": "mqtt",
                "MQTT_BROKER": "127.0.0.1",
                "MQTT_PORT": port,
                "MQTT_TOPIC": f"{prefix}/events",
                "CAPABILITY_TOPIC_PREFIX": f"{prefix}/workers",
                "WORKER_ID": f"{prefix}-w",
            }
            deployment = stack.enter_context(deployed(server_dir, tmp_path, mqtt | env))
            stack.callback(_show_logs, request, deployment)
            return deployment

        yield start


def _show_logs(request: pytest.FixtureRequest, deployment: Deployment) -> None:
    if request.node.stash.get(FAILED, False):
        for worker in deployment.workers:
            print(f"--- log of worker {worker.pid}\n{worker.log()[-8000:]}")


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], mosquitto: MosquittoServer) -> Deployment:
    """On the shared Mosquitto; no worker yet."""
    return deploy(mosquitto.port)


@pytest.fixture
def listener(listen: Callable[..., Listener], mosquitto: MosquittoServer) -> Listener:
    return listen(mosquitto.port)


@pytest.fixture
def worker_id(prefix: str) -> str:
    return f"{prefix}-w"
