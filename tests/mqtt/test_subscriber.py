"""A subscriber that knows only the README: it hears every change of a run of 200 jobs, in which two workers die: first
the one that relays, then one that runs a job. It waits for a broker that is not there yet, and says what it missed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.publish
import pytest
from paho.mqtt.client import MQTTv5

from tests.acceptance.deployment import lines
from tests.mqtt.messages import checked
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually, stays
from tests.tooling.worker import REPOSITORY, Worker

pytestmark = pytest.mark.slow
JOBS = 200


def readmes_subscriber() -> str:
    """The Python code of the README's section on MQTT."""
    section = (REPOSITORY / "README.md").read_text().split("## MQTT", 1)[1].split("\n## ", 1)[0]
    return section.split("```python\n", 1)[1].split("```", 1)[0]


def heard_by(path: Path) -> list[dict]:
    return [json.loads(line) for line in lines(path)]


@contextmanager
def subscribed(log: Path, host: str, port: int, topic: str) -> Iterator[None]:
    """The README's subscriber in a process of its own: what it hears goes to `log`, and its stderr to `log`.err."""
    env = without_settings(os.environ) | {
        "MQTT_BROKER": host, "MQTT_PORT": str(port), "MQTT_TOPIC": topic, "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with log.open("wb") as stream, log.with_suffix(".err").open("wb") as errors:
        subscriber = subprocess.Popen(
            [sys.executable, "-c", readmes_subscriber()], env=env, stdout=stream, stderr=errors
        )
    try:
        yield
    finally:
        subscriber.terminate()
        subscriber.wait(10)


def test_the_readmes_subscriber_hears_every_change_of_every_job(deploy, prefix, mosquitto, tmp_path):
    own = deploy(mosquitto.port)
    log = tmp_path / "heard"
    with subscribed(log, mosquitto.host, mosquitto.port, f"{prefix}/events"):
        workers, jobs, caught = {}, [], []

        def start_worker(name: str) -> None:
            workers[name] = own.start_worker("--concurrency=2", env={"WORKER_ID": name})

        def submit_caught() -> Worker:
            caught.append(own.task.dawdle.delay(str(tmp_path / str(len(caught))), 120.0, 0.0))
            jobs.append(caught[-1])
            return workers[own.wait_for(caught[-1], "running")["claimed_by"]]

        start_worker(f"{prefix}-relay")
        relay = eventually(lambda: own.app.store.duty_holder("relay"), 15)
        probe = own.task.add.delay(0, 0)
        eventually(lambda: any(event["job_id"] == probe.id for event in heard_by(log)), 20)
        victim = submit_caught()
        for number in range(2):
            start_worker(f"{prefix}-{number}")

        while len(jobs) < JOBS:
            if len(jobs) == 60:
                assert own.app.store.duty_holder("relay") == relay
                victim.kill9_everything()
            if len(jobs) == 120:
                submit_caught().kill9_everything()
            jobs.append(own.task.note.delay("/dev/null", str(len(jobs)), 0.03))
        for job in jobs:
            job.get(timeout=90)

        def all_ended() -> bool:
            ended = {event["job_id"] for event in heard_by(log) if event["event_type"] == "completed"}
            return ended >= {job.id for job in jobs}

        eventually(all_ended, 60)
        assert own.app.store.duty_holder("relay") != relay

    changes: dict[str, list[dict]] = {job.id: [] for job in jobs}
    for line in lines(log):
        checked("event", line)
    for event in heard_by(log):
        if event["job_id"] in changes:
            changes[event["job_id"]].append(event)
    for job in jobs:
        told = [log["sequence"] for log in own.app.store.logs(job.id)]
        assert [event["sequence"] for event in changes[job.id]] == told
    for job in caught:
        assert "lost" in [event["event_type"] for event in changes[job.id]]


def test_the_readmes_subscriber_waits_for_a_broker_that_is_not_there_yet_and_says_what_it_missed(
    private_mosquitto, tmp_path
):
    broker, log = private_mosquitto(), tmp_path / "heard"
    broker.stop()
    with subscribed(log, "127.0.0.1", broker.port, "any/events"):

        def tell(job_id: str, *sequences: int) -> None:
            told = [json.dumps({"job_id": job_id, "sequence": sequence}) for sequence in sequences]
            messages = [("any/events", payload, 1, False) for payload in told]
            paho.mqtt.publish.multiple(messages, hostname="127.0.0.1", port=broker.port, protocol=MQTTv5)

        def is_heard() -> bool:
            tell("probe", 1)
            return heard_by(log) != []

        stays(lambda: heard_by(log) == [], 2)
        broker.start()
        eventually(is_heard, 20)
        tell("job", 1, 2, 2, 5, 5, 6)
        eventually(lambda: heard_by(log)[-1]["sequence"] == 6, 10)

    assert [event["sequence"] for event in heard_by(log) if event["job_id"] == "job"] == [1, 2, 5, 6]
    assert lines(log.with_suffix(".err")) == ["missed some: celery -A tasks mqtt replay --job job"]
