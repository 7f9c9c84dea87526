"""Jobs that rest in their rows are sent when they are due."""

import select
from datetime import datetime, timedelta

import pytest
from celery import chain
from kombu.exceptions import OperationalError

from db.records import now
from tasks.broker.ledger import ledger_of
from tasks.outgoing import Dispatcher
from tests.acceptance.deployment import deployed
from tests.tooling.waiting import eventually
from tests.unit.jobs import change, claim, messages, new_job, publications


def test_a_job_is_sent_when_it_is_due_and_not_before(producer, app, dispatcher, add):
    job = add.apply_async((1, 1), countdown=60, priority=7)
    assert (dispatcher.publish_due(10), messages(producer, "add")) == (0, [])

    change(app, job, run_after_utc=now())

    assert dispatcher.publish_due(10) == 1
    (message,) = messages(producer, "add")
    assert (message.headers["id"], message.headers["publication"]) == (job.id, 1)
    assert message.properties["priority"] == 7
    assert message.headers["eta"] is None
    assert producer.row(job)["published_at"] is not None
    assert dispatcher.publish_due(10) == 0


def test_higher_priorities_are_sent_first_and_no_more_than_asked_for(producer, app, dispatcher, add):
    jobs = {priority: add.apply_async((1, 1), countdown=60, priority=priority) for priority in (1, 10, 5)}
    for job in jobs.values():
        change(app, job, run_after_utc=now())

    assert dispatcher.publish_due(2) == 2
    assert [job_id for job_id, _ in publications(producer, "add")] == [jobs[10].id, jobs[5].id]
    assert dispatcher.publish_due(2) == 1


def test_jobs_of_a_paused_queue_go_on_resting(producer, app, dispatcher, add):
    job = add.apply_async((1, 1), countdown=60)
    change(app, job, run_after_utc=now())
    app.store.pause("add")

    assert (dispatcher.publish_due(10), messages(producer, "add")) == (0, [])
    app.store.resume("add")
    assert dispatcher.publish_due(10) == 1


def test_a_job_that_the_broker_refuses_rests_again_and_is_sent_later(producer, app, dispatcher, add):
    job = add.apply_async((1, 1), countdown=60)
    change(app, job, run_after_utc=now())
    send = app.amqp.send_task_message

    def refuse(*args, **options):
        raise OperationalError("refused")

    app.amqp.__dict__["send_task_message"] = refuse
    dispatcher.publish_due(10)
    assert (producer.row(job)["status"], producer.row(job)["published_at"]) == ("queued", None)

    app.amqp.__dict__["send_task_message"] = send
    change(app, job, run_after_utc=now())
    assert dispatcher.publish_due(10) == 1
    assert publications(producer, "add") == [(job.id, producer.row(job)["publication"])]


def test_a_broker_that_is_away_is_asked_once_a_round_and_not_for_each_job(server_dir, tmp_path, monkeypatch):
    """The upkeep's thread renews the lease too: it must not spend two seconds on each of 500 jobs."""
    asked = []

    class Connection:
        connection_errors = (ConnectionError,)

        def ensure_connection(self, **_):
            asked.append(self)
            raise OperationalError("refused")

        def release(self):
            pass

    with deployed(server_dir, tmp_path, {"ENQUEUE": "outbox"}) as deployment:
        jobs = [deployment.task.add.delay(n, n) for n in range(5)]
        monkeypatch.setattr(deployment.app, "connection_for_write", Connection)
        Dispatcher(deployment.app).publish_due(500)

        assert len(asked) == 1
        assert [deployment.row(job)["published_at"] for job in jobs] == [None] * 5


def test_a_job_that_the_broker_refused_is_not_due_again_at_once(producer, app, dispatcher, add, monkeypatch):
    job = add.apply_async((1, 1), countdown=60)
    change(app, job, run_after_utc=now())

    def refuse(*_args, **_options):
        raise OperationalError("refused")

    monkeypatch.setattr(app, "publish", refuse)

    dispatcher.publish_due(10)

    assert app.store.next_due_s() > 0.5


@pytest.fixture
def publish(app, monkeypatch):
    """A function: have the publish of a job raise an error, so many times."""
    publish, errors = app.publish, {}

    def published(*args, options, **more):
        if left := errors.get(options["task_id"]):
            raise left.pop()
        publish(*args, options=options, **more)

    monkeypatch.setattr(app, "publish", published)
    return lambda job, error, times: errors.update({job.id: [error] * times})


def due(app, add, *priorities):
    jobs = [add.apply_async((n, n), countdown=60, priority=priority) for n, priority in enumerate(priorities)]
    for job in jobs:
        change(app, job, run_after_utc=now())
    return jobs


def test_a_job_whose_message_no_broker_would_take_fails_and_keeps_no_other_from_being_sent(
    producer, app, dispatcher, add, publish
):
    first, bad, last = due(app, add, 9, 5, 1)
    publish(bad, TypeError("it can't be encoded"), 2)

    assert dispatcher.publish_due(10) == 3

    row = producer.row(bad)
    assert (row["status"], row["error_type"], row["error_message"]) == ("failed", "TypeError", "it can't be encoded")
    assert producer.events(bad) == ["created", "failed"]
    assert publications(producer, "add") == [(first.id, 1), (last.id, 1)]
    assert dispatcher.publish_due(10) == 0
    assert not dispatcher.is_broker_away


def test_what_waits_for_a_job_that_can_t_be_sent_hears_of_it(producer, app, dispatcher, add, publish):
    last = chain(add.s(1, 1).set(countdown=60), add.s(2))()
    change(app, last.parent, run_after_utc=now())
    publish(last.parent, ValueError("it is too large"), 2)

    dispatcher.publish_due(10)

    assert producer.row(last)["status"] == "failed"


def test_an_error_of_a_connection_that_breaks_is_not_the_next_job_s(producer, app, dispatcher, add, publish):
    jobs = due(app, add, 9, 5)
    publish(jobs[1], AttributeError("'NoneType' object has no attribute 'send'"), 1)

    dispatcher.publish_due(10)

    assert publications(producer, "add") == [(job.id, 1) for job in jobs]


@pytest.fixture
def on_rabbitmq(server_dir, tmp_path, fresh_rabbitmq_url):
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": fresh_rabbitmq_url}) as deployment:
        dispatcher = Dispatcher(deployment.app)
        yield deployment, dispatcher
        dispatcher.close()


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"headers": {"number": 2**70}}, "error", "int too large to convert"),
        (
            {"exchange": "nowhere"},
            "InvalidArguments",
            "the broker has no exchange 'nowhere'; declare it, or leave it out",
        ),
    ],
    ids=["header", "exchange"],
)
def test_what_rabbitmq_can_not_take_fails(on_rabbitmq, options, error_type, message):
    deployment, dispatcher = on_rabbitmq
    bad = deployment.task.add.apply_async((1, 1), countdown=60, priority=9, **options)
    good = deployment.task.add.apply_async((2, 2), countdown=60)
    for job in (bad, good):
        change(deployment.app, job, run_after_utc=now())

    dispatcher.publish_due(10)

    row = deployment.row(bad)
    assert (row["status"], row["error_type"], row["error_message"]) == ("failed", error_type, message)
    assert deployment.row(good)["published_at"] is not None
    eventually(lambda: ledger_of(deployment.app).ready(["add"]) == {"add": 1}, 5)


def test_what_rabbitmq_refused_before_is_not_the_next_job_s(on_rabbitmq):
    """It says so when the next message comes."""
    deployment, dispatcher = on_rabbitmq
    bad = deployment.task.add.apply_async((1, 1), countdown=60, priority=9, delivery_mode=7)
    good = deployment.task.add.apply_async((2, 2), countdown=60)
    change(deployment.app, bad, run_after_utc=now())
    dispatcher.publish_due(10)
    socket = dispatcher._outlet._connection.connection.transport.sock
    eventually(lambda: select.select([socket], [], [], 0)[0], 5)
    change(deployment.app, good, run_after_utc=now())

    dispatcher.publish_due(10)

    assert (deployment.row(good)["status"], deployment.row(good)["published_at"] is None) == ("queued", False)
    eventually(lambda: ledger_of(deployment.app).ready(["add"]) == {"add": 1}, 5)


def test_a_job_of_a_queue_that_rabbitmq_has_with_other_properties_rests(on_rabbitmq):
    """An operator can mend it."""
    deployment, dispatcher = on_rabbitmq
    job = deployment.task.add.apply_async((1, 1), countdown=60)
    change(deployment.app, job, run_after_utc=now())
    with deployment.app.connection_for_write() as connection:
        connection.default_channel.queue_declare("add", durable=True, auto_delete=False)

    dispatcher.publish_due(10)

    assert (deployment.row(job)["status"], deployment.row(job)["published_at"]) == ("queued", None)
    assert not dispatcher.is_broker_away


def test_headers_of_the_caller_are_sent_again(producer, app, dispatcher, add):
    job = add.apply_async((1, 1), headers={"trace": "abc", "publication": 99})
    change(app, job, published_at=None, publication=2, run_after_utc=now())
    messages(producer, "add")

    dispatcher.publish_due(10)

    (message,) = messages(producer, "add")
    assert (message.headers["trace"], message.headers["publication"]) == ("abc", 2)


def test_a_message_that_is_sent_again_says_how_often_it_was_tried_and_when_it_expires(producer, app, dispatcher, add):
    expires_at = now() + timedelta(hours=1)
    job = add.apply_async((1, 1), expires=expires_at)
    messages(producer, "add")
    change(app, job, published_at=None, publication=2, retry_count=1, run_after_utc=now())

    dispatcher.publish_due(10)

    (message,) = messages(producer, "add")
    assert message.headers["retries"] == 1
    assert datetime.fromisoformat(message.headers["expires"]) == expires_at


def test_a_job_that_has_begun_before_goes_ahead_of_those_of_its_priority(producer, app, dispatcher, add):
    waiting, begun, urgent = (add.apply_async((1, 1), priority=priority) for priority in (5, 5, 7))
    claim(app.store, new_job(begun.id))
    app.store.close(begun.id, 1, reason="its process died")

    assert dispatcher.publish_due(10) == 1

    sent = publications(producer, "add")
    assert [job_id for job_id, publication in sent if (job_id, publication) != (begun.id, 1)] == [
        urgent.id,
        begun.id,
        waiting.id,
    ]


def test_a_round_says_when_to_look_again_and_asks_once_where_nothing_is_due(app, dispatcher, add, monkeypatch):
    asked, next_due_s = [], app.store.next_due_s
    monkeypatch.setattr(app.store, "next_due_s", lambda: asked.append(1) or next_due_s())
    monkeypatch.setattr(app.store, "take_due", lambda _limit: pytest.fail("nothing is due"))

    assert dispatcher.round() == 1.0
    soon = add.apply_async((1, 1), countdown=60)
    assert dispatcher.round() == 1.0
    change(app, soon, run_after_utc=now() + timedelta(seconds=0.5))
    assert 0 < dispatcher.round() <= 0.5

    assert len(asked) == 3


def test_after_a_round_that_took_all_it_may_the_next_comes_at_once(app, dispatcher, add):
    for job in [add.apply_async((n, n), countdown=60) for n in range(3)]:
        change(app, job, run_after_utc=now())

    assert dispatcher.round(limit=2) == 0.0
    assert dispatcher.round(limit=2) == 1.0
