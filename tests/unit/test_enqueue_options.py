"""What else `.delay()` can do: later, through the outbox, without a database, one at a time, from within a worker."""

import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
from amqp.exceptions import InternalError, NotAllowed, NotFound
from celery import chain, chord, group
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded
from celery.exceptions import TimeoutError as ResultTimeout
from kombu.exceptions import OperationalError

from db.records import Status, now
from tasks.errors import InvalidArguments, UnknownQueue
from tasks.outgoing import Dispatcher
from tasks.rows import describe
from tests.acceptance.deployment import deployed
from tests.unit.jobs import change, claim, messages, new_job, publications, run

# Due at once, after all


@pytest.mark.parametrize("options", [{"countdown": 0}, {"countdown": -5}, {"eta": now() - timedelta(hours=1)}])
def test_what_is_due_already_is_sent_at_once(producer, add, options):
    job = add.apply_async((1, 1), **options)

    assert publications(producer, "add") == [(job.id, 1)]
    assert producer.row(job)["run_after_utc"] is None


@pytest.mark.parametrize(
    ("option", "value", "takes"),
    [
        ("countdown", "x", "a number of seconds, such as 60"),
        ("countdown", "2031-01-31T12:00:00", "a number of seconds"),
        ("countdown", float("nan"), "a number of seconds"),
        ("countdown", float("inf"), "a number of seconds"),
        ("countdown", 1e12, "3,153,600,000 at most"),
        ("countdown", True, "a number of seconds"),
        ("countdown", timedelta(seconds=5), "a number of seconds"),
        ("eta", "x", "a datetime or ISO 8601 text, such as '2031-01-31T12:00:00Z'"),
        ("eta", "", "a datetime"),
        ("eta", 60, "countdown takes seconds"),
        ("eta", now().date(), "a datetime"),
        ("expires", "x", "a number of seconds, such as 60 (3,153,600,000 at most), from now, or a datetime"),
        ("expires", float("nan"), "a number of seconds"),
        ("expires", [60], "a number of seconds"),
        ("priority", "x", "a whole number from 1 to 10"),
        ("priority", 11, "a whole number from 1 to 10"),
        ("priority", True, "a whole number from 1 to 10"),
        ("time_limit", "x", "a number of seconds"),
        ("time_limit", -1, "a number of seconds"),
        ("soft_time_limit", float("nan"), "a number of seconds"),
        ("unique_for", True, "a number of seconds"),
        ("task_id", 5, "a printable text of 1 to 255 characters"),
        ("task_id", "a\nb", "a printable text"),
        ("task_id", "i" * 256, "a printable text"),
        ("retries", "x", "a whole number from 0"),
        ("retries", -1, "a whole number from 0"),
        ("serializer", "pickle", "'json'"),
        ("headers", "x", "a dict"),
        ("link", "x", "a signature, such as image_conversion.s("),
        ("link_error", ["x"], "a signature"),
    ],
)
def test_an_option_that_can_not_be_used_is_refused_by_its_name_and_what_it_takes(producer, add, option, value, takes):
    with pytest.raises(InvalidArguments) as caught:
        add.apply_async((1, 1), **{option: value})

    assert str(caught.value).startswith(f"add: {option}={value!r:.80} must be ")
    assert takes in str(caught.value)
    assert producer.app.store.jobs() == []
    assert messages(producer, "add") == []


@pytest.mark.parametrize(
    "canvas_of",
    [
        lambda add: add.map([1, 2]),
        lambda add: add.starmap([(1, 2)]),
        lambda add: add.chunks([(1, 2), (3, 4)], 1),
        lambda add: chain(add.s(1, 2), add.starmap([(1, 2)])),
        lambda add: chord([add.s(1, 2)], add.starmap([(1, 2)])),
        lambda add: chain(add.s(1, 2), group(add.s(1), add.starmap([(1, 2)])), add.s(1)),
    ],
    ids=["map", "starmap", "chunks", "in a chain", "behind a chord", "in a group in a chain"],
)
def test_a_map_that_no_worker_serves_is_refused_with_what_to_send_instead(producer, add, canvas_of):
    with pytest.raises(InvalidArguments, match=r"no worker serves map, starmap and chunks; send a group"):
        canvas_of(add).apply_async()

    assert producer.app.store.jobs() == []


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("unique_keys", "unique_key"),
        ("count_down", "countdown"),
        ("expire", "expires"),
        ("timelimit", "time_limit"),
        ("qeue", "queue"),
        ("serialiser", "serializer"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(producer, add, option, meant):
    with pytest.raises(InvalidArguments, match=f"^add: no option is called {option}; did you mean {meant}\\?$"):
        add.apply_async((1, 1), **{option: "x"})

    assert producer.app.store.jobs() == []


def test_options_may_be_given_by_their_place_as_celery_takes_them(producer):
    job = producer.app.send_task("add", (1, 1), {}, 60, None, "mine", priority=7)

    row = producer.row("mine")
    assert (job.id, row["priority"], row["published_at"]) == ("mine", 7, None)
    assert now() + timedelta(seconds=50) < row["run_after_utc"] < now() + timedelta(seconds=61)


@pytest.mark.parametrize(
    ("positional", "options", "error", "words"),
    [
        (("x",), {}, InvalidArguments, "^add: countdown='x' must be a number of seconds"),
        ((10,), {"countdown": 20}, TypeError, "multiple values for argument 'countdown'"),
        ((None,) * 40, {}, TypeError, "too many positional arguments"),
    ],
    ids=["bad", "twice", "too many"],
)
def test_options_by_their_place_are_checked_as_those_by_name(producer, positional, options, error, words):
    with pytest.raises(error, match=words):
        producer.app.send_task("add", (1, 1), {}, *positional, **options)

    assert producer.app.store.jobs() == []
    assert messages(producer, "add") == []


def test_what_celery_and_a_message_take_is_no_misspelling(producer, add):
    stamped = add.s(1, 1)
    stamped.stamp(linked="a stamp", tasks_id=["another"])
    options = {
        "shadow": "sum",
        "argsrepr": "(…)",
        "ignore_result": True,
        "reply_to": "me",
        "message_id": "5",
        "nope": 1,
    }

    jobs = [add.apply_async((1, 1), **options), stamped.apply_async()]

    assert publications(producer, "add") == [(job.id, 1) for job in jobs]


@pytest.mark.parametrize("soft_s", [60, 61])
def test_a_soft_time_limit_that_is_not_below_the_hard_one_is_refused(producer, add, soft_s):
    with pytest.raises(InvalidArguments, match=rf"^add: soft_time_limit={soft_s} must be below time_limit=60$"):
        add.apply_async((1, 1), soft_time_limit=soft_s, time_limit=60)

    assert add.apply_async((1, 1), soft_time_limit=59, time_limit=60)


@pytest.mark.parametrize("args", ["ab", b"ab", {"x": 1, "y": 2}], ids=str)
def test_arguments_that_are_no_list_are_refused(producer, args):
    with pytest.raises(InvalidArguments, match=r"^add: args=.* must be a list or a tuple of arguments$"):
        producer.app.send_task("add", args)

    assert producer.app.store.jobs() == []


def test_a_failed_job_that_is_submitted_again_is_what_is_asked_for_now(producer, add):
    add.apply_async((1, 1), task_id="same")
    producer.app.store.end("same", Status.FAILED, describe(ValueError("no")))

    add.apply_async((3, 4), task_id="same", countdown=3600, priority=9, expires=7200)

    row = producer.row("same")
    assert (row["status"], row["priority"], row["parameters"]) == ("queued", 9, {"x": 3, "y": 4})
    assert now() + timedelta(seconds=3500) < row["run_after_utc"] < row["expires_at"]


def test_a_unique_job_that_could_not_be_sent_is_sent_by_the_second_try(producer, add, monkeypatch):
    def fail(*_, **__):
        raise OSError("the network is away")

    with monkeypatch.context() as patch:
        patch.setattr(producer.app, "publish", fail, raising=False)
        with pytest.raises(OSError, match="the network is away"):
            add.apply_async((1, 1), task_id="mine", unique_key="key")
    add.apply_async((1, 1), task_id="mine", unique_key="key")

    assert producer.row("mine")["status"] == "queued"
    assert [job_id for job_id, _ in publications(producer, "add")] == ["mine"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}], ids=repr)
def test_arguments_that_are_no_json_are_refused(producer, add, value):
    with pytest.raises(InvalidArguments, match=r"^add: an argument is no JSON"):
        add.delay(1, value)

    assert producer.app.store.jobs() == []


@pytest.mark.parametrize("options", [{"unique_key": "a\0b"}, {"unique_key": "\udcff"}, {"unique_for": 1e20}], ids=repr)
def test_a_key_that_no_row_can_hold_is_refused(producer, add, options):
    with pytest.raises(InvalidArguments, match="must be a"):
        add.apply_async((1, 1), **options)


def test_a_queue_that_is_no_text_is_refused_as_an_unknown_one(producer, add):
    with pytest.raises(UnknownQueue, match="no worker serves the queue 5"):
        add.apply_async((1, 1), queue=5)


@pytest.mark.parametrize("value", [9e4, 90_000, now() + timedelta(days=1), "2031-01-31T12:00:00Z", "2031-01-31T12:00"])
def test_what_celery_takes_for_an_expiry_is_taken(producer, add, value):
    job = add.apply_async((1, 1), expires=value)

    assert producer.row(job)["expires_at"] > now() + timedelta(hours=1)


def test_a_step_whose_options_can_not_be_used_fails_and_not_the_job_before_it(producer, add):
    last = chain(add.s(1, 1), add.s(1).set(countdown="x"))()
    message = producer.row(last.parent)["message"]["options"]

    assert run(add, last.parent.id, 1, 1, publication=1, chain=message["chain"]) == 2
    assert producer.row(last)["status"] == "failed"
    assert "add: countdown='x' must be a number of seconds" in producer.row(last)["error_message"]


def test_headers_of_the_caller_are_kept_in_the_row(producer, add):
    job = add.apply_async((1, 1), headers={"trace": "abc"})

    assert producer.row(job)["message"]["options"]["headers"] == {"trace": "abc"}
    (message,) = messages(producer, "add")
    assert (message.headers["trace"], message.headers["publication"]) == ("abc", 1)


# ENQUEUE=outbox


def test_with_the_outbox_the_row_is_enough_and_a_worker_sends_the_message(server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"ENQUEUE": "outbox"}) as deployment:
        job = deployment.task.add.apply_async((1, 2), priority=8)
        assert not list(server_dir.glob("broker.db"))
        assert (deployment.row(job)["status"], deployment.row(job)["published_at"]) == ("queued", None)

        dispatcher = Dispatcher(deployment.app)
        assert dispatcher.publish_due(10) == 1
        dispatcher.close()

        (message,) = messages(deployment, "add")
        assert (message.headers["id"], message.headers["publication"]) == (job.id, 1)
        assert message.properties["priority"] == 8
        assert run(deployment.task.add, job.id, 1, 2, publication=1) == 3


# ENQUEUE=broker


@pytest.fixture
def databaseless(server_dir, tmp_path):
    with deployed(server_dir, tmp_path, {"ENQUEUE": "broker"}) as deployment:
        yield deployment


def test_without_a_database_only_the_message_is_sent_and_its_row_appears_at_the_guard(databaseless):
    job = databaseless.task.add.apply_async((1, 2), priority=8)

    (message,) = messages(databaseless, "add")
    assert (message.headers["id"], message.properties["priority"]) == (job.id, 8)
    assert not list(databaseless.server_dir.glob("media_store.db*"))
    databaseless.app.leases.take()  # as a worker does
    assert run(databaseless.task.add, job.id, 1, 2) == 3
    assert databaseless.row(job)["status"] == "completed"


def test_without_a_database_options_by_their_place_are_checked_too(databaseless):
    with pytest.raises(InvalidArguments, match="add: countdown='x' must be a number of seconds"):
        databaseless.app.send_task("add", (1, 2), {}, "x")

    assert messages(databaseless, "add") == []


def test_without_a_database_options_are_checked_too(databaseless):
    with pytest.raises(InvalidArguments, match="add: countdown='x' must be a number of seconds"):
        databaseless.task.add.apply_async((1, 2), countdown="x")

    assert messages(databaseless, "add") == []


@pytest.mark.parametrize(
    "read",
    [
        lambda job: job.get(timeout=5),
        lambda job: job.state,
        lambda job: job.ready(),
        lambda job: group_of(job).join_native(timeout=5),
    ],
    ids=["get", "state", "ready", "group"],
)
def test_without_a_database_reading_a_result_raises_at_once(databaseless, read):
    job = databaseless.task.add.delay(1, 2)
    began = time.monotonic()

    with pytest.raises(Exception, match="ENQUEUE=broker") as caught:
        read(job)

    assert not isinstance(caught.value, ResultTimeout)
    assert time.monotonic() - began < 1
    assert not list(databaseless.server_dir.glob("media_store.db*"))


def group_of(job):
    from celery.result import ResultSet

    return ResultSet([job], app=job.app)


def test_without_a_database_arguments_are_checked_all_the_same(databaseless):
    with pytest.raises(InvalidArguments, match="width"):
        databaseless.task.image_resize.delay("/in.jpg", "/out.webp")
    with pytest.raises(InvalidArguments, match="ENQUEUE=strict or outbox"):
        databaseless.task.add.apply_async((1, 2), unique_key="k")

    assert messages(databaseless, "add") == messages(databaseless, "image_resize") == []


# Unique jobs


def test_a_second_job_of_a_key_is_the_first(producer, add):
    first = add.apply_async((1, 1), unique_key="upload-7")
    second = add.apply_async((2, 2), unique_key="upload-7")

    assert second.id == first.id
    assert len(producer.app.store.jobs()) == 1
    assert publications(producer, "add") == [(first.id, 1)]


def test_without_a_key_a_unique_job_is_known_by_its_task_and_arguments(producer, add):
    first = add.apply_async((1, 1), unique_for=60)

    assert add.apply_async((1, 1), unique_for=60).id == first.id
    assert add.apply_async((1, 2), unique_for=60).id != first.id
    by_name = add.apply_async(kwargs={"x": 1, "y": 2}, unique_for=60)
    assert add.apply_async(kwargs={"y": 2, "x": 1}, unique_for=60).id == by_name.id
    assert producer.row(first)["unique_key"].startswith("add:")


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_a_key_is_free_again_when_its_job_has_ended(producer, add, status):
    first = add.apply_async((1, 1), unique_key="k")
    if status is Status.COMPLETED:
        attempt = claim(producer.app.store, new_job(first.id)).attempt
        producer.app.store.complete(first.id, attempt, 2)
    else:
        producer.app.store.end(first.id, status, describe(ValueError("no")))

    assert add.apply_async((1, 1), unique_key="k").id != first.id


def test_a_key_is_held_while_its_job_runs(producer, add):
    first = add.apply_async((1, 1), unique_key="k")
    claim(producer.app.store, new_job(first.id))

    assert add.apply_async((1, 1), unique_key="k").id == first.id


def test_a_key_is_free_again_when_its_time_is_over(producer, add):
    first = add.apply_async((1, 1), unique_key="k", unique_for=60)
    assert add.apply_async((1, 1), unique_key="k").id == first.id

    change(producer.app, first, unique_until=now() - timedelta(seconds=1))

    assert add.apply_async((1, 1), unique_key="k").id != first.id


@pytest.mark.parametrize(
    "submit",
    [
        lambda step, unique: chain(unique, step)(),
        lambda step, unique: chain(step, unique)(),
        lambda step, unique: chain(step, step, unique)(),
        lambda step, unique: group(unique, step)(),
        lambda step, unique: chord([unique, step], step)(),
        lambda step, unique: chain(step, chord([unique, step], step))(),
        lambda step, unique: chain(step, chord([step, step], unique))(),
        lambda step, unique: chord([step, step], unique)(),
        lambda step, unique: chain(step, group(step, unique))(),
        lambda step, unique: step.apply_async(link=unique),
        lambda step, unique: step.apply_async(link_error=[unique]),
    ],
    ids=[
        "first",
        "second",
        "third",
        "group",
        "header",
        "nested header",
        "nested body",
        "body",
        "nested",
        "link",
        "link_error",
    ],
)
@pytest.mark.parametrize("option", [{"unique_key": "k"}, {"unique_for": 60}], ids=["key", "for"])
def test_a_step_of_a_canvas_can_not_be_unique_and_nothing_is_written(producer, add, submit, option):
    with pytest.raises(InvalidArguments, match="canvas"):
        submit(add.si(1, 1), add.si(2, 2).set(**option))

    assert producer.app.store.jobs() == []
    assert messages(producer, "add") == []


@pytest.mark.parametrize(
    "option",
    [
        {"unique_key": ""},
        {"unique_key": 7},
        {"unique_key": "k" * 256},
        {"unique_for": 0},
        {"unique_for": -1},
        {"unique_for": float("inf")},
        {"unique_for": float("nan")},
        {"unique_for": "60"},
        {"unique_key": "k", "unique_for": 0},
    ],
    ids=str,
)
def test_keys_and_times_that_can_not_be_used_are_refused(producer, add, option):
    with pytest.raises(InvalidArguments, match="add: unique_"):
        add.apply_async((1, 1), **option)

    assert producer.app.store.jobs() == []


# From within a worker


@pytest.fixture
def refusing(producer):
    """A broker that takes no message while the list holds anything."""
    send, refusals = producer.app.amqp.send_task_message, [True]

    def refuse(*args, **options):
        if refusals:
            raise OperationalError("refused")
        return send(*args, **options)

    producer.app.amqp.__dict__["send_task_message"] = refuse
    return refusals


def test_a_job_that_a_worker_submits_rests_when_the_broker_refuses_it(producer, task, refusing):
    refusing.clear()
    outer = task.call_another.delay(1)
    refusing.append(True)

    inner_id = run(task.call_another, outer.id, 1, publication=1)

    row = producer.row(inner_id)
    assert (row["status"], row["published_at"], row["publication"]) == ("queued", None, 2)
    assert producer.row(outer)["status"] == "completed"
    assert (row["parent_id"], row["root_id"]) == (outer.id, outer.id)


def test_a_job_that_was_sent_although_its_publish_failed_has_failed_too(producer, add):
    """Its caller is told of an error, and submits it again."""

    def send_and_fail(*_args, **_options):
        claim(producer.app.store, new_job("a"))
        raise OperationalError("the answer was lost")

    producer.app.amqp.__dict__["send_task_message"] = send_and_fail

    with pytest.raises(OperationalError, match="the answer was lost"):
        add.apply_async((1, 1), task_id="a")

    assert producer.row("a")["status"] == "failed"


def test_a_job_that_a_worker_submits_again_is_replayed_only_if_it_was_never_sent(producer, add, monkeypatch):
    for job_id, was_sent in (("sent", True), ("unsent", False)):
        unknown = partial(new_job, job_id)
        failure = describe(ValueError("no"))
        assert producer.app.store.end(job_id, Status.FAILED, failure, unknown=unknown, was_sent=was_sent)
    running = SimpleNamespace(request=Context(id="another", root_id="another"))
    monkeypatch.setattr(type(producer.app), "current_worker_task", running)

    for job_id in ("sent", "unsent"):
        add.apply_async((1, 1), task_id=job_id)

    assert [producer.row(job_id)["status"] for job_id in ("sent", "unsent")] == ["failed", "queued"]


def test_what_rests_since_the_broker_refused_it_is_logged(producer, task, refusing, caplog):
    refusing.clear()
    outer = task.call_another.delay(1)
    refusing.append(True)

    inner_id = run(task.call_another, outer.id, 1, publication=1)

    (record,) = [record for record in caplog.records if record.name == "tasks.enqueue"]
    assert record.levelname == "WARNING"
    assert f"add[{inner_id}] could not be published, and rests: OperationalError('refused')" in record.getMessage()


@pytest.fixture
def failing(producer):
    """What a publish fails with, while the list holds anything."""
    send, errors = producer.app.amqp.send_task_message, []

    def fail(*args, **options):
        if errors:
            raise errors[0]
        return send(*args, **options)

    producer.app.amqp.__dict__["send_task_message"] = fail
    return errors


def test_a_soft_time_limit_that_strikes_while_a_body_submits_a_job_ends_the_body(producer, task, failing):
    outer = task.call_another.delay(1)
    failing.append(SoftTimeLimitExceeded(1))

    assert run(task.call_another, outer.id, 1, publication=1) == "FAILURE"

    assert producer.row(outer)["error_type"] == "JobTimeout"
    (inner,) = producer.app.store.jobs(status="queued")
    assert (inner["task_type"], inner["published_at"], inner["publication"]) == ("add", None, 2)


@pytest.mark.parametrize("follows", ["chain", "callbacks"])
def test_a_soft_time_limit_that_strikes_while_the_next_step_is_sent_comes_after_the_work(
    producer, add, failing, follows
):
    job = add.delay(1, 1)
    step = add.s(1)
    step.freeze("next")
    failing.append(SoftTimeLimitExceeded(1))

    assert run(add, job.id, 1, 1, publication=1, **{follows: [dict(step)]}) == 2

    assert producer.row(job)["status"] == "completed"
    row = producer.row("next")
    assert (row["status"], row["published_at"], row["parameters"]) == ("queued", None, {"x": 2, "y": 1})


@pytest.mark.parametrize("name", ["add", "become_add"])
def test_a_job_that_queues_itself_again_is_sent_at_once_with_its_expiry(producer, task, add, monkeypatch, caplog, name):
    monkeypatch.setattr(add, "run", lambda x, y=0: add.retry(args=(x, 1), countdown=0))
    job = getattr(task, name).apply_async((1,), expires=600)
    (message,) = messages(producer, name)

    headers = {"expires": message.headers["expires"], "delivery_info": {"exchange": "", "routing_key": name}}
    run(getattr(task, name), job.id, 1, publication=1, **headers)

    (again,) = messages(producer, "add")
    assert again.headers["publication"] == 2
    assert again.headers["expires"] == message.headers["expires"] == producer.row(job)["expires_at"].isoformat()
    assert "could not be published" not in caplog.text


def test_a_soft_time_limit_that_strikes_while_a_body_retries_itself_does_not_end_the_retry(producer, task, failing):
    job = task.become_add.delay(40)
    failing.append(SoftTimeLimitExceeded(1))

    assert run(task.become_add, job.id, 40, publication=1) == "IGNORED"

    row = producer.row(job)
    assert (row["status"], row["task_type"], row["published_at"], row["publication"]) == ("queued", "add", None, 3)


@pytest.fixture
def dispatcher(producer):
    dispatcher = Dispatcher(producer.app)
    yield dispatcher
    dispatcher.close()


def test_a_job_that_no_broker_would_take_fails_and_not_the_job_that_submits_it(
    producer, task, failing, dispatcher, caplog
):
    outer = task.call_another.delay(1)
    failing.append(TypeError("a bug"))

    inner_id = run(task.call_another, outer.id, 1, publication=1)
    assert producer.row(outer)["status"] == "completed"
    assert f"add[{inner_id}] could not be published, and rests: TypeError('a bug')" in caplog.text
    dispatcher.publish_due(10)

    row = producer.row(inner_id)
    assert (row["status"], row["error_type"], row["error_message"]) == ("failed", "TypeError", "a bug")


@pytest.mark.parametrize("refusal", [NotAllowed("no such vhost"), NotFound("no such queue"), InternalError("a crash")])
def test_a_job_that_rabbitmq_refuses_from_within_a_worker_rests(server_dir, tmp_path, refusal):
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": "amqp://127.0.0.1:9//"}) as deployment:
        app, task = deployment.app, deployment.task
        app.store.enqueue(new_job("outer", task_type="call_another", queue="call_another"))

        def refuse(*args, **options):
            raise refusal

        app.amqp.__dict__["send_task_message"] = refuse

        inner_id = run(task.call_another, "outer", 1, publication=1)

        row = deployment.row(inner_id)
        assert (row["status"], row["published_at"], row["publication"]) == ("queued", None, 2)


def test_the_steps_behind_one_that_no_broker_would_take_fail_with_it(producer, add, failing, dispatcher):
    last = chain(add.s(1, 1), add.s(1), add.s(2))()
    message = producer.row(last.parent.parent)["message"]["options"]
    failing.append(TypeError("a bug"))

    assert run(add, last.parent.parent.id, 1, 1, publication=1, chain=message["chain"]) == 2
    dispatcher.publish_due(10)

    for step in (last.parent, last):
        row = producer.row(step)
        assert (row["status"], row["error_type"]) == ("failed", "TypeError")


def test_a_step_that_can_not_work_fails_and_not_the_job_that_submits_it(producer, add):
    last = chain(add.s(1, 1), producer.task.image_resize.s("/out.webp", width=9))()
    message = producer.row(last.parent)["message"]["options"]

    assert run(add, last.parent.id, 1, 1, publication=1, chain=message["chain"]) == 2
    assert producer.row(last)["status"] == "failed"
    assert producer.row(last)["error_type"] == "InvalidArguments"
