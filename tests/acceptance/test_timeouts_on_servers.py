"""Time limits on RabbitMQ and Redis with PostgreSQL: a job that takes too long ends, and its message is settled."""

from urllib.parse import urlsplit

import pytest
from kombu import Connection

from tasks import control
from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("broker", ["rabbitmq", "redis"], indirect=True)]

GET = {"timeout": 30}
FAILED = ["created", "claimed", "started", "failed"]
RETRIED = ["created", "claimed", "started", "retry", "claimed", "started", "completed"]


@pytest.fixture
def own(own_on_broker):
    return own_on_broker


@pytest.fixture
def unsettled(own, broker, request):
    """How many messages the broker has delivered and keeps."""
    url = own.env["CELERY_BROKER_URL"]

    def on_redis():
        with Connection(url) as connection:
            client = connection.default_channel.client
            return client.hlen("unacked") + client.zcard("unacked_index")

    def on_rabbitmq():
        server = request.getfixturevalue("rabbitmq_server")
        vhost = urlsplit(url).path[1:]
        listed = server.rabbitmqctl("list_queues", "-p", vhost, "--no-table-headers", "messages_unacknowledged")
        return sum(map(int, listed.stdout.split()))

    return on_redis if broker == "redis" else on_rabbitmq


def test_each_limit_ends_a_job_and_the_worker_goes_on(own, task, tmp_path, unsettled):
    own.start_worker("--concurrency=1")
    job = task.note.delay(str(tmp_path / "runs"), "", 60.0)
    own.wait_for(job, "running")
    assert unsettled() > 0, "it sees what runs"
    control.cancel(job.id, app=own.app)

    for name, kind in (("stay", "soft"), ("stay_whatever", "hard")):
        limit = {"soft": "soft_time_limit", "hard": "time_limit"}[kind]
        job = getattr(task, name).apply_async((str(tmp_path / name), 30.0), **{limit: 1})
        row = own.wait_for(job, "failed")
        assert f"{name} ran longer than its {kind} time limit of 1 s" in row["error_message"]
        assert (row["error_type"], row["deaths"], own.events(job)) == ("JobTimeout", 0, FAILED)
        assert lines(tmp_path / name) == ["begin"]
        assert task.add.delay(1, 1).get(**GET) == 2

    for limit in ("soft_time_limit", "time_limit"):
        job = task.hurry.apply_async((str(tmp_path / limit), 30.0), **{limit: 1})
        assert job.get(**GET) == 2
        assert own.events(job) == RETRIED
        assert task.add.delay(1, 1).get(**GET) == 2

    eventually(lambda: unsettled() == 0, 10, lambda: f"{unsettled()} are left")
