"""RabbitMQ closes the channel of a consumer that acknowledges too late: after 30 minutes, and here after seconds."""

import pytest

from db import schema
from tests.acceptance.deployment import deployed, lines
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

TIMEOUT_MS = 5000
SET_TIMEOUT = (
    f"application:set_env(rabbit, consumer_timeout, {TIMEOUT_MS}), "
    "application:set_env(rabbit, channel_tick_interval, 1000)."
)


@pytest.fixture
def own(private_rabbitmq, fresh_postgres_url, server_dir, tmp_path):
    rabbitmq = private_rabbitmq()
    done = rabbitmq.server.rabbitmqctl("eval", SET_TIMEOUT)
    if done.returncode:
        pytest.skip(f"rabbitmqctl can't set the timeout: {done.stderr.strip()}")
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": rabbitmq.url, "DATABASE_URL": fresh_postgres_url}) as own:
        schema.upgrade(own.app.store.database)
        yield own


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_job_that_takes_longer_runs_once_and_its_neighbours_are_left_alone(own, tmp_path, pool):
    worker = own.start_worker("--concurrency=2", "-Q", "note", "-P", pool)
    job = own.task.note.delay(str(tmp_path / "job"), "job", 16.0)
    eventually(lambda: lines(tmp_path / "job"), 20)
    neighbours = [own.task.note.delay(str(tmp_path / f"neighbour-{n}"), str(n), 3.0) for n in range(6)]

    assert job.get(timeout=60) == "job"
    assert [neighbour.get(timeout=60) for neighbour in neighbours] == [str(n) for n in range(6)]

    assert "delivery acknowledgement" in worker.log(), "the timeout has struck"
    assert lines(tmp_path / "job") == ["begin job", "end job"]
    assert {tuple(own.events(each)) for each in [job, *neighbours]} == {("created", "claimed", "started", "completed")}
    assert worker.is_alive()
    eventually(lambda: own.task.note.delay("/dev/null", "later").get(timeout=20) == "later", 30)
