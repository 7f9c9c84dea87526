"""The events of jobs: every change once it is true, in order, each with its number."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
from sqlalchemy import NullPool, create_engine, text

from db import schema
from tasks import control
from tests.acceptance.deployment import kill_pool_child_that_notes, lines
from tests.mqtt.changes import CHANGES, check_told_as_logged
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually
from tests.tooling.worker import REPOSITORY

pytestmark = pytest.mark.slow


def told(listener, job):
    """The changes of a job as event types; their numbers must be without a gap."""
    changes = listener.changes(job)
    assert [change["sequence"] for change in changes] == list(range(1, len(changes) + 1))
    return [change["event_type"] for change in changes]


@pytest.fixture
def started(deployment, listener, worker_id):
    """A deployment whose worker relays."""
    deployment.start_worker("--concurrency=2")
    listener.wait_for_capability(worker_id)
    _wait_for_relay(deployment)
    return deployment


def _wait_for_relay(deployment):
    def is_telling():
        return any("this worker tells the events" in worker.log() for worker in deployment.workers)

    eventually(is_telling, 10, "somebody relays")


def test_a_job_is_told_from_its_row_to_its_result(started, listener, worker_id):
    job = started.task.add.delay(40, 2)

    completed = listener.wait_for_change(job, "completed")

    assert told(listener, job) == ["queued", "processing", "processing", "completed"]
    queued, claimed, running, _ = listener.changes(job)
    assert [change["status"] for change in listener.changes(job)] == ["queued", "claimed", "running", "completed"]
    assert (queued["worker_id"], claimed["worker_id"], completed["worker_id"]) == (None, worker_id, worker_id)
    assert completed["data"] == {"result": 42}
    assert completed["progress"] == 100.0
    assert queued["data"] == claimed["data"] == running["data"] == {}
    assert (completed["task_type"], completed["root_id"]) == ("add", job.id)
    row = started.row(job)
    assert completed["timestamp"] == int(row["completed_at"].timestamp() * 1000)
    assert {(heard.qos, heard.is_retained) for heard in listener.heard if job.id in heard.text} == {(1, False)}


def test_a_failure_is_told_with_its_reason(started, listener):
    job = started.task.fail.delay(message="no: not so")

    error = listener.wait_for_change(job, "error")

    assert error["data"] == {"error_type": "ValueError", "error_message": "no: not so"}
    assert error["status"] == "failed"


def test_a_retry_is_told_with_when_it_runs_again(started, listener, tmp_path):
    job = started.task.recover.delay(str(tmp_path / "runs"))

    retry = listener.wait_for_change(job, "retry")
    listener.wait_for_change(job, "completed")

    assert retry["status"] == "queued"
    assert retry["data"]["error_type"] == "TransientError"
    assert retry["data"]["error_message"] == "the network is away, run 1"
    assert retry["data"]["retry_count"] == 1
    assert retry["data"]["run_after_utc"]
    kinds = ["queued", "processing", "processing", "retry", "processing", "processing", "completed"]
    assert told(listener, job) == kinds


def test_a_cancellation_is_told(started, listener, tmp_path):
    job = started.task.note.delay(str(tmp_path / "file"), "", 20.0)
    started.wait_for(job, "running")

    control.cancel(job.id)

    assert listener.wait_for_change(job, "cancelled")["status"] == "cancelled"


def test_a_lost_process_and_a_poison_job_are_told(started, listener, tmp_path):
    job = started.task.note.delay(str(tmp_path / "file"), "", 1.0)
    eventually(lambda: lines(tmp_path / "file"), 10)
    kill_pool_child_that_notes(tmp_path / "file")
    poison = started.task.kill_its_worker.delay(str(tmp_path / "poison"))

    lost = listener.wait_for_change(job, "lost")
    assert lost["data"] == {"deaths": 1, "attempt": 1}
    listener.wait_for_change(job, "completed")
    error = listener.wait_for_change(poison, "error", 40)
    assert error["data"]["error_type"] == "WorkerLost"
    assert told(listener, poison).count("lost") == 3


def test_what_gives_a_job_back_to_its_queue_is_told_as_its_log_has_it(deploy, listener, mosquitto, worker_id):
    deployment = deploy(mosquitto.port, LEASE_RENEW_S="0.5")
    task = deployment.task
    without_message = task.add.delay(1, 2)
    with deployment.app.connection_for_write() as connection, connection.channel() as channel:
        assert channel.basic_get("add", no_ack=True).headers["id"] == without_message.id
    expired = task.total.apply_async(([1],), expires=0.3)
    deployment.start_worker("-Q", "add,become_add,fail")
    stopped = deployment.start_worker("--concurrency=1", "-Q", "stay", env={"WORKER_ID": f"{worker_id}-2"})

    released = task.stay.delay("/dev/null", 60.0)
    replayed = task.fail.delay()
    replaced = task.become_add.delay(1)
    deployment.wait_for(released, "running")
    stopped.signal(signal.SIGQUIT)
    deployment.wait_for(replayed, "failed")
    assert control.replay(replayed.id)

    attempt = ["claimed", "started"]
    for job, names in {
        without_message: ["created", "republished", *attempt, "completed"],
        expired: ["created", "cancelled"],
        released: ["created", *attempt, "released"],
        replayed: ["created", *attempt, "failed", "replayed", *attempt, "failed"],
        replaced: ["created", *attempt, "replaced", *attempt, "completed"],
    }.items():
        check_told_as_logged(deployment, listener, job, names)


def test_progress_rises_and_ends_at_100(started, listener):
    job = started.task.report.delay(1.5)

    listener.wait_for_change(job, "completed")

    events = listener.events(job)
    progress = [event["progress"] for event in events]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert {"progress": 40.0, "stage": "halfway"} in [event["data"] for event in events]
    (halfway,) = [event for event in events if event["data"].get("stage") == "halfway"]
    assert halfway["sequence"] == 3
    assert halfway["status"] == "running"


def test_progress_is_told_twice_a_second_at_most(deploy, mosquitto, listener):
    from tests.mqtt import capabilities

    deployment = deploy(mosquitto.port)
    deployment.start_worker("--concurrency=1", "-Q", "rise", plug_in=capabilities.__name__)

    job = capabilities.rise.delay(3.0)
    reports = job.get(timeout=20)
    listener.wait_for_change(job, "completed")

    told = [heard for heard in listener.heard if job.id in heard.text and "stage" in heard.payload["data"]]
    assert reports > 100
    assert 4 <= len(told) <= 7
    for earlier, later in itertools.pairwise(told):
        assert later.at - earlier.at > 0.35
    assert [heard.payload["progress"] for heard in told] == sorted(heard.payload["progress"] for heard in told)
    assert {(heard.qos, heard.is_retained) for heard in told} == {(0, False)}
    changes = [heard for heard in listener.heard if job.id in heard.text and heard not in told]
    assert {(heard.qos, heard.is_retained) for heard in changes} == {(1, False)}


def test_progress_never_falls_within_an_attempt_and_begins_anew_with_the_next(
    deploy, mosquitto, listener, worker_id, tmp_path
):
    from tests.mqtt import capabilities

    deployment = deploy(mosquitto.port)
    deployment.start_worker("--concurrency=2", "-Q", "follow", plug_in=capabilities.__name__)
    listener.wait_for_capability(worker_id)
    _wait_for_relay(deployment)
    files = [tmp_path / "wavering", tmp_path / "other"]
    wavering, other = jobs = [capabilities.follow.delay(str(file)) for file in files]

    def reach(job, percent):
        files[jobs.index(job)].write_text(f"{percent}\n")
        eventually(lambda: deployment.row(job)["stage"] == str(percent), 20)

    def hear(job, percent):
        eventually(lambda: percent in [event["data"].get("progress") for event in listener.events(job)], 20)

    reach(wavering, 60)
    hear(wavering, 60)
    reach(wavering, 20)
    reach(other, 30)
    hear(other, 30)  # so the relay has looked since
    reach(wavering, 80)
    hear(wavering, 80)
    files[0].write_text("retry\n")
    listener.wait_for_change(wavering, "retry")
    reach(wavering, 10)
    hear(wavering, 10)
    for job, file in zip(jobs, files, strict=True):
        file.write_text("end\n")
        listener.wait_for_change(job, "completed")

    events = listener.events(wavering)
    (retried,) = [number for number, event in enumerate(events) if event["event_type"] == "retry"]
    first, second = (
        [event["progress"] for event in attempt if "stage" in event["data"] or event["event_type"] == "completed"]
        for attempt in (events[:retried], events[retried:])
    )
    assert first == [60, 80]
    assert second == [10, 100]


def test_a_jobs_own_process_has_no_connection_to_the_broker(deploy, listen, private_mosquitto, worker_id, tmp_path):
    from tests.mqtt import capabilities

    broker = private_mosquitto()
    deployment = deploy(broker.port)
    deployment.start_worker("--concurrency=1", "-Q", "hold", plug_in=capabilities.__name__)
    listen(broker.port).wait_for_capability(worker_id)

    first = capabilities.hold.delay().get(timeout=20)
    os.kill(first["pid"], signal.SIGKILL)  # the next one is forked beside the client
    eventually(lambda: capabilities.hold.delay().get(timeout=20)["pid"] != first["pid"], 20)
    second = capabilities.hold.delay().get(timeout=20)

    assert first["modules"] == []
    assert broker.port not in (*first["ports"], *second["ports"])


def test_a_long_result_is_left_in_the_table(started, listener, tmp_path):
    job = started.task.note.delay("/dev/null", "x" * 70_000)
    short = started.task.note.delay("/dev/null", "x" * 60_000)

    assert listener.wait_for_change(job, "completed")["data"] == {"result": None, "is_truncated": True}
    assert len(listener.wait_for_change(short, "completed")["data"]["result"]) == 60_000


def test_many_changes_are_told_in_their_order_and_each_after_it_is_true(started, listener):
    """How soon they come, `make bench` measures."""
    store, logged = started.app.store, []

    def look(heard):
        if heard.topic.endswith("/events"):
            event = heard.payload
            row = store.job(event["job_id"])
            logged.append((event["event_type"], row["status"], len(store.logs(event["job_id"])) - event["sequence"]))

    listener.on_heard = look
    jobs = []
    for number in range(100):
        jobs.append(started.task.add.delay(number, 1))
        assert jobs[-1].get(timeout=20) == number + 1
    listener.wait_for_change(jobs[-1], "completed")

    assert [told(listener, job) for job in jobs] == [["queued", "processing", "processing", "completed"]] * 100
    ends = dict.fromkeys(event["job_id"] for event in listener.events() if event["event_type"] == "completed")
    assert list(ends) == [job.id for job in jobs]
    assert min(later for _, _, later in logged) == 0, "none was heard before its log row could be read"
    assert {status for event, status, _ in logged if event == "completed"} == {"completed"}


def test_what_is_submitted_before_the_first_worker_is_told_from_its_first_change_on(deployment, listener, worker_id):
    jobs = [deployment.task.add.delay(number, 1) for number in range(3)]
    cancelled = jobs.pop()
    control.cancel(cancelled.id)

    deployment.start_worker("--concurrency=2", "-Q", "add")

    for job in jobs:
        listener.wait_for_change(job, "completed")
        assert told(listener, job) == ["queued", "processing", "processing", "completed"]
    listener.wait_for_change(cancelled, "cancelled")
    assert told(listener, cancelled) == ["queued", "cancelled"]


def test_the_history_of_a_deployment_that_had_no_mqtt_is_not_told(deployment, listener, worker_id):
    worker = deployment.start_worker("-Q", "add", env={"BROADCAST_TYPE": "noop"})
    before = deployment.task.add.delay(1, 1)
    before.get(timeout=20)
    worker.terminate()
    worker.wait()
    since = deployment.task.add.delay(2, 2)

    deployment.start_worker("-Q", "add")

    listener.wait_for_change(since, "completed")
    assert told(listener, since) == ["queued", "processing", "processing", "completed"]
    assert listener.events(before) == []


def test_what_happens_while_the_broker_is_away_is_told_when_it_is_back(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=2", "-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)
    _wait_for_relay(deployment)

    broker.stop()
    jobs = [deployment.task.add.delay(number, 1) for number in range(250)]
    for job in jobs:
        assert job.get(timeout=30)
    worker.signal(signal.SIGSTOP)  # what it told before the listener is back would be heard by nobody
    broker.start()
    listener.wait_until_subscribed()
    worker.signal(signal.SIGCONT)

    for job in jobs:
        listener.wait_for_change(job, "completed", 30)
        assert told(listener, job) == ["queued", "processing", "processing", "completed"]


def _run(deployment, listener, interrupt, timeout_s=60):
    """100 jobs, with an interruption in the middle; each is told in order and without a gap."""
    jobs = [deployment.task.note.delay("/dev/null", str(number), 0.2) for number in range(100)]
    eventually(lambda: len(listener.all_changes()) >= 100 and _completed(listener) >= 20, 30)
    interrupt()
    eventually(lambda: _completed(listener) == 100, timeout_s, lambda: f"{_completed(listener)} of 100")
    for job in jobs:
        kinds = told(listener, job)
        assert (kinds[0], kinds[-1], kinds.count("completed")) == ("queued", "completed", 1)
        assert [log["sequence"] for log in deployment.app.store.logs(job.id)] == [
            change["sequence"] for change in listener.changes(job)
        ]


def _completed(listener):
    return sum(changes[-1]["event_type"] == "completed" for changes in listener.all_changes().values())


@pytest.mark.parametrize("is_relay", [False, True])
def test_a_run_with_a_dead_worker_is_told_in_order_and_without_a_gap(deployment, listener, worker_id, is_relay):
    first = deployment.start_worker("--concurrency=2")
    _wait_for_relay(deployment)
    second = deployment.start_worker("--concurrency=2", env={"WORKER_ID": f"{worker_id}-2"})

    _run(deployment, listener, (first if is_relay else second).kill9_everything)

    assert any("lost" in [c["event_type"] for c in changes] for changes in listener.all_changes().values())


def test_a_relay_that_stops_hands_over(deployment, listener, worker_id):
    first = deployment.start_worker("--concurrency=2")
    _wait_for_relay(deployment)
    deployment.start_worker("--concurrency=2", env={"WORKER_ID": f"{worker_id}-2"})

    _run(deployment, listener, first.terminate)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_is_told_is_in_the_tables_for_whoever_reads_them_then(
    request, deploy, listen, mosquitto, worker_id, database
):
    env = {"DATABASE_URL": request.getfixturevalue("fresh_postgres_url")} if database == "postgresql" else {}
    deployment = deploy(mosquitto.port, **env)
    if env:
        schema.upgrade(deployment.app.store.database)
    deployment.start_worker("--concurrency=2", "-Q", "add,fail")
    listen(mosquitto.port).wait_for_capability(worker_id)
    _wait_for_relay(deployment)
    untrue, times = [], itertools.count()
    tables = _tables(deployment.app.settings.database_url)

    def read_now(event):
        next(times)
        logged = tables.execute(
            text(
                "SELECT event_type, log.sequence <= job.sequence FROM task_logs log JOIN task_queue job USING (job_id)"
                " WHERE job_id = :job_id AND log.sequence = :sequence"
            ),
            {name: event[name] for name in ("job_id", "sequence")},
        ).one_or_none()
        if logged is None or (CHANGES[logged[0]], logged[1]) != ((event["event_type"], event["status"]), True):
            untrue.append((event, logged))

    def read_at_each_event(client):
        keep = client.on_message

        def on_message(client, data, message):
            if message.topic.endswith("/events"):
                read_now(json.loads(message.payload))
            keep(client, data, message)

        client.on_message = on_message

    listener = listen(mosquitto.port, setup=read_at_each_event)
    task = deployment.task
    jobs = [task.fail.delay() if number % 5 == 0 else task.add.delay(number, 1) for number in range(200)]

    for job in jobs:
        eventually(lambda job=job: len(listener.changes(job)) == 4, 40)
    listener.close()
    tables.close()
    assert untrue == []
    assert next(times) >= 4 * len(jobs)


def _tables(url):
    """A connection of its own, each of whose statements sees what is committed by then; for any one thread."""
    options = {"connect_args": {"check_same_thread": False}} if url.startswith("sqlite") else {}
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool, **options)
    return engine.connect()


def test_all_is_told_on_rabbitmq_and_postgresql_although_the_relay_is_killed(
    deploy, listener, mosquitto, worker_id, fresh_rabbitmq_url, fresh_postgres_url
):
    servers = {"CELERY_BROKER_URL": fresh_rabbitmq_url, "DATABASE_URL": fresh_postgres_url}
    upgrade = [sys.executable, "-m", "celery", "-A", "tasks", "db", "upgrade"]
    subprocess.run(upgrade, cwd=REPOSITORY, env=without_settings(os.environ) | servers, check=True, timeout=60)
    deployment = deploy(mosquitto.port, **servers)
    first = deployment.start_worker("--concurrency=2")
    _wait_for_relay(deployment)
    deployment.start_worker("--concurrency=2", env={"WORKER_ID": f"{worker_id}-2"})

    _run(deployment, listener, first.kill9_everything, 90)
