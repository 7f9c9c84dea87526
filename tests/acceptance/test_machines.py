"""Workers on several machines: a server directory each, so that none sees the locks of another; one PostgreSQL."""

import signal
import tempfile
from pathlib import Path

import pytest
from celery.utils.nodenames import gethostname, nodename

from db import schema
from tests.acceptance.deployment import deployed, lines
from tests.tooling import processes
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

LEASES = {"LEASE_RENEW_S": "1", "LEASE_TIMEOUT_S": "4"}


@pytest.fixture(params=["rabbitmq", "redis"])
def own(request, server_dir, tmp_path):
    env = {
        "CELERY_BROKER_URL": request.getfixturevalue(f"fresh_{request.param}_url"),
        "DATABASE_URL": request.getfixturevalue("fresh_postgres_url"),
        **LEASES,
    }
    with deployed(server_dir, tmp_path, env) as deployment:
        schema.upgrade(deployment.app.store.database)
        yield deployment


@pytest.fixture
def other_machine():
    with tempfile.TemporaryDirectory(prefix="mt-") as directory:
        yield {"CL_SERVER_DIR": str(Path(directory).resolve())}


def test_what_a_machine_had_that_vanished_without_a_word_runs_again_and_it_can_do_no_harm_when_it_is_back(
    own, task, other_machine, tmp_path
):
    """A worker that is stopped keeps its connections open, as a host does that has lost its network."""
    lost = own.start_worker("--concurrency=1")
    job = task.note.delay(str(tmp_path / "runs"), "job", 8.0)
    eventually(lambda: lines(tmp_path / "runs"), 20)
    own.start_worker("--concurrency=1", env=other_machine)
    everything = [lost.pid, *lost.child_pids()]

    processes.send(everything, signal.SIGSTOP)
    try:
        eventually(lambda: len(lines(tmp_path / "runs", "begin")) == 2, 4 + 15)
    finally:
        processes.send(everything, signal.SIGCONT)

    assert job.get(timeout=60) == "job"
    eventually(lambda: "no longer owns" in lost.log() or "lost its job" in lost.log(), 30)
    events = own.events(job)
    assert [events.count(name) for name in ("lost", "started", "completed")] == [1, 2, 1]
    assert own.row(job)["claimed_by"] == "w2"
    assert lost.is_alive()


@pytest.mark.parametrize("own", ["rabbitmq"], indirect=True)
class TestConnectionLost:
    """RabbitMQ redelivers what a lost connection held, whether its worker lives or not."""

    def test_a_job_of_a_living_worker_stays_with_it(self, own, task, other_machine, rabbitmq_server, tmp_path):
        vhost = own.env["CELERY_BROKER_URL"].rsplit("/", 1)[1]
        own.start_worker("--concurrency=1")
        job = task.note.delay(str(tmp_path / "runs"), "job", 12.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        other = own.start_worker("--concurrency=1", env=other_machine)
        # Else the message may come back to the worker that runs it.
        assert own.app.control.cancel_consumer("note", destination=[nodename("w1", gethostname())], reply=True)

        done = rabbitmq_server.rabbitmqctl("close_all_connections", "--vhost", vhost, "maintenance")

        assert done.returncode == 0, done.stderr
        assert job.get(timeout=60) == "job"
        assert lines(tmp_path / "runs") == ["begin job", "end job"]
        assert own.events(job) == ["created", "claimed", "started", "completed"]
        eventually(lambda: f"[{job.id}] not run: held by w1" in other.log(), 20)

    def test_a_job_of_a_dead_worker_runs_again_within_seconds(self, own, task, other_machine, tmp_path):
        lost = own.start_worker("--concurrency=1", env={"LEASE_RENEW_S": "5", "LEASE_TIMEOUT_S": "60"})
        job = task.dawdle.delay(str(tmp_path / "runs"), 60.0, 0.1)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.start_worker("--concurrency=1", env={**other_machine, "LEASE_RENEW_S": "5", "LEASE_TIMEOUT_S": "60"})

        lost.kill9_everything()

        eventually(lambda: len(lines(tmp_path / "runs")) == 2, 5 + 1.5 + 3)
        assert job.get(timeout=20) == 2
        assert (own.row(job)["claimed_by"], own.row(job)["deaths"]) == ("w2", 1)
