"""A broker takes messages up to a limit: an event above it is told without what makes it long, and stops no other."""

import json
import time
from types import SimpleNamespace

import pytest

from tasks.sinks.events import shortened
from tasks.sinks.limit import FORGOTTEN_AFTER_S, LEAST_BYTES, Limit
from tests.mqtt.road import Road
from tests.mqtt.said import one_warning
from tests.mqtt.tools import event
from tests.tooling.waiting import eventually, stays

LONG = "x" * 20_000


def text(*args, **changed):
    return json.dumps(event(*args, **changed))


# How an event is made shorter


def test_a_result_is_left_out():
    whole = text("a", 4, "completed", {"result": LONG})

    short = shortened(whole, 1000)

    assert '"data": {"result": null, "is_truncated": true}' in short
    assert len(short) < 1000


def test_of_an_error_message_so_much_is_kept_as_there_is_room_for():
    failure = {"error_type": "ValueError", "error_message": "y" * 5000 + "é" * 20}

    short = shortened(text("a", 4, "failed", failure), 1000)

    assert 800 < len(short) <= 1000


def test_what_is_long_by_itself_is_not_told():
    assert shortened(text("a" * 2000, 1), 1000) is None
    assert shortened(text("a" * 2000, 4, "completed", {"result": LONG}), 1000) is None


# What is learned of a broker


@pytest.fixture
def limit(tools):
    return Limit(tools.settings)


def test_a_limit_that_is_announced_is_kept_and_forgotten_with_its_connection(limit, caplog):
    whole = text("a", 4, "completed", {"result": LONG})

    limit.announce(3000)
    assert len(limit.fitting(whole)) < 3000
    limit.announce(None)
    assert limit.fitting(whole) == whole

    (record,) = caplog.records
    assert "takes events of at most" in record.getMessage()


def test_a_guess_halves_the_longest_event_and_is_said_once(limit, caplog):
    long, short = text("a", 4, "completed", {"result": LONG}), text("b", 1)

    limit.guess([short, long], is_certain=True, longest_taken_bytes=0)

    assert limit.fitting(short) == short
    assert limit.fitting(text("c", 4, "completed", {"result": LONG[:9000]})).count("x") == 9000
    assert "x" not in limit.fitting(text("c", 4, "completed", {"result": LONG[:11_000]}))
    assert len(caplog.records) == 1


def test_events_that_are_short_are_too_long_for_no_broker(limit, caplog):
    events = [text("a", 1), text("a" * 20, 1)]

    for is_certain, longest_taken_bytes in [(True, 0), (True, LEAST_BYTES), (False, 0), (False, 100)]:
        limit.guess(events, is_certain=is_certain, longest_taken_bytes=longest_taken_bytes)

    assert [limit.fitting(event) for event in events] == events
    assert max(map(len, events)) < LEAST_BYTES
    whole = text("a", 4, "completed", {"result": LONG})
    assert limit.fitting(whole) == whole
    (record,) = caplog.records
    assert "its log may say why" in record.getMessage()


def test_of_short_events_the_longest_is_left_out_if_the_broker_says_so_and_has_taken_shorter_ones(limit):
    events = [text("a", 1), text("a" * 20, 1), text("b", 1)]

    limit.guess(events, is_certain=True, longest_taken_bytes=len(events[0]))

    assert [limit.fitting(event) for event in events] == [events[0], None, events[2]]


@pytest.mark.parametrize("is_certain", [True, False])
def test_a_guess_after_a_closing_without_a_word_is_forgotten(limit, monkeypatch, is_certain):
    whole = text("a", 4, "completed", {"result": LONG})
    limit.guess([whole], is_certain=is_certain, longest_taken_bytes=0)
    assert limit.fitting(whole) != whole

    later = time.monotonic() + FORGOTTEN_AFTER_S
    monkeypatch.setattr("tasks.sinks.limit.time", SimpleNamespace(monotonic=lambda: later))

    assert (limit.fitting(whole) == whole) is not is_certain


# With brokers


def check_stream(deployment, listener, worker, tmp_path):
    """Jobs with long results and long errors among others: all are told, the long ones without what makes them long."""
    first = deployment.task.add.delay(1, 2)
    long = [deployment.task.note.delay(str(tmp_path / "file"), LONG[:size]) for size in (20_000, 9_000, 5_000)]
    failed = deployment.task.fail.delay(message=LONG[:9_000])
    last = deployment.task.add.delay(3, 4)

    listener.wait_for_change(last, "completed", 40)
    assert listener.wait_for_change(first, "completed")["data"] == {"result": 3}
    for job in long:
        completed = listener.wait_for_change(job, "completed", 40)
        assert completed["data"] == {"result": None, "is_truncated": True}
    error = listener.wait_for_change(failed, "error", 40)
    assert error["data"]["error_type"] == "ValueError"
    assert error["data"]["error_message"].startswith("xx")
    for job in (first, *long, failed, last):
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    return one_warning(worker, quiet_s=1)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["max_packet_size 3000", "message_size_limit 3000"])
def test_a_long_event_stops_no_other(deploy, listen, private_mosquitto, tmp_path, worker_id, line):
    broker = private_mosquitto(line)
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=1", "-Q", "add,note,fail")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)

    warning = check_stream(deployment, listener, worker, tmp_path)

    assert "max_packet_size" in warning
    assert f"127.0.0.1:{broker.port}" in warning
    listener.wait_for_capability(worker_id, idle_count=1)


@pytest.mark.slow
def test_an_event_that_can_not_be_shortened_stops_no_other(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto("message_size_limit 600")
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=1", "-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)
    listener.wait_for_change(deployment.task.add.delay(1, 2), "completed")

    deployment.task.add.apply_async((1, 2), task_id="a" * 200)
    job = deployment.task.add.delay(3, 4)

    listener.wait_for_change(job, "completed", 60)
    assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    assert "message_size_limit" in one_warning(worker, quiet_s=1)
    heard = len(listener.events())
    stays(lambda: len(listener.events()) == heard, 6, lambda: f"nothing is told again: {listener.events()[heard:]}")


@pytest.mark.slow
def test_a_broker_that_closes_without_a_word_over_a_long_event(deploy, listen, private_mosquitto, tmp_path, worker_id):
    broker = private_mosquitto()
    with Road(broker.port, refuses=b"x" * 2000) as road:
        deployment = deploy(road.port)
        worker = deployment.start_worker("--concurrency=1", "-Q", "add,note,fail")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id)

        assert "too long" in check_stream(deployment, listener, worker, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("says", [b"", bytes([0xE0, 2, 0x96, 0])], ids=["nothing", "message rate too high"])
def test_short_events_are_all_told_however_often_the_connection_is_closed_over_them(
    deploy, listen, private_mosquitto, prefix, worker_id, says
):
    broker = private_mosquitto()
    with Road(broker.port, says=says) as road:
        deployment = deploy(road.port)
        worker = deployment.start_worker("--concurrency=2", "-Q", "add")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id)
        listener.wait_for_change(deployment.task.add.delay(1, 2), "completed")

        road.refuses = f"{prefix}/events".encode()
        jobs = [deployment.task.add.delay(number, 1) for number in range(5)]
        eventually(lambda: road.refusals >= 5, 20)
        assert [job.get(timeout=20) for job in jobs] == [1, 2, 3, 4, 5]
        road.refuses = None

        for job in jobs:
            listener.wait_for_change(job, "completed", 40)
            assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
        assert "again and again" in one_warning(worker, quiet_s=1)
