"""Events where the job table is PostgreSQL and the messages are RabbitMQ's or Redis': as on the embedded broker."""

import os
import signal
import time
from collections import defaultdict

import pytest

from db import schema
from tasks import control
from tests.acceptance.deployment import kill_pool_child_that_notes, lines
from tests.mqtt.changes import check_told_as_logged
from tests.mqtt.road import Road
from tests.mqtt.said import warnings
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(params=["rabbitmq", "redis"])
def deploy_on_servers(request, deploy):
    """As `deploy`, on RabbitMQ or Redis with PostgreSQL."""

    def start(port, **env):
        env["CELERY_BROKER_URL"] = request.getfixturevalue(f"fresh_{request.param}_url")
        env["DATABASE_URL"] = request.getfixturevalue("fresh_postgres_url")
        deployment = deploy(port, **env)
        schema.upgrade(deployment.app.store.database)
        return deployment

    return start


def test_deaths_poison_cancellations_and_replays_are_told_as_the_log_has_them(
    deploy_on_servers, listener, mosquitto, worker_id, tmp_path
):
    deployment = deploy_on_servers(mosquitto.port)
    deployment.start_worker("--concurrency=2", "-Q", "add,note,fail,kill_its_worker")
    listener.wait_for_capability(worker_id)
    task = deployment.task

    lost = task.note.delay(str(tmp_path / "lost"), "", 2.0)
    eventually(lambda: lines(tmp_path / "lost"), 20)
    kill_pool_child_that_notes(tmp_path / "lost")
    poison = task.kill_its_worker.delay(str(tmp_path / "poison"))
    cancelled = task.note.delay(str(tmp_path / "cancelled"), "", 60.0)
    deployment.wait_for(cancelled, "running")
    control.cancel(cancelled.id)
    replayed = task.fail.delay()
    deployment.wait_for(replayed, "failed")
    assert control.replay(replayed.id)

    attempt = ["claimed", "started"]
    for job, names in {
        lost: ["created", *attempt, "lost", *attempt, "completed"],
        poison: ["created", *(3 * [*attempt, "lost"]), "failed"],
        cancelled: ["created", *attempt, "cancelled"],
        replayed: ["created", *attempt, "failed", "replayed", *attempt, "failed"],
    }.items():
        check_told_as_logged(deployment, listener, job, names)
    assert listener.wait_for_change(lost, "lost")["data"] == {"deaths": 1, "attempt": 1}
    assert [event["data"]["deaths"] for event in listener.changes(poison) if event["event_type"] == "lost"] == [1, 2, 3]
    assert listener.wait_for_change(poison, "error")["data"]["error_type"] == "WorkerLost"


def test_where_only_the_relays_way_to_mqtt_is_lost_another_worker_tells(
    deploy_on_servers, listen, private_mosquitto, worker_id
):
    broker = private_mosquitto()
    with Road(broker.port) as road:
        deployment = deploy_on_servers(broker.port)
        cut_off = deployment.start_worker("-Q", "total", env={"MQTT_PORT": str(road.port)})
        cut_offs = eventually(lambda: deployment.app.store.duty_holder("relay"), 10)
        listener = listen(broker.port)
        other = f"{worker_id}-2"
        deployment.start_worker("-Q", "add", env={"WORKER_ID": other})
        listener.wait_for_capability(other)
        listener.wait_for_change(deployment.task.total.delay([1, 2]), "completed")

        road.lose()
        lost_at = time.monotonic()
        jobs = [deployment.task.add.delay(1, 1), deployment.task.total.delay([1, 2])]
        for job in jobs:
            job.get(timeout=20)
            listener.wait_for_change(job, "completed", 40)
        print(f"told by the other one {time.monotonic() - lost_at:.1f} s after the loss")
        assert deployment.app.store.duty_holder("relay") != cut_offs
        assert len(warnings(cut_off)) == 1
        road.mend()

        listener.wait_for_capability(worker_id, 30)
        jobs += [deployment.task.add.delay(2, 2), deployment.task.total.delay([3, 4])]
        for job in jobs:
            listener.wait_for_change(job, "completed")
            assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]


def backend_of_the_relay(server):
    """The process of PostgreSQL that is asked for news again and again."""
    asked = defaultdict(set)
    with server.connect() as connection:
        for _ in range(40):
            news = connection.execute(
                "SELECT pid, query_start FROM pg_stat_activity"
                " WHERE query LIKE '%max(task_logs.id)%' AND pid <> pg_backend_pid()"
            )
            for pid, at in news.fetchall():
                asked[pid].add(at)
            connection.rollback()  # what it shows is fixed for a transaction
            time.sleep(0.05)
    return max(asked, key=lambda pid: len(asked[pid]))


def test_where_the_database_answers_all_but_the_relay_another_worker_tells(
    deploy, listener, mosquitto, private_postgres, prefix, worker_id
):
    postgres = private_postgres()
    deployment = deploy(mosquitto.port, DATABASE_URL=postgres.url, LEASE_RENEW_S=1, LEASE_TIMEOUT_S=5)
    schema.upgrade(deployment.app.store.database)
    relay = deployment.start_worker("--concurrency=1", "-Q", "add")
    listener.wait_for_change(deployment.task.add.delay(1, 2), "completed")
    deployment.start_worker("--concurrency=1", "-Q", "add", env={"WORKER_ID": f"{prefix}-other"})

    pid = backend_of_the_relay(postgres.server)
    os.kill(pid, signal.SIGSTOP)
    try:
        job = deployment.task.add.delay(3, 4)
        listener.wait_for_change(job, "completed", 30)
        assert "the relay has been stuck for 5 s" in relay.log()
        assert listener.capability(worker_id)
    finally:
        os.kill(pid, signal.SIGCONT)
    check_told_as_logged(deployment, listener, job, ["created", "claimed", "started", "completed"])
