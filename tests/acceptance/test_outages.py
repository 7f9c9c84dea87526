"""Brokers and databases that are away or frozen: workers outlive them, and no job is lost or counted dead."""

from contextlib import suppress

import pytest

from db.records import now
from tests.acceptance.deployment import deployed, lines
from tests.tooling.locks import Lock
from tests.tooling.waiting import eventually, stays
from tests.unit.jobs import new_job

pytestmark = pytest.mark.slow
COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 60}


@pytest.fixture
def redis(private_redis):
    return private_redis()


@pytest.fixture
def on_redis(redis, server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": redis.url}) as deployment:
        yield deployment


def test_a_worker_outlives_restarts_of_redis_in_mid_job(redis, on_redis, tmp_path):
    worker = on_redis.start_worker("--concurrency=2")

    for number in range(3):
        job = on_redis.task.note.delay(str(tmp_path / f"{number}"), "job", 3.0)
        eventually(lambda number=number: lines(tmp_path / f"{number}"), 30)
        redis.stop()
        redis.start()

        assert job.get(**GET) == "job"
        assert lines(tmp_path / f"{number}") == ["begin job", "end job"]
        assert on_redis.events(job) == COMPLETED
    assert worker.is_alive()
    assert on_redis.task.add.delay(1, 1).get(**GET) == 2


def test_a_frozen_broker_keeps_no_lease_from_being_renewed(redis, on_redis, tmp_path):
    worker = on_redis.start_worker("--concurrency=1")
    job = on_redis.task.note.delay(str(tmp_path / "runs"), "job", 25.0)
    eventually(lambda: lines(tmp_path / "runs"), 20)

    def silent_s():
        (holder,) = on_redis.app.store.holders()
        return (now() - holder.renewed_at).total_seconds()

    redis.pause()
    stays(lambda: silent_s() < 9, 20, "the lease is renewed every 5 s", interval_s=0.5)
    redis.resume()

    assert job.get(**GET) == "job"
    assert on_redis.events(job) == COMPLETED
    assert worker.is_alive()


def test_a_worker_outlives_a_broker_that_refuses_it_for_a_while(
    rabbitmq_server, fresh_rabbitmq_url, server_dir, tmp_path
):
    """As a vhost that is moved: at its start a worker would end at that."""
    vhost = fresh_rabbitmq_url.rsplit("/", 1)[1]
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": fresh_rabbitmq_url}) as own:
        worker = own.start_worker("--concurrency=1")
        job = own.task.note.delay(str(tmp_path / "runs"), "job", 6.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)

        rabbitmq_server.rabbitmqctl("delete_vhost", vhost)
        worker.wait_for_log("CELERY_BROKER_URL: the broker at ", 30)
        rabbitmq_server.rabbitmqctl("add_vhost", vhost)
        rabbitmq_server.rabbitmqctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")

        assert job.get(**GET) == "job"
        assert own.task.add.delay(1, 1).get(**GET) == 2
        assert worker.is_alive()
        assert worker.log().count("Traceback") <= 1  # of the connection that was closed


def test_a_worker_that_is_started_while_the_database_is_locked_waits_for_it(server_dir, tmp_path):
    with deployed(server_dir, tmp_path) as own:
        own.app.store.counts()  # makes the tables
        with Lock(own.server_dir / "media_store.db", 90.0) as lock:
            worker = own.start_worker("--concurrency=1", ready_timeout_s=0)
            worker.wait_for_log("the job database does not answer", 60)
            lock.release()
        worker.wait_until_ready(40)

        assert own.task.add.delay(1, 1).get(**GET) == 2


def test_a_producer_publishes_while_the_embedded_brokers_file_is_deleted_again_and_again(server_dir, tmp_path):
    with deployed(server_dir, tmp_path) as own:
        own.start_worker("--concurrency=2")
        jobs = []
        for number in range(200):
            if number % 40 == 20:
                for path in own.server_dir.glob("broker.db*"):
                    if path.is_file():
                        path.unlink()
            jobs.append(own.task.add.delay(number, 0))

        assert [job.get(timeout=90) for job in jobs] == list(range(200))
        assert {tuple(event for event in own.events(job) if event != "republished") for job in jobs} == {
            tuple(COMPLETED)
        }


@pytest.mark.parametrize("limit", ["time_limit", "soft_time_limit"])
def test_a_job_whose_time_goes_by_while_the_database_is_locked_is_not_failed_for_it(server_dir, tmp_path, limit):
    """One has done its work and can't say so, the other has not begun."""
    with deployed(server_dir, tmp_path) as own:
        own.start_worker("--concurrency=2")
        done = own.task.stay.apply_async((str(tmp_path / "done"), 1.5), **{limit: 4})
        eventually(lambda: lines(tmp_path / "done"), 10)
        args, options = [str(tmp_path / "waiting"), 0.1], {"task_id": "waiting", "queue": "stay", limit: 4}
        message = {"args": args, "kwargs": {}, "options": options}
        own.app.store.enqueue(new_job("waiting", task_type="stay", queue="stay", message=message))
        with Lock(own.server_dir / "media_store.db", 12.0):
            own.app.publish("stay", args, {}, publication=1, priority=5, has_begun=False, expires=None, options=options)

        for job in (done, own.app.AsyncResult("waiting")):
            assert job.get(**GET) == "stayed"
            assert own.row(job)["deaths"] == 0
            assert own.events(job).count("completed") == 1


@pytest.mark.parametrize("locked_s", [11.0, 15.0])
def test_a_job_that_hangs_fails_though_the_database_is_locked_again_and_again(server_dir, tmp_path, locked_s):
    """An outage in each of its attempts excuses no more than two in a row, be it short or long."""
    with deployed(server_dir, tmp_path, {"LEASE_RENEW_S": 1}) as own:
        own.start_worker("--concurrency=1", "--pool=prefork")
        job = own.task.stay.apply_async((str(tmp_path / "runs"), 1000.0), time_limit=8)
        eventually(lambda: lines(tmp_path / "runs"), 20)

        def is_over():
            with Lock(own.server_dir / "media_store.db", locked_s):
                pass
            with suppress(AssertionError):
                return own.wait_for(job, "failed", timeout_s=3)

        row = eventually(is_over, 120, lambda: f"{own.events(job)}")
        assert (row["error_type"], row["deaths"]) == ("JobTimeout", 0)
        spared = ["claimed", "started", "released"]
        assert own.events(job) == ["created", *spared, *spared, "claimed", "started", "failed"]
        assert lines(tmp_path / "runs") == ["begin"] * 3


def test_a_job_that_was_replayed_is_not_failed_by_the_time_limit_of_its_earlier_run(server_dir, tmp_path):
    with deployed(server_dir, tmp_path) as own:
        own.start_worker("--concurrency=2", "--pool=prefork")
        job = own.task.dawdle.apply_async((str(tmp_path / "runs"), 30.0, 4.0), time_limit=6)
        eventually(lambda: lines(tmp_path / "runs"), 10)
        stays(lambda: own.row(job)["attempt"] == 1 and own.row(job)["status"] == "running", 3)  # half of its time

        assert own.app.store.close(job.id, 1, event="released", reason="as a replay does", is_death=False)

        assert job.get(**GET) == 2
        assert "failed" not in own.events(job)
