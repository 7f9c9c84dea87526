"""Retained topics beside the job table: what no worker here explains is said by `reconcile`, and never cleared."""

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace

import pytest

from db.records import now
from tasks.cli import retained
from tasks.cli.reconcile import reconcile
from tasks.sinks import topics
from tests.cli.conftest import REPOSITORY
from tests.mqtt.tools import Tools
from tests.services import free_port
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually

LONG_AGO = timedelta(hours=1)


def mqtt_env(mosquitto, **env):
    return {
        "BROADCAST_TYPE": "mqtt",
        "MQTT_BROKER": mosquitto.host,
        "MQTT_PORT": str(mosquitto.port),
        "MQTT_TOPIC": f"{mosquitto.topic_prefix}/events",
        "CAPABILITY_TOPIC_PREFIX": f"{mosquitto.topic_prefix}/workers",
    } | env


@pytest.fixture
def tools(server_dir, mosquitto):
    """The commands on a job table of their own, and on topics of their own on the shared Mosquitto."""
    tools = Tools(server_dir, **mqtt_env(mosquitto))
    yield tools
    tools.clean_up()


def doubts(tools, *options):
    """{worker: what is said of its topic}; nothing else may be said."""
    result = tools.run(reconcile, "--json", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(each["part"], each["outcome"]) for each in said} <= {("retained topics", "uncertain")}
    prefix = f"{tools.settings.capability_topic_prefix}/"
    assert all(each["subject"].startswith(prefix) for each in said)
    return {each["subject"].removeprefix(prefix): each["text"] for each in said}


def test_workers_that_the_table_knows_as_alive_and_their_topics_agree(tools):
    for worker_id in ("edge-1", "edge/2"):
        tools.worker(worker_id, "image_resize", started_at=now() - LONG_AGO)
        tools.show(topics.capability_topic("", worker_id).strip("/"), "image_resize")
    tools.worker("edge_2", "image_resize", status="stopped")

    assert doubts(tools) == {}


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_topic_without_a_live_worker_is_said_and_never_cleared(tools, options):
    """It may be that of another deployment's worker: nothing in it tells."""
    tools.worker("edge-1", "image_resize", status="lost")
    for worker_id in ("edge-1", "garage; rm"):
        tools.show(worker_id, "image_resize")
    tools.publish(f"{tools.settings.capability_topic_prefix}/edge-2/check", "x", is_retained=True)

    for _ in range(2):
        said = doubts(tools, *options)
        assert list(said) == ["edge-1", "garage; rm"]
    assert said["edge-1"].startswith("worker edge-1 is lost, last heard of at 20")
    assert said["garage; rm"].startswith("the job table knows no such worker; unless another deployment has ")


def test_the_command_that_is_named_clears_that_topic_and_no_other(tools):
    for worker_id in ("edge 1", "edge-2"):
        tools.show(worker_id, "image_resize")

    command = shlex.split(doubts(tools)["edge 1"].rpartition(": ")[2])
    cleared = tools.mqtt(*command[4:])

    assert command[:4] == ["celery", "-A", "tasks", "mqtt"]
    assert cleared.stdout.splitlines()[-1] == "1 retained message cleared"
    assert list(doubts(tools)) == ["edge-2"]


def test_a_worker_not_heard_of_for_long_does_not_explain_its_topic(tools, server_dir):
    tools.worker("edge-1", "image_resize")
    tools.show("edge-1", "image_resize")
    with closing(sqlite3.connect(server_dir / "media_store.db")) as connection, connection:
        connection.execute("UPDATE worker_heartbeats SET last_heartbeat = '2026-01-01 00:00:00.000000'")

    said = doubts(tools)["edge-1"]

    assert said.startswith("worker edge-1 is silent, last heard of at 2026-01-01 00:00:00 UTC; ")


def test_a_live_worker_that_is_not_shown_is_said_once_it_has_had_the_time(tools):
    tools.worker("edge-1", "image_resize", started_at=now() - LONG_AGO)
    tools.worker("edge-2", "image_resize", started_at=now())
    tools.worker("edge-3", "image_resize", started_at=now() - LONG_AGO, status="stopped")

    assert doubts(tools) == {
        "edge-1": "worker edge-1 is alive and not shown; if it tells this MQTT broker, "
        "it is shown again within 30 s (MQTT_HEARTBEAT_INTERVAL)"
    }


@pytest.mark.parametrize(
    ("topics_held", "before", "after"),
    [
        (["p/w"], None, "alive"),
        (["p/w"], "alive", None),
        (["p/w"], "alive", "dead"),
        ([], "alive", "settled"),
        ([], None, "settled"),
        ([], "settled", "dead"),
    ],
)
def test_a_worker_that_comes_or_goes_while_one_looks_is_no_disagreement(monkeypatch, topics_held, before, after):
    def known(state):
        is_alive = state != "dead"
        own = {"status": "idle", "is_dead": not is_alive, "is_alive": is_alive, "is_settled": state == "settled"}
        return {"p/w": retained.Known(worker_id="w", heard_at=now(), **own)} if state else {}

    looks = iter([known(before), known(after)])
    monkeypatch.setattr(retained, "_known", lambda _app: next(looks))
    monkeypatch.setattr(retained, "_retained", lambda _app: topics_held)
    app = SimpleNamespace(settings=SimpleNamespace(broadcast_type="mqtt", mqtt_heartbeat_interval_s=30.0))

    assert list(retained.retained_doubts(app)) == []


def test_a_worker_whose_lock_is_let_go_is_not_alive_however_late_it_was_heard_of(tools):
    leases = tools.app.leases
    tools.app.worker_id = "edge-1"
    leases.take()
    lease, tools.app.lease = tools.app.lease, None
    tools.worker("edge-1", "image_resize", started_at=now() - LONG_AGO, lease=lease)
    assert "alive and not shown" in doubts(tools, "--dry-run")["edge-1"]

    leases._mine.release()
    (leases._directory / lease).touch()  # as a killed worker leaves it

    said = tools.run(reconcile, "--dry-run").stdout.splitlines()
    assert said == ["dead holders: edge-1: the worker is dead", "1 to mend; nothing was changed"]


def test_a_real_worker_and_its_topic_agree_and_its_death_leaves_none(celery, run_worker, mosquitto):
    env = mqtt_env(mosquitto, WORKER_ID=f"{mosquitto.topic_prefix}-w")
    worker = run_worker("-Q", "image_resize", "--concurrency=1", env=env)

    def said():
        return celery("reconcile", "--dry-run", env=env).stdout.splitlines()

    eventually(lambda: said() == ["nothing to mend"], 30, said)
    worker.kill9_everything()
    dead = [f"dead holders: {env['WORKER_ID']}: the worker is dead", "1 to mend; nothing was changed"]
    eventually(lambda: said() == dead, 30, said)


@pytest.mark.parametrize("state", ["missing", "frozen", "unusable"])
def test_an_mqtt_broker_that_does_not_answer_is_said_in_one_line_and_the_rest_goes_on(
    celery, photo, server_dir, state, private_mosquitto
):
    celery("submit", "image_resize", photo, "out.webp", "--width", 80)
    with closing(sqlite3.connect(server_dir / "media_store.db")) as connection, connection:
        connection.execute("UPDATE task_queue SET expires_at = '2026-01-01 00:00:00.000000'")
    env = {"BROADCAST_TYPE": "mqtt", "MQTT_PORT": free_port()}
    if state == "frozen":
        server = private_mosquitto()
        env["MQTT_PORT"] = server.port
        server.pause()
    elif state == "unusable":
        env |= {"MQTT_USE_TLS": "on", "MQTT_CA_CERT": "/no/ca.pem"}

    done = celery("reconcile", env=env)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 mended")
    (line,) = done.stderr.splitlines()
    assert line.startswith("retained topics are left out: ")
    assert "MQTT_" in line


def test_without_mqtt_no_mqtt_code_is_loaded(server_dir):
    code = (
        "import sys, atexit; from celery.__main__ import main\n"
        "own = ('tasks.sinks.client', 'tasks.sinks.mqtt')\n"
        "atexit.register(lambda: print([m for m in sys.modules if 'paho' in m or m in own]))\n"
        "sys.argv = ['celery', '-A', 'tasks', 'reconcile', '--dry-run']; main()"
    )
    env = without_settings(os.environ) | {"CL_SERVER_DIR": str(server_dir), "PYTHONPATH": str(REPOSITORY)}

    for broadcast_type, is_loaded in {"noop": False, "mqtt": True}.items():
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | {"BROADCAST_TYPE": broadcast_type, "MQTT_PORT": str(free_port())},
            capture_output=True,
            text=True,
            check=True,
        )
        first, modules = done.stdout.splitlines()
        assert (first, modules != "[]") == ("nothing to mend", is_loaded)
