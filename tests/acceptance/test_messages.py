"""What arrives at a worker: twice, late, from other clients, unknown or unreadable. Nothing runs twice, nobody dies."""

import base64
import json
import pickle
import sqlite3
import uuid
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from celery import Celery, chord
from kombu import Queue

from tests.acceptance.deployment import lines
from tests.tooling import processes
from tests.tooling.waiting import eventually
from tests.unit.jobs import new_job

COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 10}
pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def task(deployment):
    return deployment.task


@pytest.fixture
def publish(deployment):
    """Put a raw message into a queue, past all that a producer does."""

    def send(queue, body, headers, content_type="application/json", content_encoding="utf-8", **properties):
        with deployment.app.connection_for_write() as connection, connection.channel() as channel:
            declared = Queue(queue, durable=True, max_priority=10)
            producer = connection.Producer(channel)
            producer.publish(
                body, routing_key=queue, declare=[declared], headers=headers, serializer=None,
                content_type=content_type, content_encoding=content_encoding, **properties,
            )  # fmt: skip

    return send


def message(name, *args, task_id=None, publication=None, embed=None, **headers):
    """Body and headers of a task message, protocol 2."""
    task_id = task_id or str(uuid.uuid4())
    header = {"lang": "py", "task": name, "id": task_id, "root_id": task_id, "parent_id": None, "group": None}
    header |= {"retries": 0, "eta": None, "expires": None, "timelimit": [None, None], "origin": "elsewhere"} | headers
    if publication is not None:
        header["publication"] = publication
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None} | (embed or {})
    return json.dumps([list(args), {}, embed]), header


def assert_serves(deployment):
    assert deployment.task.add.delay(20, 22).get(**GET) == 42


def test_a_message_that_arrives_twice_runs_once(deployment, task, publish, tmp_path):
    file = str(tmp_path / "runs")
    job = task.note.delay(file, "once", 0.3)
    for _ in range(3):
        publish("note", *message("note", file, "once", 0.3, task_id=job.id, publication=1))

    job.get(**GET)

    assert_serves(deployment)
    eventually(lambda: messages_of(deployment, "note") == 0, 10)
    assert lines(tmp_path / "runs") == ["begin once", "end once"]
    assert deployment.events(job) == COMPLETED


def test_a_late_duplicate_of_a_completed_job_has_no_effect_and_sends_no_links(deployment, task, publish, tmp_path):
    file = str(tmp_path / "runs")
    job = task.note.delay(file, "once")
    job.get(**GET)
    link = dict(task.note.si(str(tmp_path / "link"), "linked"))

    body, headers = message("note", file, "again", task_id=job.id, publication=1, embed={"callbacks": [link]})
    publish("note", body, headers)

    eventually(lambda: messages_of(deployment, "note") == 0, 10)
    assert_serves(deployment)
    assert lines(tmp_path / "runs") == ["begin once", "end once"]
    assert not (tmp_path / "link").exists()
    assert deployment.events(job) == COMPLETED


def test_a_duplicate_of_a_member_runs_the_chords_body_once(deployment, task, publish, tmp_path):
    result = chord([task.add.s(1, 1), task.add.s(2, 2)], task.note_parts.s(str(tmp_path / "body")))()
    result.get(**GET)
    (member, _) = result.parent
    row = deployment.row(member)
    options = row["message"]["options"]

    body, headers = message(
        "add", 1, 1, task_id=member.id, publication=1, group=row["group_id"], embed={"chord": options["chord"]}
    )
    publish("add", body, headers)

    eventually(lambda: messages_of(deployment, "add") == 0, 10)
    assert_serves(deployment)
    assert lines(tmp_path / "body") == ["body [2, 4]"]
    assert deployment.events(result) == COMPLETED


def test_a_message_of_an_earlier_publication_has_no_effect(deployment, task, publish, tmp_path):
    file = str(tmp_path / "runs")
    job = task.recover.delay(file)  # the retry raised the publication to 2
    eventually(lambda: deployment.row(job)["publication"] == 2, 10)

    publish("recover", *message("recover", file, task_id=job.id, publication=1))

    eventually(lambda: f"recover[{job.id}] not run: stale" in deployment.workers[0].log(), 10)
    assert job.get(**GET) == 2
    assert lines(tmp_path / "runs") == ["run", "run"]
    assert deployment.events(job) == ["created", "claimed", "started", "retry", "claimed", "started", "completed"]


def test_a_message_of_another_celery_client_gets_its_row(deployment, publish):
    client = Celery("elsewhere", broker=deployment.app.conf.broker_url, set_as_current=False)
    client.conf.task_queue_max_priority = 10
    try:
        sent = client.send_task("add", (40, 2), queue="add")
    finally:
        client.close()

    row = deployment.wait_for(sent, "completed")

    assert (row["task_type"], row["queue"], row["result_data"]) == ("add", "add", 42)
    assert row["parameters"] == {"x": 40, "y": 2}
    assert deployment.events(sent) == COMPLETED


def test_the_arguments_of_another_clients_message_are_checked_by_the_worker(deployment, publish, tmp_path):
    body, headers = message("image_resize", "in.jpg", str(tmp_path / "out.png"))

    publish("image_resize", body, headers)

    row = deployment.wait_for(headers["id"], "failed")
    assert row["error_type"] == "PathNotAllowed", "its input is no absolute path"
    assert row["retry_count"] == 0
    assert not (tmp_path / "out.png").exists()


def test_an_unknown_task_is_a_failed_row(deployment, publish):
    body, headers = message("no_such_task", 1, 2)

    publish("add", body, headers)

    row = deployment.wait_for(headers["id"], "failed")
    assert (row["task_type"], row["error_type"]) == ("no_such_task", "UnknownTask")
    assert deployment.events(headers["id"]) == ["created", "failed"]
    assert_serves(deployment)


@pytest.mark.parametrize(
    "body",
    ["{this is no json", "[]", "null", '[[1, 2], "no mapping", {}]', '"text"'],
    ids=["broken", "empty", "null", "bad-kwargs", "text"],
)
def test_a_malformed_body_is_a_failed_row(deployment, publish, body):
    _, headers = message("add")

    publish("add", body, headers)

    row = deployment.wait_for(headers["id"], "failed")
    assert (row["task_type"], row["queue"], row["retry_count"]) == ("add", "add", 0)
    assert row["error_message"]
    assert_serves(deployment)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("publication", value) for value in (NAN, INFINITY, 2**70, 2**31, 1e30, 1.5, 0, -1, True)],
        *[("retries", value) for value in (NAN, INFINITY, 2**70, 2**31, 1.5, -1, True)],
        *[("group_index", value) for value in (2**70, [1])],
        *[("timelimit", value) for value in ([NAN, None], [None, INFINITY], [10**400, None], [-1, None])],
        *[(name, "9999-12-31T23:59:59-23:00") for name in ("eta", "expires")],
        ("shadow", ["a"]),
        ("stamped_headers", 5),
    ],
    ids=range(26),
)
def test_a_field_that_no_job_can_have_is_a_failed_row(deployment, worker, publish, name, value):
    body, headers = message("add", 1, 2)

    publish("add", body, headers | {name: value})

    row = eventually(lambda: deployment.app.store.job(headers["id"]) or not worker.is_alive(), 20)
    assert worker.is_alive()
    assert (row["status"], row["error_type"], name in row["error_message"]) == ("failed", "MalformedMessage", True)
    assert [row[column] for column in ("publication", "retry_count", "group_index")] == [1, 0, None]
    assert deployment.events(headers["id"]) == ["created", "failed"]
    assert f"add[{headers['id']}]: its field" in worker.log()
    eventually(lambda: messages_of(deployment, "add") == 0, 10)
    assert_serves(deployment)


def test_a_job_whose_message_came_damaged_fails(deployment, publish):
    job_id = str(uuid.uuid4())
    assert deployment.app.store.enqueue(new_job(job_id, parameters={"x": 1}))
    body, headers = message("add", 1, task_id=job_id)

    publish("add", body, headers | {"publication": NAN})

    row = deployment.wait_for(job_id, "failed")
    assert (row["error_type"], row["parameters"]) == ("MalformedMessage", {"x": 1})
    assert_serves(deployment)


@pytest.mark.parametrize("body", ["{}", '{"args": [1, 2], "kwargs": {}, "shadow": ["a"]}'], ids=["empty", "shadow"])
def test_a_body_that_is_a_mapping_is_looked_through_as_well(deployment, worker, publish, body):
    _, headers = message("add")

    publish("add", body, headers)

    row = eventually(lambda: deployment.app.store.job(headers["id"]) or not worker.is_alive(), 20)
    assert worker.is_alive()
    assert (row["status"], row["error_type"]) == ("failed", "MalformedMessage")
    assert_serves(deployment)


def test_a_message_that_is_no_task_is_logged(deployment, publish):
    before = rejected(deployment)

    publish("add", json.dumps({"hello": "world"}), {})

    eventually(lambda: rejected(deployment) > before, 10)
    assert_serves(deployment)


def test_a_message_whose_json_is_broken_and_which_names_no_job_is_logged(deployment, publish):
    before = rejected(deployment)

    publish("add", "{no json", {})

    eventually(lambda: rejected(deployment) > before, 10)
    assert_serves(deployment)


def test_a_message_without_an_id_is_logged(deployment, publish):
    before = rejected(deployment)

    publish("add", json.dumps([[1, 2], {}, {}]), {"task": "add", "lang": "py"})

    eventually(lambda: rejected(deployment) > before, 10)
    assert_serves(deployment)


class Exploit:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("encoding", ["binary", "base64"])
def test_a_pickle_is_refused_and_nothing_of_it_runs(deployment, publish, tmp_path, encoding):
    content = pickle.dumps([[Exploit(str(tmp_path / "pwned")), 1], {}, {}])
    if encoding == "base64":
        content = base64.b64encode(content)
    _, headers = message("add")

    publish("add", content, headers, content_type="application/x-python-serialize", content_encoding=encoding)

    row = deployment.wait_for(headers["id"], "failed")
    assert not (tmp_path / "pwned").exists()
    assert "claimed" not in deployment.events(headers["id"])
    assert row["error_message"]
    assert_serves(deployment)


def test_a_revoked_job_is_cancelled_and_never_starts(deployment, task, tmp_path):
    blockers = [task.note.delay("/dev/null", "", 1.0) for _ in range(2)]
    job = task.note.delay(str(tmp_path / "runs"))

    job.revoke()

    row = deployment.wait_for(job, "cancelled")
    assert row["error_type"] == "TaskRevokedError"
    assert deployment.events(job) == ["created", "cancelled"]
    assert job.state == "REVOKED"
    for blocker in blockers:
        blocker.get(**GET)
    assert not (tmp_path / "runs").exists()


def test_a_running_job_that_is_terminated_is_cancelled(deployment, task, tmp_path):
    job = task.note.delay(str(tmp_path / "runs"), "", 30.0)
    eventually(lambda: lines(tmp_path / "runs"), 10)
    pid = int(lines(tmp_path / "runs.pid")[-1])

    job.revoke(terminate=True, signal="SIGKILL")

    deployment.wait_for(job, "cancelled")
    eventually(lambda: not processes.is_running(pid), 3)
    assert deployment.events(job) == ["created", "claimed", "started", "cancelled"]
    assert_serves(deployment)


def test_an_expired_job_is_cancelled_and_never_starts(deployment, task, tmp_path):
    blockers = [task.note.delay("/dev/null", "", 1.0) for _ in range(2)]
    job = task.note.apply_async((str(tmp_path / "runs"),), expires=0.3)
    assert deployment.row(job)["expires_at"] is not None

    row = deployment.wait_for(job, "cancelled")

    assert "expired" in row["error_message"]
    assert deployment.events(job) == ["created", "cancelled"]
    for blocker in blockers:
        blocker.get(**GET)
    assert not (tmp_path / "runs").exists()


def test_a_job_that_expired_before_it_was_submitted_is_cancelled(deployment, task, tmp_path):
    past = datetime.now(UTC) - timedelta(minutes=1)

    job = task.note.apply_async((str(tmp_path / "runs"),), expires=past)

    deployment.wait_for(job, "cancelled")
    assert not (tmp_path / "runs").exists()


def test_a_transient_error_is_retried_later_with_the_error_in_the_row(deployment, task, tmp_path):
    job = task.recover.delay(str(tmp_path / "runs"))

    row = eventually(lambda: (row := deployment.row(job))["retry_count"] and row, 10)
    assert (row["status"], row["retry_count"], row["publication"]) == ("queued", 1, 2)
    assert (row["error_type"], row["error_message"]) == ("TransientError", "the network is away, run 1")
    (retry,) = [log for log in deployment.app.store.logs(job.id) if log["event_type"] == "retry"]
    due = row["run_after_utc"]
    assert 1.4 <= (due - retry["created_at"]).total_seconds() <= 2.6
    assert job.state == "RETRY"

    assert job.get(**GET) == 2
    row = deployment.row(job)
    assert (row["attempt"], row["deaths"], row["error_type"]) == (2, 0, None)
    assert row["claimed_at"] >= due


def test_a_permanent_error_is_not_retried(deployment, task):
    job = task.refuse.delay("in.tif")

    row = deployment.wait_for(job, "failed")

    assert (row["error_type"], row["retry_count"]) == ("LimitExceeded", 0)
    assert deployment.events(job) == ["created", "claimed", "started", "failed"]
    with pytest.raises(Exception, match="too large") as caught:
        job.get(**GET)
    assert type(caught.value).__name__ == "LimitExceeded"
    assert type(caught.value).__module__ == "tasks.errors"


def test_a_result_that_is_not_json_fails_the_job(deployment, task):
    job = task.unreadable.delay("/in", "/out")

    row = deployment.wait_for(job, "failed")

    assert row["error_type"] == "EncodeError"
    assert "JSON" in row["error_message"]
    assert "SQL" not in row["error_message"]
    assert_serves(deployment)


def test_progress_by_update_state_is_in_the_row(deployment, task):
    job = task.report.delay(1.0)

    row = eventually(lambda: (row := deployment.row(job))["progress"] and row, 10)

    assert (row["progress"], row["stage"], row["status"]) == (40, "halfway", "running")
    assert (job.state, job.info) == ("STARTED", {"progress": 40, "stage": "halfway"})
    job.get(**GET)
    assert deployment.events(job) == COMPLETED
    assert deployment.row(job)["progress"] == 100


def test_a_body_that_raises_ignore_ends_its_row(deployment, task):
    job = task.ignore.delay()

    assert deployment.wait_for(job, "cancelled")["error_message"] == "ignored: not today"


def test_nothing_that_a_user_handed_in_is_logged(deployment, task, publish):
    job = task.secret_keeper.delay(password="hunter2")
    job.get(**GET)
    publish("add", json.dumps([["hunter2"], {}, {}]), {"task": "no_such_task", "id": str(uuid.uuid4()), "lang": "py"})
    publish("add", "{hunter2", {"task": "add", "id": str(uuid.uuid4()), "lang": "py"})
    publish("add", json.dumps({"password": "hunter2"}), {})
    assert_serves(deployment)

    eventually(lambda: messages_of(deployment, "add") == 0, 10)
    assert "hunter2" not in deployment.workers[0].log()


def test_the_worker_that_met_all_of_this_is_still_the_same(deployment, worker):
    assert worker.is_alive()
    assert len(deployment.workers) == 1
    assert_serves(deployment)
    for queue in ("add", "note", "recover", "image_resize"):
        eventually(lambda queue=queue: messages_of(deployment, queue) == 0, 10, f"all messages in {queue} are settled")


def messages_of(deployment, name):
    """Ready, or reserved by a worker."""
    with closing(sqlite3.connect(deployment.server_dir / "broker.db")) as connection:
        return connection.execute("SELECT count(*) FROM messages WHERE queue = ?", (name,)).fetchone()[0]


def rejected(deployment):
    from sqlalchemy import text

    with deployment.app.store.database.reading() as connection:
        return connection.execute(text("SELECT count(*) FROM task_logs WHERE event_type = 'rejected'")).scalar()
