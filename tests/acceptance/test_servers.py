"""The core of it on the servers that people scale out to: RabbitMQ and Redis as brokers, with PostgreSQL."""

import json
import os
import subprocess
import sys

import pytest
import pyvips
from celery import chain, chord
from kombu import Queue

from db import schema
from tests.acceptance.conftest import DEPLOYMENT
from tests.acceptance.deployment import REPOSITORY, deployed, kill_pool_child_that_notes, lines
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually

COMPLETED = ["created", "claimed", "started", "completed"]
TAKEN_OVER = ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
GET = {"timeout": 20}


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def deployment(request, postgres_server, module_server_dir, tmp_path_factory):
    broker_url = request.getfixturevalue(f"{request.param}_url")
    with postgres_server.database() as database_url:
        env = {"CELERY_BROKER_URL": broker_url, "DATABASE_URL": database_url}
        with deployed(module_server_dir, tmp_path_factory.mktemp("deployment"), env) as deployment:
            schema.upgrade(deployment.app.store.database)
            request.node.stash[DEPLOYMENT] = deployment
            deployment.start_worker("--concurrency=2")
            yield deployment


@pytest.fixture
def task(deployment):
    return deployment.task


def test_an_image_is_resized_and_its_changes_are_rows(deployment, task, tmp_path):
    pyvips.Image.black(60, 40).pngsave(str(tmp_path / "in.png"))
    job = task.image_resize.delay(tmp_path / "in.png", tmp_path / "out.webp", width=30)

    assert job.get(**GET)["height"] == 20

    image = pyvips.Image.new_from_file(str(tmp_path / "out.webp"))
    assert (image.width, image.height) == (30, 20)
    assert deployment.events(job) == COMPLETED


def test_a_chain_hands_each_result_on(deployment, task):
    result = chain(task.add.s(1, 2), task.add.s(4), task.add.s(8))()

    assert result.get(**GET) == 15
    assert [deployment.events(step) for step in (result.parent.parent, result.parent, result)] == [COMPLETED] * 3


def test_a_chord_runs_its_body_once(deployment, task, tmp_path):
    results = [
        chord([task.add.s(n, 1) for n in range(5)], task.note_parts.s(str(tmp_path / f"body-{number}")))()
        for number in range(4)
    ]

    assert [result.get(**GET) for result in results] == [[1, 2, 3, 4, 5]] * 4
    assert [lines(tmp_path / f"body-{number}") for number in range(4)] == [["body [1, 2, 3, 4, 5]"]] * 4


def test_a_chord_with_a_failed_member_fails(task):
    with pytest.raises(Exception, match="a member"):
        chord([task.add.s(1, 1), task.fail.si(message="a member")], task.total.s())().get(**GET)


def test_a_retry_comes_back(deployment, task, tmp_path):
    job = task.recover.delay(str(tmp_path / "runs"))

    assert job.get(**GET) == 2
    assert deployment.events(job) == ["created", "claimed", "started", "retry", "claimed", "started", "completed"]


def test_a_message_that_arrives_twice_runs_once(deployment, task, tmp_path):
    job = task.note.delay(str(tmp_path / "runs"), "once", 0.3)
    options = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers = {"lang": "py", "task": "note", "id": job.id, "root_id": job.id, "retries": 0, "publication": 1}
    body = json.dumps([[str(tmp_path / "runs"), "once", 0.3], {}, options])
    with deployment.app.connection_for_write() as connection, connection.channel() as channel:
        producer = connection.Producer(channel)
        queue = Queue("note", durable=True, max_priority=10)
        for _ in range(3):
            producer.publish(
                body, routing_key="note", declare=[queue], headers=headers,
                content_type="application/json", content_encoding="utf-8",
            )  # fmt: skip

    assert job.get(**GET) == "once"

    eventually(lambda: deployment.workers[0].log().count(f"note[{job.id}] not run") == 3, 10)
    assert lines(tmp_path / "runs") == ["begin once", "end once"]
    assert deployment.events(job) == COMPLETED


def test_a_killed_pool_child_costs_one_attempt(deployment, task, tmp_path):
    job = task.note.delay(str(tmp_path / "runs"), "job", 1.0)
    eventually(lambda: lines(tmp_path / "runs"), 10)

    kill_pool_child_that_notes(tmp_path / "runs")

    assert job.get(**GET) == "job"
    assert lines(tmp_path / "runs") == ["begin job", "begin job", "end job"]
    assert deployment.events(job) == TAKEN_OVER
    assert deployment.row(job)["deaths"] == 1


def test_a_job_that_kills_its_worker_fails_after_three_deaths(deployment, task, tmp_path):
    poison = task.kill_its_worker.delay(str(tmp_path / "runs"))

    row = deployment.wait_for(poison, "failed")

    assert (row["error_type"], row["deaths"]) == ("WorkerLost", 3)
    assert lines(tmp_path / "runs") == ["run"] * 3


def test_jobs_of_higher_priority_run_first(deployment, task, tmp_path):
    blockers = [task.note.delay("/dev/null", "", 1.0) for _ in range(2)]
    for blocker in blockers:
        deployment.wait_for(blocker, "running")
    file = str(tmp_path / "order")
    jobs = [task.note.apply_async((file, str(p), 0.01), priority=p) for p in (1, 4, 7, 10, 2, 9)]

    for job in [*blockers, *jobs]:
        job.get(**GET)

    order = [int(line.split()[1]) for line in lines(tmp_path / "order", "begin")]
    # Two children start side by side and each has one job in reserve: neighbours may swap.
    assert order[:2] != [1, 4]
    assert max(abs(order.index(p) - place) for place, p in enumerate((10, 9, 7, 4, 2, 1)) if place > 2) <= 2


def test_a_job_of_a_producer_without_the_database_gets_its_row_at_the_worker(deployment, tmp_path):
    pyvips.Image.black(60, 40).pngsave(str(tmp_path / "in.png"))
    submit = "from tasks import image_resize; print(image_resize.delay('in.png', 'out.webp', width=30).id)"
    env = {
        **without_settings(os.environ),
        "PYTHONPATH": str(REPOSITORY),
        "CL_SERVER_DIR": str(tmp_path / "not-used"),
        "ENQUEUE": "broker",
        "CELERY_BROKER_URL": deployment.env["CELERY_BROKER_URL"],
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/not-used",
    }

    producer = [sys.executable, "-c", submit]
    done = subprocess.run(producer, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    job = done.stdout.strip()
    row = deployment.wait_for(job, "completed")
    assert deployment.events(job) == COMPLETED
    assert row["parameters"] == {"input": str(tmp_path / "in.png"), "output": str(tmp_path / "out.webp"), "width": 30}
    image = pyvips.Image.new_from_file(str(tmp_path / "out.webp"))
    assert (image.width, image.height) == (30, 20)
    assert not (tmp_path / "not-used").exists()
