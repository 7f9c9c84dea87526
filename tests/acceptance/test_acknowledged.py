"""Every message is acknowledged in the end, whatever became of its job; each broker is asked what it still holds."""

import json
import sqlite3
from contextlib import closing

import pytest
from redis import Redis

from tasks import control
from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

QUEUES = ("add", "fail", "kill_its_worker", "note", "recover", "reject", "stay")


@pytest.fixture
def held(own_on_broker, broker, request):
    """Asks the broker how many messages it holds, also those that a worker has reserved."""

    def by_redis():
        with Redis.from_url(own_on_broker.env["CELERY_BROKER_URL"]) as client:
            waiting = sum(client.llen(key) for key in client.keys("*") if client.type(key) == b"list")
            return waiting + client.hlen("unacked") + client.zcard("unacked_index")

    def by_rabbitmq():
        vhost = own_on_broker.env["CELERY_BROKER_URL"].rpartition("/")[2]
        server = request.getfixturevalue("rabbitmq_server")
        said = server.rabbitmqctl("list_queues", "-p", vhost, "--formatter=json", "name", "messages")
        return sum(queue["messages"] for queue in json.loads(said.stdout) if queue["name"] in QUEUES)

    def by_file():
        with closing(sqlite3.connect(own_on_broker.server_dir / "broker.db")) as connection:
            return connection.execute("SELECT count(*) FROM messages").fetchone()[0]

    return {"redis": by_redis, "rabbitmq": by_rabbitmq, "embedded": by_file}[broker]


def test_nothing_is_left_reserved_whatever_became_of_a_job(own_on_broker, held, tmp_path):
    own = own_on_broker
    worker = own.start_worker("--concurrency=2", "-Q", ",".join(QUEUES))
    task = own.task
    control.pause("note", app=own.app)
    worker.wait_for_log("the queue note is paused")
    paused = task.note.delay(str(tmp_path / "notes"), "later")
    cancelled = task.stay.delay(str(tmp_path / "cancelled"), 60)
    eventually(lambda: lines(tmp_path / "cancelled"), 20)
    control.cancel(cancelled.id, app=own.app)
    ends = {
        cancelled: "cancelled",
        task.add.delay(1, 2): "completed",
        task.fail.delay(): "failed",
        task.recover.delay(str(tmp_path / "recover")): "completed",
        task.reject.delay(str(tmp_path / "reject"), requeue=True): "completed",
        task.stay.apply_async((str(tmp_path / "hard"), 60), time_limit=1): "failed",
        task.stay.apply_async((str(tmp_path / "soft"), 60), soft_time_limit=1): "failed",
        task.kill_its_worker.delay(str(tmp_path / "deaths")): "failed",
        task.add.apply_async((1, 2), expires=0.001): "cancelled",
        task.add.apply_async((1, 2), countdown=1): "completed",
    }
    for job, end in ends.items():
        own.wait_for(job, end, timeout_s=60)
    assert held() > 0
    control.resume("note", app=own.app)
    own.wait_for(paused, "completed", timeout_s=60)

    eventually(lambda: held() == 0, 20, lambda: f"{held()} messages are held")
    worker.terminate()
    assert worker.wait(30) == 0
    assert held() == 0
