"""`mqtt replay`: what somebody missed, from the job table, in the payloads that the relay told."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from db.models import task_logs
from db.records import Failure, Fence, Status
from tasks.cli.mqtt_connection import Connection
from tests.mqtt.judge import Judge
from tests.mqtt.messages import validate
from tests.tooling.waiting import eventually

ID = "8af269fb-e3fe-466a-b147-05f91584394b"
OTHER = "91aaa2bd-2bc0-4c6f-9414-66a341ac416d"
FAILURE = Failure(error_type="CorruptMedia", error_message="in.jpg: it can't be decoded", error_module="tasks.errors")


@pytest.fixture
def past(tools):
    """Two jobs: one was retried, lost, and completed; the other one failed."""
    store = tools.store
    tools.claim(job := tools.job(ID))
    due = datetime.now(UTC)
    store.requeue(ID, attempt=1, event="retry", retry_count=1, run_after_utc=due, failure=FAILURE)
    store.take_due(1)
    _claim_again(tools, job, 2)
    store.close(ID, 2, reason="its worker died")
    tools.claim(other := tools.job(OTHER))
    store.end(other.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=1))
    _claim_again(tools, job, 3)
    store.complete(ID, 4, {"output": "/data/out.webp", "width": 800})
    return tools


def _claim_again(tools, job, publication):
    from db.records import Decision, Liveness

    claim = tools.store.claim(
        job.job_id, unknown=lambda: job, publication=publication, worker_id="edge-1", lease="lease of edge-1",
        judge=lambda _holder: Liveness.ALIVE, max_deaths=3,
    )  # fmt: skip
    assert claim.decision is Decision.RUN


def payloads(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_jobs_events_come_in_order_in_the_payloads_of_the_contract(past):
    result = past.mqtt("replay", "--job", ID[:8], "--json")

    events = payloads(result)
    for line in result.stdout.splitlines():
        validate(past.settings.mqtt_topic, line)
    assert [event["event_type"] for event in events] == [
        "queued", "processing", "processing", "retry", "processing", "processing", "lost", "processing", "processing",
        "completed",
    ]  # fmt: skip
    assert [event["sequence"] for event in events] == list(range(1, 11))
    assert {event["job_id"] for event in events} == {ID}
    why = {"error_type": "CorruptMedia", "error_message": "in.jpg: it can't be decoded"}
    assert events[3]["data"].items() >= (why | {"retry_count": 1}).items()
    assert events[6]["data"] == {"deaths": 1, "attempt": 2}
    assert events[9]["data"] == {"result": {"output": "/data/out.webp", "width": 800}}
    assert (events[9]["progress"], events[9]["status"], events[9]["worker_id"]) == (100.0, "completed", "edge-1")
    assert payloads(past.mqtt("replay", "--job", OTHER, "--json"))[-1]["data"] == why


def test_people_get_the_lines_that_watch_prints(past):
    lines = past.mqtt("replay", "--job", OTHER).stdout.splitlines()

    assert len(lines) == 4
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3}  error       91aaa2bd  image_resize .* failed .*  edge-1 +"
        r"CorruptMedia: in.jpg: it can't be decoded",
        lines[-1],
    )


def test_since_takes_all_jobs_from_a_time_on(past):
    from sqlalchemy import update

    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    with past.store.database.transaction() as connection:
        old = update(task_logs).where(task_logs.c.id <= 4).values(created_at=hour_ago)
        connection.execute(old)

    def since(text):
        return [
            (event["job_id"], event["sequence"]) for event in payloads(past.mqtt("replay", "--since", text, "--json"))
        ]

    everything = since("2h")
    assert len(everything) == 14
    assert since("10m") == since("600s") == everything[4:]
    assert since((hour_ago + timedelta(seconds=1)).isoformat()) == everything[4:]
    assert since(hour_ago.astimezone().replace(tzinfo=None).isoformat()) == everything
    assert since((datetime.now(UTC) + timedelta(hours=1)).isoformat()) == []


def test_since_finds_its_place_in_a_long_log(tools):
    from sqlalchemy import insert

    tools.job(ID)
    start = datetime.now(UTC) - timedelta(seconds=20_000)
    rows = [
        {"job_id": ID, "sequence": number, "event_type": "republished", "created_at": start + timedelta(seconds=number)}
        for number in range(2, 20_000)
    ]
    with tools.store.database.transaction() as connection:
        connection.execute(insert(task_logs), rows)

    numbers = [event["sequence"] for event in payloads(tools.mqtt("replay", "--since", "1000s", "--json"))]

    assert numbers == list(range(numbers[0], 20_000))
    assert 980 <= len(numbers) <= 1000


def test_publish_tells_them_again(past):
    watching = past.start("watch", "--json", "--count", "4", "--timeout", "20")
    watching.line("err")

    result = past.mqtt("replay", "--job", OTHER, "--json", "--publish")

    assert watching.wait() == 0
    assert watching.rest() == result.stdout.splitlines()
    assert f"4 events published to {past.settings.mqtt_topic} on 127.0.0.1:" in result.stderr


def test_what_is_asked_wrongly_is_said(tools):
    for args in ([], ["--job", ID, "--since", "1h"], ["--since", "soon"], ["--since", "99999999d"]):
        assert tools.mqtt("replay", *args).exit_code == 2
    assert "no job's id starts with 'nope'" in tools.error("replay", "--job", "nope")


def test_it_says_what_the_relay_said(deployment, listener, worker_id, tools_for, mosquitto):
    deployment.start_worker("--concurrency=2")
    listener.wait_for_capability(worker_id)
    job = deployment.task.add.delay(40, 2)
    listener.wait_for_change(job, "completed")

    tools = tools_for(mosquitto.port, mosquitto.topic_prefix)

    assert payloads(tools.mqtt("replay", "--job", job.id, "--json")) == listener.changes(job)


# What is too long for a broker


@pytest.fixture
def long_past(tools_for):
    """`long_past(port)`: between two jobs one with a long result and one with a long error."""

    def make(port):
        tools = tools_for(port)
        long = Failure(error_type="ValueError", error_message="y" * 5000, error_module="builtins")
        for job_id in ("first", "result", "error", "last"):
            tools.claim(tools.job(job_id))
            if job_id == "error":
                tools.store.end(job_id, Status.FAILED, long, fence=Fence(attempt=1))
            else:
                tools.store.complete(job_id, 1, {"x": "x" * (5000 if job_id == "result" else 1)})
        return tools

    return make


def heard(listener, job_id):
    eventually(lambda: len(listener.changes(job_id)) == 4, 10, lambda: listener.events(job_id))
    return listener.changes(job_id)[-1]["data"]


def check_told_again(tools, listener):
    """All changes are told, those that are too long without what makes them long; the command's words."""
    result = tools.mqtt("replay", "--since", "1h", "--json", "--publish")

    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 16
    assert heard(listener, "first") == heard(listener, "last") == {"result": {"x": "x"}}
    assert heard(listener, "result") == {"result": None, "is_truncated": True}
    error = heard(listener, "error")
    assert error["error_type"] == "ValueError"
    assert error["error_message"].startswith("yyy")
    assert "without its result or the end of its message: change 4 of result, 5," in result.stderr
    assert f"16 events published to {tools.settings.mqtt_topic} on 127.0.0.1:" in result.stderr
    return result.stderr


def test_what_is_above_the_announced_limit_is_published_without_what_makes_it_long(
    long_past, private_mosquitto, listen
):
    broker = private_mosquitto("max_packet_size 3000")
    tools, listener = long_past(broker.port), listen(broker.port, prefix="mt")

    assert "raise the broker's limit, 2,981 bytes for an event (Mosquitto" in check_told_again(tools, listener)


def test_a_broker_that_closes_over_what_is_too_long_is_told_the_rest(long_past, private_mosquitto, listen):
    broker = private_mosquitto("message_size_limit 3000")
    tools, listener = long_past(broker.port), listen(broker.port, prefix="mt")

    assert "raise the broker's limit (Mosquitto" in check_told_again(tools, listener)


def test_an_event_that_can_not_be_shortened_stops_no_other(tools_for, private_mosquitto, listen):
    broker = private_mosquitto("message_size_limit 600")
    tools, listener = tools_for(broker.port), listen(broker.port, prefix="mt")
    for job_id in ("first", "a" * 250, "last"):
        tools.job(job_id)

    result = tools.mqtt("replay", "--since", "1h", "--json", "--publish")

    assert result.exit_code == 1
    listener.wait_for_change("last", "queued")
    assert len(listener.events()) == 2
    assert "too long, and so not published: change 1 of aaaaaaaa, 69" in result.stderr
    assert "2 events published to mt/events" in result.stderr


@pytest.mark.parametrize("refused", ["first", "middle"])
def test_an_event_that_the_broker_refuses_stops_no_other(tools_for, private_mosquitto, listen, refused):
    broker = private_mosquitto()
    with Judge(broker.port, lambda packet: refused.encode() in packet, 0x99) as judge:
        tools, listener = tools_for(judge.port), listen(broker.port, prefix="mt")
        jobs = ["first", "middle", "last"]
        for job_id in jobs:
            tools.job(job_id)

        result = tools.mqtt("replay", "--since", "1h", "--json", "--publish")

        assert result.exit_code == 1
        listener.wait_for_change("last", "queued")
        assert [event["job_id"] for event in listener.events()] == [job for job in jobs if job != refused]
        assert f"not published: change 1 of {refused}" in result.stderr
        assert "Payload format invalid" in result.stderr
        assert "2 events published to mt/events" in result.stderr


def test_a_broker_that_goes_meanwhile_is_said_with_the_event_and_how_to_go_on(
    long_past, private_mosquitto, monkeypatch
):
    broker = private_mosquitto()
    tools = long_past(broker.port)
    publish = Connection.publish

    def publish_until_it_goes(connection, topic, payload):
        if '"failed"' in payload:
            broker.kill9()
        publish(connection, topic, payload)

    monkeypatch.setattr(Connection, "publish", publish_until_it_goes)

    error = tools.error("replay", "--since", "1h", "--json", "--publish")

    assert "11 events published; then it was lost over change 4 of error, 5," in error
    assert "run this again" in error
    assert "MQTT_BROKER" in error
