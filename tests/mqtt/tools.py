"""`celery -A tasks mqtt ...` as its users run it: in this process, or in one of its own."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import paho.mqtt.publish
import pytest
from click.testing import Result
from paho.mqtt.client import MQTTv5

from tasks.cli.mqtt import mqtt
from tasks.settings import read_settings
from tasks.sinks import topics
from tests.cli.conftest import REPOSITORY, TERMINAL, Commands
from tests.mqtt.messages import checked
from tests.services import MosquittoServer
from tests.tooling.environment import without_settings


class Started:
    """A command in a process of its own. Its lines are kept as they come."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", "mqtt", *args],
            env=env,
            cwd=REPOSITORY,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._streams = {"out": self._process.stdout, "err": self._process.stderr}
        self._lines: dict[str, queue.Queue[str | None]] = {name: queue.Queue() for name in self._streams}
        self._readers = [
            threading.Thread(target=self._read, args=(stream, self._lines[name]))
            for name, stream in self._streams.items()
            if stream
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    def line(self, stream: str = "out", timeout_s: float = 15.0) -> str:
        """The next line, awaited; at the end of the stream, or of the time, the test fails."""
        try:
            line = self._lines[stream].get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no line on std{stream} for {timeout_s:g} s") from None
        assert line is not None, f"std{stream} ended; the other one: {self.rest('err' if stream == 'out' else 'out')}"
        return line

    def rest(self, stream: str = "out") -> list[str]:
        """All lines left, once it has ended."""
        lines = []
        while (line := self._lines[stream].get(timeout=15)) is not None:
            lines.append(line)
        return lines

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = 15.0) -> int:
        return self._process.wait(timeout_s)

    def clean_up(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(5)
        for stream in self._streams.values():
            if stream:
                stream.close()


class Tools(Commands):
    """The commands under settings of their own; `store` is the job table."""

    def __init__(self, server_dir: Path, **env: Any) -> None:
        super().__init__(server_dir / "media_store.db")
        self.env = {"CL_SERVER_DIR": str(server_dir)} | {name: str(value) for name, value in env.items()}
        self.settings = self.app.settings = read_settings(self.env)
        self._started: list[Started] = []

    def mqtt(self, *args: str, columns: int | None = None) -> Result:
        """Run a command in this process."""
        return self.run(mqtt, *args, columns=columns)

    def error(self, *args: str) -> str:
        """Run a command that fails; the one line that says why."""
        result = self.mqtt(*args)
        assert result.exit_code == 1, result.output
        *_, line = result.stderr.splitlines()
        assert line.startswith("Error: ")
        return line

    def start(self, *args: str) -> Started:
        """Run a command in a process of its own."""
        base = {name: value for name, value in without_settings(os.environ).items() if name not in TERMINAL}
        self._started.append(Started(args, base | {"PYTHONPATH": str(REPOSITORY)} | self.env))
        return self._started[-1]

    def publish(self, topic: str, *payloads: Any, is_retained: bool = False) -> None:
        """As another client does; objects as JSON."""
        texts = [one if isinstance(one, (str, bytes)) else json.dumps(one) for one in payloads]
        self.publish_all([{"topic": topic, "payload": text, "retain": is_retained} for text in texts])

    def publish_all(self, messages: list[dict[str, Any]]) -> None:
        paho.mqtt.publish.multiple(
            [message | {"qos": 1} for message in messages],
            hostname=self.settings.mqtt_broker,
            port=self.settings.mqtt_port,
            protocol=MQTTv5,
        )

    @property
    def prefix(self) -> str:
        """What its topics stand below."""
        return self.settings.mqtt_topic.rpartition("/")[0]

    def tell(self, *events: Any) -> None:
        self.publish(self.settings.mqtt_topic, *events)

    def show(self, worker_id: str, *capabilities: str, idle_count: int = 1, is_draining: bool = False) -> None:
        """A live worker's capability, retained."""
        payload = topics.capability(worker_id, capabilities, idle_count, is_draining=is_draining)
        checked("capability", payload)
        self.publish(f"{self.settings.capability_topic_prefix}/{worker_id}", payload, is_retained=True)

    def clean_up(self) -> None:
        self.store.database.close()
        for started in self._started:
            started.clean_up()


def event(job_id: str, sequence: int, change: str = "started", data: Any = None, **changed: Any) -> dict[str, Any]:
    """An event as a relay tells it."""
    payload = topics.event(
        topics.TOLD[change],
        job_id,
        data or {},
        progress=100.0 if change == "completed" else 0.0,
        task_type="image_resize",
        root_id=job_id,
        worker_id="edge-1",
        sequence=sequence,
        at=datetime.now(UTC),
    )
    return json.loads(payload) | changed


@pytest.fixture
def tools_for(server_dir: Path) -> Iterator[Callable[..., Tools]]:
    """`tools_for(port, prefix, **env)`: the commands on a broker; their topics stand below the prefix."""
    with contextlib.ExitStack() as ending:

        def make(port: int, prefix: str = "mt", **env: Any) -> Tools:
            mqtt_env = {
                "MQTT_BROKER": "127.0.0.1",
                "MQTT_PORT": port,
                "MQTT_TOPIC": f"{prefix}/events",
                "CAPABILITY_TOPIC_PREFIX": f"{prefix}/workers",
                "WORKER_ID": "worker-1",
            }
            tools = Tools(server_dir, **mqtt_env | env)
            ending.callback(tools.clean_up)
            return tools

        yield make


@pytest.fixture
def tools(tools_for: Callable[..., Tools], mosquitto: MosquittoServer) -> Tools:
    """The commands on the shared Mosquitto."""
    return tools_for(mosquitto.port, mosquitto.topic_prefix)
