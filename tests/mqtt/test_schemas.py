"""The AsyncAPI document and the JSON Schemas: that they say what is true, and that they refuse what is not."""

import copy
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import paho.mqtt.publish
import pytest
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError
from paho.mqtt.client import MQTTv5

from db.records import Event
from tasks.settings import read_settings
from tasks.sinks import topics
from tests.chaos.subscriber import Subscriber
from tests.mqtt import messages
from tests.mqtt.changes import CHANGES
from tests.mqtt.messages import SCHEMAS, SINKS, validate
from tests.tooling.waiting import eventually

OF_WORKERS_ONLY = {Event.STOPPED, Event.REJECTED}
EVENTS = "any/events"
WORKER = "any/workers/worker-1"
CHECK = f"{WORKER}/check"
FAILURE = {"error_type": "CorruptMedia", "error_message": "in.jpg can't be decoded"}
AGAIN = {"retry_count": 1, "run_after_utc": "2026-03-01T12:00:00+00:00"}
DATA = {
    "completed": {"result": {"output": "/data/out.webp", "width": 800}},
    "failed": FAILURE,
    "retry": FAILURE | AGAIN,
    "lost": {"deaths": 1, "attempt": 2},
    "progress": {"progress": 40.0, "stage": "encode"},
}


@pytest.fixture(scope="module")
def document():
    return messages.document()


def event(change="started", **changed):
    """The payload of a change as the log names it, or of progress, with fields replaced; None takes nothing away."""
    payload = topics.event(
        topics.PROGRESS if change == "progress" else topics.TOLD[change],
        "8af269fb",
        DATA.get(change, {}),
        progress=100.0 if change == "completed" else 40.0,
        task_type="image_resize",
        root_id="8af269fb",
        worker_id="worker-1",
        sequence=4,
        at=datetime(2026, 3, 1, 12, tzinfo=UTC),
    )
    return json.loads(payload) | changed


def capability(**changed):
    payload = topics.capability("worker-1", ["image_resize"], 1, is_draining=False)
    return json.loads(payload) | changed


def without(payload, name):
    return {key: value for key, value in payload.items() if key != name}


# The document


def test_it_is_asyncapi_3_and_refers_to_what_is_there(document):
    assert document["asyncapi"] == "3.0.0"
    text = json.dumps(document)
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        if not reference.startswith("#/"):
            json.loads((SINKS / reference).read_text())
            continue
        part = document
        for name in reference[2:].split("/"):
            part = part[name]


def test_it_fits_the_schema_of_asyncapi(document):
    validator = Draft7Validator(json.loads((Path(__file__).parent / "asyncapi" / "3.0.0.json").read_text()))

    validator.validate(document)

    document = copy.deepcopy(document)
    document["operations"]["tellEvent"]["action"] = "publish"
    assert not validator.is_valid(document)


def test_it_refers_to_every_schema_and_every_schema_is_one(document):
    files = sorted(SCHEMAS.glob("*.json"))

    assert [path.name for path in files] == ["capability.json", "event.json"]
    for path in files:
        schema = json.loads(path.read_text())
        Draft202012Validator.check_schema(schema)
        assert f'{{"$ref": "schemas/{path.name}"}}' in json.dumps(document["components"]["messages"][path.stem])


def test_its_topics_and_ports_are_the_settings_defaults(document):
    settings = read_settings({"HOME": "/home/x"})
    secure = read_settings({"HOME": "/home/x", "MQTT_USE_TLS": "on"})
    worker = f"{settings.capability_topic_prefix}/{{worker_id}}"

    addresses = {name: channel["address"] for name, channel in document["channels"].items()}
    assert addresses == {"events": settings.mqtt_topic, "worker": worker, "check": f"{worker}/check"}
    assert document["servers"]["broker"]["host"] == f"{settings.mqtt_broker}:{settings.mqtt_port}"
    assert document["servers"]["secure"]["host"] == f"{secure.mqtt_broker}:{secure.mqtt_port}"


def test_its_examples_fit_their_schemas(document):
    topic_of = {"event": EVENTS, "progress": EVENTS, "capability": WORKER}
    channel_of = {"event": "events", "progress": "events", "capability": "worker"}
    examples = [
        (name, example["payload"])
        for name, message in document["components"]["messages"].items()
        for example in message.get("examples", [])
    ]

    assert len(examples) >= 4
    for name, payload in examples:
        bindings = messages.bindings_of(channel_of[name], name)
        validate(topic_of[name], json.dumps(payload), qos=bindings["qos"], is_retained=bindings["retain"])


def test_each_message_of_a_channel_is_one_that_is_described_and_sent_by_one_operation(document):
    described = set()
    for channel, description in document["channels"].items():
        for name, reference in description["messages"].items():
            assert reference == {"$ref": f"#/components/messages/{name}"}
            assert messages.bindings_of(channel, name).keys() >= {"qos", "retain"}
            described.add(name)

    assert described == document["components"]["messages"].keys()


# What is right


def test_every_change_that_is_written_is_told():
    told = {event: topics.TOLD.get(event) for event in Event if event not in OF_WORKERS_ONLY}

    assert told == CHANGES
    assert topics.PROGRESS == ("processing", "running"), "it is told without a row in the log"


@pytest.mark.parametrize("change", [*topics.TOLD, "progress"])
def test_every_change_of_a_job_fits(change):
    told = topics.TOLD.get(change, topics.PROGRESS)

    payload = validate(EVENTS, json.dumps(event(change)))

    assert (payload["event_type"], payload["status"]) == told


def test_what_may_be_missing_may_be_null():
    validate(EVENTS, json.dumps(event(worker_id=None)))
    validate(EVENTS, json.dumps(event("progress", data={"progress": 1, "stage": None})))
    validate(EVENTS, json.dumps(event("retry", data=FAILURE | AGAIN | {"run_after_utc": None})))
    validate(EVENTS, json.dumps(event("failed", data={"error_type": None, "error_message": ""})))
    validate(EVENTS, json.dumps(event("completed", data={"result": None, "is_truncated": True})))


def test_every_capability_fits():
    for is_draining in (False, True):
        assert validate(WORKER, topics.capability("worker-1", ["image_resize"], 0, is_draining=is_draining))
    assert validate("any/workers/a%2Fb", topics.capability("a/b", [], 0, is_draining=False))
    assert validate(WORKER, b"") is None


@pytest.mark.parametrize(
    ("topic", "payload", "qos", "is_retained"),
    [
        (EVENTS, json.dumps(event()), 1, False),
        (EVENTS, json.dumps(event("progress")), 0, False),
        (WORKER, json.dumps(capability()), 1, True),
        (WORKER, "", 1, True),
        (CHECK, "any text", 1, False),
    ],
    ids=["change", "progress", "capability", "gone", "probe"],
)
def test_each_message_is_sent_as_its_operation_says(topic, payload, qos, is_retained):
    validate(topic, payload, qos=qos, is_retained=is_retained)

    for wrong in ({"qos": 1 - qos}, {"qos": 2}, {"is_retained": not is_retained}):
        with pytest.raises(AssertionError, match=f"{topic} came with"):
            validate(topic, payload, **{"qos": qos, "is_retained": is_retained} | wrong)


def test_no_two_workers_share_a_topic():
    names = ["a/b", "a_b", "a%2Fb", "a+b", "a#b", "a%b", "a b", "é", "a\x00b", "a\udce9b", "worker-1@host.example"]

    found = [topics.capability_topic("any/workers", name).removeprefix("any/workers/") for name in names]

    assert len(set(found)) == len(names)
    assert not [topic for topic in found if set(topic) & set("#+/") or not topic.isprintable()]
    assert {"a_b", "a b", "é", "worker-1@host.example"} <= set(found)


# What is wrong


@pytest.mark.parametrize("name", list(event()))
def test_every_field_of_an_event_is_needed(name):
    with pytest.raises(ValidationError):
        validate(EVENTS, json.dumps(without(event(), name)))


@pytest.mark.parametrize("name", list(capability()))
def test_every_field_of_a_capability_is_needed(name):
    with pytest.raises(ValidationError):
        validate(WORKER, json.dumps(without(capability(), name)))


@pytest.mark.parametrize(
    "wrong",
    [
        event(extra=1),
        event(event_type="progress"),
        event(status="done"),
        event(status="queued"),
        event("completed", status="running"),
        event("completed", progress=40.0),
        event("completed", data={}),
        event("created", data={"result": 1}),
        event("failed", data={}),
        event("failed", data=FAILURE | {"traceback": "..."}),
        event("retry", data=FAILURE),
        event("retry", data=FAILURE | AGAIN | {"run_after_utc": 1}),
        event("lost", data={"deaths": 1}),
        event("progress", data={"progress": 140.0, "stage": None}),
        event("progress", data={"progress": 40.0}),
        event(progress=-1),
        event(progress=101),
        event(progress="40"),
        event(sequence=0),
        event(sequence=1.5),
        event(timestamp=1702123456.789),
        event(job_id=""),
        event(root_id=None),
        event(data=None),
    ],
    ids=json.dumps,
)
def test_a_wrong_event_is_refused(wrong):
    with pytest.raises(ValidationError):
        validate(EVENTS, json.dumps(wrong))


@pytest.mark.parametrize(
    "changed",
    [
        {"extra": 1},
        {"idle_count": -1},
        {"idle_count": None},
        {"capabilities": "image_resize"},
        {"capabilities": ["image_resize", "image_resize"]},
        {"capabilities": [1]},
        {"status": "idle"},
        {"status": "draining"},
        {"timestamp": "now"},
        {"worker_id": ""},
    ],
    ids=json.dumps,
)
def test_a_wrong_capability_is_refused(changed):
    with pytest.raises(ValidationError):
        validate(WORKER, json.dumps(capability(**changed)))


def test_a_capability_in_another_workers_topic_is_refused():
    with pytest.raises(AssertionError):
        validate("any/workers/worker-2", json.dumps(capability()))
    with pytest.raises(AssertionError):
        validate(WORKER, json.dumps(capability(id="worker-2")))


@pytest.mark.parametrize(
    "topic",
    ["any/thing", "events", "any/x/events", f"{EVENTS}/x", "any/workers", "any/workers/", f"{CHECK}/x", "a/b/c/check"],
)
def test_a_topic_that_the_document_does_not_know_is_refused(topic):
    for payload in (json.dumps(capability()), json.dumps(event()), ""):
        with pytest.raises(AssertionError, match="no channel"):
            validate(topic, payload)


def test_nothing_but_a_capability_is_said_in_a_workers_topic():
    for payload in ("gone", " ", "null", json.dumps(event())):
        with pytest.raises(ValidationError):
            validate(WORKER, payload)


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("workers/worker-1", capability(idle_count=-1)),
        ("workers/worker-2", capability()),
        ("events", event(sequence=0)),
    ],
    ids=["capability", "topic", "event"],
)
def test_what_the_subscriber_of_the_chaos_runs_hears_is_checked(private_mosquitto, topic, payload):
    port = private_mosquitto().port
    subscriber = Subscriber(port, "any/events")
    topics_and_payloads = [(f"any/{topic}", json.dumps(payload)), (EVENTS, json.dumps(event()))]
    paho.mqtt.publish.multiple(
        [(one, text, 1, False) for one, text in topics_and_payloads], hostname="127.0.0.1", port=port, protocol=MQTTv5
    )
    eventually(lambda: subscriber.heard, 10)

    with pytest.raises((ValidationError, AssertionError)):
        subscriber.close()
