"""`reconcile`: each disagreement on a line, mended unless it is a dry run, which changes nothing."""

import json
import sqlite3
from contextlib import closing
from datetime import timedelta

import paho.mqtt.publish
import pytest
from celery import chain
from paho.mqtt.client import MQTTv5

from db.records import Status, now
from tasks.errors import CorruptMedia
from tasks.leftovers import token_of
from tasks.rows import describe
from tests.acceptance.deployment import deployed
from tests.tooling.waiting import eventually
from tests.unit import jobs
from tests.unit.jobs import claimed_by, messages

SILENT_ELSEWHERE = "INSERT INTO worker_leases VALUES ('a-lease', 'far-1', 'another host', '2026-01-01 00:00:00.000000')"


def dump(server_dir):
    """Everything that stands in the tables of both files."""
    content = {}
    for name in ("media_store.db", "broker.db"):
        with closing(sqlite3.connect(server_dir / name)) as connection:
            content[name] = list(connection.iterdump())
    return content


def change(path, statement):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


@pytest.fixture
def lost(celery, server_dir, photo):
    """A job whose message is lost: its id."""
    job_id = celery("submit", "image_resize", photo, "out.webp", "--width", 80).stdout.strip()
    change(server_dir / "media_store.db", "UPDATE task_queue SET published_at = '2026-01-01 00:00:00.000000'")
    change(server_dir / "broker.db", "DELETE FROM messages")
    return job_id


def test_where_all_agree_there_is_nothing_to_mend(celery, photo):
    celery("submit", "image_resize", photo, "out.webp", "--width", 80)

    for options in ((), ("--dry-run",)):
        done = celery("reconcile", *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "nothing to mend\n", "")
    assert celery("reconcile", "--json").stdout == ""


def test_a_dry_run_names_a_lost_message_and_changes_nothing(celery, server_dir, lost):
    before = dump(server_dir)

    done = celery("reconcile", "--dry-run")

    text = "the broker has no message of it in image_resize; it is published again"
    assert done.stdout.splitlines() == [f"lost messages: {lost}: {text}", "1 to mend; nothing was changed"]
    assert (done.returncode, done.stderr) == (0, "")
    assert dump(server_dir) == before


def test_a_lost_message_is_mended_and_the_next_worker_does_the_job(celery, run_worker, lost, tmp_path):
    done = celery("reconcile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"lost messages: {lost}: ")
    assert done.stdout.splitlines()[1:] == ["1 mended"]
    assert celery("reconcile").stdout == "nothing to mend\n"

    run_worker("-Q", "image_resize", "--concurrency=1")
    eventually((tmp_path / "out.webp").exists, 20)


def test_json_is_one_object_a_line_with_what_became_of_it(celery, lost):
    (found,) = map(json.loads, celery("reconcile", "--dry-run", "--json").stdout.splitlines())
    (mended,) = map(json.loads, celery("reconcile", "--json").stdout.splitlines())

    assert (found["part"], found["subject"], found["outcome"]) == ("lost messages", lost, "found")
    assert mended == found | {"outcome": "mended"}


def test_the_job_of_a_dead_worker_is_queued_again(celery, run_worker, plug_ins, server_dir, tmp_path):
    # Given a job whose machine is lost
    worker = run_worker("-Q", "note", "--concurrency=1", env=plug_ins | {"WORKER_ID": "edge-1"})
    job_id = celery("submit", "note", tmp_path / "runs", "", 60, env=plug_ins).stdout.strip()
    eventually((tmp_path / "runs").exists, 20)
    worker.kill9_everything()

    # When one looks, nothing changes
    before = dump(server_dir)
    found = celery("reconcile", "--dry-run", env=plug_ins)
    assert found.stdout.splitlines() == [
        f"dead holders: {job_id}: its worker edge-1 is dead; attempt 1 is closed",
        "dead holders: edge-1: the worker is dead",
        "2 to mend; nothing was changed",
    ]
    assert dump(server_dir) == before

    # When it is mended, the job waits for the next worker, and says what happened
    mended = celery("reconcile", env=plug_ins)
    assert (mended.returncode, mended.stdout.splitlines()[-1]) == (0, "2 mended")
    told = celery("jobs", "explain", job_id, env=plug_ins).stdout
    assert "its worker died, attempt 1, 1 of its workers have died" in told
    assert "no worker serves note" in told.splitlines()[-2]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_broker_that_only_counts_proves_no_loss_at_one_look_and_that_is_said(
    celery, server_dir, photo, fresh_redis_url, options
):
    env = {"CELERY_BROKER_URL": fresh_redis_url}
    job_id = celery("submit", "image_resize", photo, "out.webp", "--width", 80, env=env).stdout.strip()
    change(server_dir / "media_store.db", "UPDATE task_queue SET published_at = '2026-01-01 00:00:00.000000'")
    assert celery("reconcile", *options, env=env).stdout == "nothing to mend\n"
    celery("purge", "-f", "-Q", "image_resize", env=env)

    done = celery("reconcile", *options, env=env)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(
        "not certain: lost messages: image_resize: 1 job published, 0 messages left, 0 reserved; "
    )
    assert done.stdout.splitlines()[-1].startswith("1 not certain")
    assert json.loads(celery("jobs", "show", job_id, "--json", env=env).stdout)["publication"] == 1


def test_every_lost_message_is_found_however_many_there_are(celery, server_dir, lost):
    """A worker looks through 5,000 jobs a round."""
    change(
        server_dir / "media_store.db",
        "INSERT INTO task_queue (job_id, task_type, queue, parameters, status, created_at, updated_at, published_at) "
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5002) "
        "SELECT 'lost-' || i, task_type, queue, parameters, status, created_at, updated_at, published_at "
        "FROM task_queue, n",
    )

    lines = celery("reconcile", "--dry-run").stdout.splitlines()

    assert len(set(lines)) == 5003 + 1
    assert lines[-1] == "5,003 to mend; nothing was changed"


def test_a_silent_worker_of_another_host_may_live_and_that_is_said(celery, server_dir):
    celery("db", "upgrade")
    change(server_dir / "media_store.db", SILENT_ELSEWHERE)

    done = celery("reconcile")

    assert done.returncode == 0, done.stderr
    text = "silent since 2026-01-01 00:00:00 UTC; whether it is dead, only a worker can tell that looks for 15 s"
    assert done.stdout.splitlines() == [f"not certain: dead holders: far-1: {text}", "1 not certain"]


def test_a_broker_that_does_not_answer_is_said_in_one_line(celery, lost):
    done = celery("reconcile", env={"CELERY_BROKER_URL": "redis://127.0.0.1:1/0"})

    assert done.returncode == 1
    assert "the broker does not answer" in done.error


# The other way round: what needs no mending


def test_a_message_whose_job_has_ended_has_moved_on_or_is_unknown_is_named_and_left(celery, server_dir, photo):
    ids = [celery("submit", "image_resize", photo, f"{n}.webp", "--width", 80).stdout.strip() for n in range(4)]
    table = server_dir / "media_store.db"
    change(table, f"UPDATE task_queue SET status = 'completed' WHERE job_id = '{ids[0]}'")
    change(table, f"UPDATE task_queue SET publication = 3 WHERE job_id = '{ids[1]}'")
    change(table, f"DELETE FROM task_queue WHERE job_id = '{ids[2]}'")
    before = dump(server_dir)

    done = celery("reconcile", "--dry-run")

    drops = "the worker that takes the message drops it"
    unknown = "no row has this id (as of another client, or ENQUEUE=broker); the worker that takes it makes one"
    assert done.stdout.splitlines() == [
        f"stray messages: {ids[0]}: image_resize holds a message of it, and it is completed; {drops}",
        f"stray messages: {ids[1]}: image_resize holds a message of it, "
        f"and it stands at publication 3, the message at 1; {drops}",
        f"stray messages: {ids[2]}: image_resize holds a message of it, and {unknown}",
        "3 need no mending; nothing was changed",
    ]
    assert (done.returncode, done.stderr) == (0, "")
    celery("reconcile")
    assert dump(server_dir) == before


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_broker_that_only_counts_tells_of_more_messages_than_jobs(request, celery, server_dir, photo, broker):
    env = {"CELERY_BROKER_URL": request.getfixturevalue(f"fresh_{broker}_url")}
    for n in range(3):
        celery("submit", "image_resize", photo, f"{n}.webp", "--width", 80, env=env)
    change(server_dir / "media_store.db", "UPDATE task_queue SET status = 'cancelled' WHERE id < 3")

    done = celery("reconcile", "--dry-run", env=env)

    assert done.returncode == 0, done.stderr
    (said, _) = done.stdout.splitlines()
    assert said.startswith(
        "not certain: stray messages: image_resize: 3 messages ready, 1 job published; the rest are "
    )


@pytest.mark.parametrize("is_served", [False, True])
def test_jobs_that_are_long_overdue_are_named_with_what_is_wrong(celery, commands, is_served):
    long_ago = now() - timedelta(minutes=5)
    for job_id, due in (("late", long_ago), ("paused", long_ago), ("soon", now() - timedelta(seconds=5))):
        commands.job(job_id, is_resting=True, run_after_utc=due, queue="quiet" if job_id == "paused" else "add")
    commands.store.pause("quiet")
    if is_served:
        commands.worker("edge-1", "add")

    (said,) = map(json.loads, celery("reconcile", "--dry-run", "--json").stdout.splitlines())

    assert (said["part"], said["subject"], said["outcome"]) == ("overdue jobs", "late", "noted")
    assert f"it was due at {long_ago:%Y-%m-%d %H:%M:%S} UTC in add" in said["text"]
    assert said["text"].endswith("the worker that publishes what is due is behind" if is_served else "no worker lives")


# One of each


@pytest.fixture
def mqtt(mosquitto):
    """Settings of commands that look at a broker on which a worker is shown that nobody knows."""
    prefix = f"{mosquitto.topic_prefix}/workers"
    paho.mqtt.publish.single(
        f"{prefix}/garage", "{}", retain=True, hostname=mosquitto.host, port=mosquitto.port, protocol=MQTTv5
    )
    where = {"MQTT_BROKER": mosquitto.host, "MQTT_PORT": mosquitto.port, "CAPABILITY_TOPIC_PREFIX": prefix}
    return {"BROADCAST_TYPE": "mqtt", **where}


def test_a_dry_run_names_one_of_each_and_changes_nothing(celery, mqtt, server_dir, tmp_path):
    past = now() - timedelta(minutes=5)
    with deployed(server_dir, tmp_path) as deployment:
        app, add = deployment.app, deployment.task.add

        # Given ends that were not told, and a lost message
        failed, cancelled = (chain(add.s(n, n), add.s(1))().parent for n in range(2))
        for job, status, ago_s in ((failed, Status.FAILED, 20), (cancelled, Status.CANCELLED, 10)):
            app.store.end(job.id, status, describe(CorruptMedia("the file is broken")))
            jobs.change(app, job, completed_at=now() - timedelta(seconds=ago_s))
        lost = add.delay(2, 2)
        jobs.change(app, lost, published_at=past)
        messages(deployment, "add")

        # ... a worker that died in mid-job, and one of another host that is silent
        held = deployment.task.image_resize.delay(tmp_path / "in.jpg", tmp_path / "out.webp", width=9)
        half_written = tmp_path / f".media-tasks-{token_of(held.id, claimed_by(app, held, 'edge-1'))}-abc.part"
        half_written.touch()
        change(server_dir / "media_store.db", SILENT_ELSEWHERE)

        # ... a job whose time is over, one that nobody has published, and messages that no job waits for
        expired = add.apply_async((3, 3), expires=60)
        jobs.change(app, expired, expires_at=past)
        overdue = add.apply_async((4, 4), countdown=60)
        jobs.change(app, overdue, run_after_utc=past)
        ended = add.delay(5, 5)
        jobs.change(app, ended, status=Status.COMPLETED)
    before = dump(server_dir)

    # When one looks, twice
    first, second = (celery("reconcile", "--dry-run", env=mqtt) for _ in range(2))

    # Then all is said, and nothing is changed
    at = f"{past:%Y-%m-%d %H:%M:%S} UTC"
    topic = f"{mqtt['CAPABILITY_TOPIC_PREFIX']}/garage"
    untold = "and what waits for it has not been told"
    assert first.stdout.splitlines() == [
        f"dead holders: {held.id}: its worker edge-1 is dead; attempt 1 is closed",
        "dead holders: edge-1: the worker is dead",
        f"untold ends: {failed.id}: it is failed, {untold}",
        f"untold ends: {cancelled.id}: it is cancelled, {untold}",
        f"expired jobs: {expired.id}: it expired at {at}",
        f"lost messages: {lost.id}: the broker has no message of it in add; it is published again",
        "not certain: dead holders: far-1: silent since 2026-01-01 00:00:00 UTC; "
        "whether it is dead, only a worker can tell that looks for 15 s",
        f"not certain: retained topics: {topic}: the job table knows no such worker; unless another deployment has a "
        f"worker of this name: celery -A tasks mqtt cleanup {topic}",
        f"overdue jobs: {overdue.id}: it was due at {at} in add, and nobody has published it: no worker lives",
        f"stray messages: {ended.id}: add holds a message of it, and it is completed; "
        "the worker that takes the message drops it",
        "6 to mend, 2 not certain, 2 need no mending; nothing was changed",
    ]
    assert (first.returncode, first.stderr) == (0, "")
    assert second == first
    assert dump(server_dir) == before
    assert half_written.exists()
