"""What `.delay()` writes and sends, in which order, and what it refuses."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery, chain, chord, group
from kombu import Queue
from kombu.exceptions import OperationalError

from db import schema
from db.errors import DatabaseUnavailable
from tasks import enqueue
from tasks.errors import InvalidArguments, PathNotAllowed, UnknownQueue, UnknownTask
from tests.acceptance.deployment import deployed
from tests.unit.jobs import beat_of, messages, publications, run

# Row, then broker


def test_a_task_of_another_app_submits_as_any_producer_does(producer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    host = Celery("host", set_as_current=False)
    seen = []

    @host.task
    def upload():
        seen.append(producer.task.image_resize.delay("in.jpg", "out.webp", width=9))
        with pytest.raises(InvalidArguments, match="width"):
            producer.task.image_resize.delay("in.jpg", "out.webp", width=0)

    assert run(upload, "host-1") is None
    (job,) = seen
    row = producer.row(job)
    assert row["parameters"]["input"] == str(tmp_path / "in.jpg")
    assert (row["root_id"], row["parent_id"]) == (job.id, None)


def test_a_job_has_its_row_and_one_message_with_the_rows_publication(producer, task):
    job = task.add.delay(1, y=2)

    row = producer.row(job)
    (message,) = messages(producer, "add")
    assert (row["status"], row["task_type"], row["queue"]) == ("queued", "add", "add")
    assert (row["publication"], row["attempt"], row["priority"], row["max_retries"]) == (1, 0, 5, 2)
    assert row["parameters"] == {"x": 1, "y": 2}
    assert (row["root_id"], row["parent_id"], row["group_id"]) == (job.id, None, None)
    assert message.headers["publication"] == 1
    assert message.headers["id"] == job.id
    assert producer.events(job) == ["created"]


def test_the_row_keeps_what_is_needed_to_publish_the_job_again(producer, task):
    job = task.add.apply_async((1,), {"y": 2}, priority=7, time_limit=9)

    message = producer.row(job)["message"]
    assert (message["args"], message["kwargs"]) == ([1], {"y": 2})
    assert message["options"]["priority"] == 7
    assert message["options"]["time_limit"] == 9


def test_a_producer_whose_database_loses_the_answer_of_a_commit_submits_one_job(
    server_dir, tmp_path, fresh_postgres_url, monkeypatch
):
    with deployed(server_dir, tmp_path, {"DATABASE_URL": fresh_postgres_url}) as deployment:
        store = deployment.app.store
        schema.upgrade(store.database)
        change = store._changing

        @contextmanager
        def losing():
            monkeypatch.setattr(store, "_changing", change)
            with change() as connection:
                yield connection
            raise DatabaseUnavailable("the connection was lost")

        monkeypatch.setattr(store, "_changing", losing)
        job = deployment.task.add.delay(1, 2)

        assert [row["job_id"] for row in store.jobs()] == [job.id]
        assert len(messages(deployment, "add")) == 1


def test_the_row_is_there_before_the_broker_sees_the_job(producer, task, monkeypatch):
    seen = []
    send = producer.app.amqp.send_task_message

    def spy(client, name, message, **options):
        seen.append(producer.row(message.headers["id"])["status"])
        return send(client, name, message, **options)

    producer.app.amqp.__dict__["send_task_message"] = spy
    task.add.delay(1, 1)

    assert seen == ["queued"]


@pytest.fixture
def refused(server_dir, tmp_path):
    """A producer whose broker refuses connections."""
    env = {"CELERY_BROKER_URL": "amqp://user:hunter2@127.0.0.1:9//"}
    with deployed(server_dir, tmp_path, env) as deployment:
        deployment.app.conf.task_publish_retry = False
        deployment.app.conf.broker_transport_options = {"max_retries": 1, "interval_start": 0}
        yield deployment


def test_a_broker_that_refuses_fails_the_row_before_the_error_reaches_the_caller(refused):
    with pytest.raises(OperationalError) as caught:
        refused.task.add.apply_async((1, 1), task_id="job-1")

    row = refused.row("job-1")
    assert row["status"] == "failed"
    assert row["error_message"]
    assert refused.events("job-1") == ["created", "failed"]
    assert (
        "hunter2" not in f"{caught.value!r} {row['error_message']} {[dict(r) for r in refused.app.store.logs('job-1')]}"
    )


def test_a_broker_that_refuses_is_named_without_its_password_and_with_what_helps(refused):
    with pytest.raises(OperationalError) as caught:
        refused.task.add.apply_async((1, 1), task_id="job-1")

    message = str(caught.value)
    assert message.startswith("the broker does not answer at amqp://user:**@127.0.0.1:9// (")
    assert "refused" in message
    assert "start it, or set CELERY_BROKER_URL to one that runs" in message
    assert refused.row("job-1")["error_message"] == message


def test_an_embedded_broker_that_can_not_be_used_is_named_by_its_file_and_what_helps(producer, task):
    (producer.server_dir / "broker.db").write_bytes(b"this is no database, and never was one" * 100)

    with pytest.raises(OperationalError, match=r"Broker file .*/broker\.db: it is no SQLite database; name"):
        task.add.delay(1, 1)


def test_a_job_that_failed_to_be_published_can_be_sent_again_under_its_id(producer, task, monkeypatch):
    send = producer.app.amqp.send_task_message

    def refuse(*args, **options):
        raise OperationalError("refused")

    producer.app.amqp.__dict__["send_task_message"] = refuse
    with pytest.raises(OperationalError):
        task.add.apply_async((1, 1), task_id="job-1")
    producer.app.amqp.__dict__["send_task_message"] = send

    task.add.apply_async((1, 1), task_id="job-1")

    assert producer.events("job-1") == ["created", "failed", "replayed"]
    (message,) = messages(producer, "add")
    assert message.headers["publication"] == producer.row("job-1")["publication"] == 2
    assert len(producer.app.store.jobs()) == 1


def test_a_job_id_that_is_known_is_not_sent_again(producer, task):
    first = task.add.apply_async((1, 1), task_id="job-1")

    second = task.add.apply_async((1, 1), task_id="job-1")

    assert first.id == second.id
    assert producer.events("job-1") == ["created"]
    assert len(messages(producer, "add")) == 1


def test_an_unusable_database_is_an_error_at_the_call_and_nothing_is_sent(producer, task):
    (producer.server_dir / "media_store.db").write_bytes(b"this is no database, and never was one" * 100)

    with pytest.raises(Exception, match=r"media_store\.db"):
        task.add.delay(1, 1)

    assert messages(producer, "add") == []


# Options


@pytest.mark.parametrize("priority", [0, 11, -1, "high", 5.5])
def test_a_priority_out_of_range_is_refused(producer, task, priority):
    with pytest.raises(InvalidArguments, match="from 1 to 10"):
        task.add.apply_async((1, 1), priority=priority)

    assert producer.app.store.jobs() == []


def test_priorities_go_to_the_broker_as_they_are(producer, task):
    for priority in (1, 10, 5):
        task.add.apply_async((1, 1), priority=priority)

    assert [message.properties["priority"] for message in messages(producer, "add")] == [10, 5, 1]
    assert sorted(row["priority"] for row in producer.app.store.jobs()) == [1, 5, 10]


def test_priorities_are_turned_around_for_redis_once(server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": "redis://127.0.0.1:9/0"}) as deployment:
        assert [deployment.app.wire_priority(priority) for priority in (1, 5, 10)] == [9, 5, 0]
        assert deployment.app.wire_priority(11) == 0, "what has begun, of the highest priority"
        assert deployment.app.conf.broker_transport_options["priority_steps"] == list(range(10))


def test_a_retry_without_a_row_keeps_the_priority_that_its_message_has(server_dir, tmp_path, monkeypatch):
    env = {"CELERY_BROKER_URL": "redis://localhost", "MIRROR": "off"}
    with deployed(server_dir, tmp_path, env) as deployment:
        app = deployment.app
        first, retry = {"task_id": "a job", "priority": 9}, {"task_id": "a job", "priority": 1, "retries": 1}
        enqueue.prepared(app, "add", (1, 1), {}, first)
        running = SimpleNamespace(request=SimpleNamespace(id="a job"))
        monkeypatch.setattr(type(app), "current_worker_task", running)
        enqueue.prepared(app, "add", (1, 1), {}, retry)

        assert (first["priority"], retry["priority"]) == (1, 1)


def test_a_job_without_a_row_that_a_worker_submits_is_left_as_it_is_to_who_runs_it(server_dir, tmp_path, monkeypatch):
    """It stands elsewhere, and its own job must not fail for it."""
    given = ("in.jpg", "out.webp"), {"width": 0}
    with deployed(server_dir, tmp_path, {"ENQUEUE": "broker"}) as deployment:
        running = SimpleNamespace(request=SimpleNamespace(id="another"))
        monkeypatch.setattr(type(deployment.app), "current_worker_task", running)

        assert enqueue.prepared(deployment.app, "image_resize", *given, {"task_id": "a job"}) == given


def test_without_the_mirror_arguments_are_not_looked_at(server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"MIRROR": "off"}) as deployment:
        args, kwargs = enqueue.prepared(deployment.app, "image_resize", ("/in.jpg",), {"width": 0}, {"countdown": "x"})

    assert (list(args), kwargs) == (["/in.jpg"], {"width": 0})


def test_an_expiry_is_in_the_row_and_the_header_but_not_a_time_to_live(producer, task):
    job = task.add.apply_async((1, 1), expires=60)

    (message,) = messages(producer, "add")
    expires_at = producer.row(job)["expires_at"]
    assert 55 < (expires_at - datetime.now(UTC)).total_seconds() <= 60
    assert datetime.fromisoformat(message.headers["expires"]) == expires_at
    assert not message.properties.get("expiration")


@pytest.mark.parametrize("option", ["countdown", "eta"])
def test_a_job_that_is_due_later_rests_in_its_row_without_a_message(producer, task, option):
    value = 60 if option == "countdown" else datetime.now(UTC) + timedelta(seconds=60)

    job = task.add.apply_async((1, 1), **{option: value})

    assert 55 < (producer.row(job)["run_after_utc"] - datetime.now(UTC)).total_seconds() <= 60
    assert (producer.row(job)["published_at"], messages(producer, "add")) == (None, [])


# Canvases


def test_a_chain_sends_its_first_step_only(producer, task):
    result = chain(task.add.s(1, 1), task.add.s(2))()

    assert len(messages(producer, "add")) == 1
    assert [row["job_id"] for row in producer.app.store.jobs()] == [result.parent.id]


def test_the_members_of_a_group_share_its_id(producer, task):
    result = group(task.add.s(1, 1), task.add.s(2, 2))()

    rows = producer.app.store.jobs()
    assert {row["group_id"] for row in rows} == {result.id}
    assert [row["in_chord"] for row in rows] == [False, False]


def test_the_members_of_a_chord_are_marked_as_such(producer, task):
    chord([task.add.s(1, 1), task.add.s(2, 2)], task.total.s())()

    assert [row["in_chord"] for row in producer.app.store.jobs()] == [True, True]


# Arguments


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parameters_of(producer):
    (row,) = producer.app.store.jobs()
    return row["parameters"]["input"], row["parameters"]["output"]


@pytest.mark.parametrize(
    "submit",
    [
        lambda task: task.delay("in.jpg", "out.webp", width=9),
        lambda task: task.delay(Path("in.jpg"), output=Path("out.webp"), width=9),
        lambda task: task.apply_async(("in.jpg", "out.webp"), {"width": 9}),
        lambda task: task.apply_async(kwargs={"input": "in.jpg", "output": "out.webp", "width": 9}),
        lambda task: task.s("in.jpg", "out.webp", width=9).delay(),
        lambda task: task.si("in.jpg", "out.webp", width=9).apply_async(),
        lambda task: task.signature(("in.jpg", "out.webp"), {"width": 9}).delay(),
        lambda task: task.signature(("in.jpg", "out.webp"), kwargs={"width": 9}).delay(),
        lambda task: task.subtask(("in.jpg", "out.webp"), {"width": 9}).delay(),
        lambda task: chain(task.s("in.jpg", "out.webp", width=9), task.s("last.webp", width=9)).delay(),
        lambda task: task.app.send_task("image_resize", ("in.jpg", "out.webp"), {"width": 9}),
    ],
    ids=["delay", "paths", "apply_async", "kwargs", "s", "si", "signature", "keywords", "subtask", "chain", "by-name"],
)
def test_relative_paths_are_made_absolute_where_the_job_is_submitted(producer, task, elsewhere, submit):
    submit(task.image_resize)

    assert parameters_of(producer) == (str(elsewhere / "in.jpg"), str(elsewhere / "out.webp"))


def test_the_output_of_a_later_step_is_absolute_too(producer, task, elsewhere):
    steps = chain(task.image_resize.s("in.jpg", "small.png", width=9), task.image_conversion.s("small.webp"))

    assert steps.tasks[1].args == (str(elsewhere / "small.webp"),)


def test_a_path_stays_absolute_when_the_process_goes_elsewhere(producer, task, elsewhere, monkeypatch):
    signature = task.image_resize.s("in.jpg", "out.webp", width=9)
    monkeypatch.chdir("/")

    signature.delay()

    assert parameters_of(producer) == (str(elsewhere / "in.jpg"), str(elsewhere / "out.webp"))


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        (("in.jpg",), {"width": 9}, "output"),
        (("in.jpg", "out.png"), {}, "width"),
        (("in.jpg", "out.png"), {"width": 0}, "width"),
        (("in.jpg", "out.png"), {"width": 9, "fit": "squeeze"}, "fit"),
        (("in.jpg", "out.png"), {"width": 9, "size": 3}, "size"),
        (("in.jpg", ""), {"width": 9}, "output"),
        ((7, "out.png"), {"width": 9}, "input"),
    ],
)
def test_arguments_are_checked_at_the_call(producer, task, args, kwargs, word):
    with pytest.raises((ValueError, TypeError), match=word):
        task.image_resize.apply_async(args, kwargs)
    with pytest.raises((ValueError, TypeError), match=word):
        producer.app.send_task("image_resize", args, kwargs)

    assert producer.app.store.jobs() == []
    assert messages(producer, "image_resize") == []


def test_an_output_equal_to_the_input_is_refused_at_the_call(producer, task, elsewhere):
    with pytest.raises(PathNotAllowed):
        task.image_resize.delay("a.jpg", elsewhere / "a.jpg", width=9)


def test_unknown_names_are_refused_with_the_nearest_known(producer, task):
    with pytest.raises(UnknownTask, match=r"image_reszie; did you mean image_resize\?"):
        producer.app.send_task("image_reszie", (1,))
    with pytest.raises(UnknownQueue, match=r"aad; did you mean add\?"):
        task.add.apply_async((1, 1), queue="aad")
    with pytest.raises(UnknownTask, match=r"no worker serves xyzzy$"):
        producer.app.send_task("xyzzy")

    assert producer.app.store.jobs() == []


def test_a_queue_that_celerys_own_settings_name_is_known(producer, task):
    producer.app.conf.task_queues = [Queue("extra")]

    job = task.add.apply_async((1, 1), queue="extra")

    assert publications(producer, "extra") == [(job.id, 1)]


def test_a_task_that_is_unknown_here_goes_to_a_queue_that_a_live_worker_serves(producer):
    producer.app.store.heartbeat(beat_of("w1", capabilities=["theirs"]))

    job = producer.app.send_task("their.task", (1,), queue="theirs")

    assert publications(producer, "theirs") == [(job.id, 1)]
