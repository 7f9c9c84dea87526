"""`mqtt watch` and `mqtt workers` say of whatever anybody may publish what it is, and go on."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tasks.cli import mqtt_watch, mqtt_workers
from tasks.cli.mqtt_connection import Message
from tests.mqtt.tools import Tools, event

ID = "8af269fb-e3fe-466a-b147-05f91584394b"
EVENT = event(ID, 3, "completed", {"result": {"output": "/data/out.webp", "width": 8, "height": 6}})
CAPABILITY = {"id": "edge-1", "worker_id": "edge-1", "capabilities": ["x"], "idle_count": 1, "timestamp": 1}
DETAILS = {"error_type": "X", "error_message": "no", "run_after_utc": "2026-03-01T12:00:00+00:00", "deaths": 1}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NUMBERS = st.sampled_from([-1, 10**18, 10**30, 10**400, 1e308, float("inf"), float("nan"), 253402300799_999])
FIELDS = sorted({*EVENT, *CAPABILITY, "status"})


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Anything; JSON; an event or a capability with a field or two of another kind."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=40))
    message = dict(draw(st.sampled_from([EVENT, CAPABILITY])))
    if draw(st.booleans()):
        inner = st.sampled_from([EVENT["data"], DETAILS, {"stage": "x"}])
        message["data"] = {**draw(inner), **{draw(st.sampled_from(["result", *DETAILS])): draw(VALUES)}}
    for field in draw(st.sets(st.sampled_from(FIELDS), max_size=2)):
        message[field] = draw(VALUES | NUMBERS)
    for field in draw(st.sets(st.sampled_from(FIELDS), max_size=1)):
        message.pop(field, None)
    return json.dumps(draw(VALUES) if draw(st.integers(0, 9)) == 0 else message).encode()


class Broker:
    """In the place of a connection: it has these payloads for whoever reads; then somebody presses Ctrl+C."""

    address = "here:1883"

    def __init__(self, found: list[bytes]) -> None:
        self._messages = [Message(f"mt/{number}", payload, is_retained=True) for number, payload in enumerate(found)]
        self._waiting: Iterator[Message] = iter(self._messages)

    def __call__(self, _settings: Any) -> "Broker":
        return self

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def subscribe(self, _pattern: str) -> None:
        pass

    def next(self, _timeout_s: float | None) -> Message:
        for message in self._waiting:
            return message
        raise KeyboardInterrupt

    def retained(self, _pattern: str) -> list[Message]:
        return self._messages


@pytest.fixture
def check(tools_for, monkeypatch):
    """`check(payloads, *args)`: both commands take them without an error; then one that is as it should be."""
    tools: Tools = tools_for(1)

    def run(found: list[bytes], *args: str) -> None:
        monkeypatch.setattr(mqtt_watch, "Connection", Broker([*found, json.dumps(EVENT | {"job_id": "last"}).encode()]))
        last = json.dumps(CAPABILITY | {"worker_id": "last"}).encode()
        monkeypatch.setattr(mqtt_workers, "Connection", Broker([*found, last]))
        for command in ("watch", "workers"):
            result = tools.mqtt(command, *args)
            assert (result.exit_code, result.exception) == (0, None), result.output
            assert "last" in result.stdout
            assert all(line.isprintable() for line in result.output.splitlines())

    return run


@given(found=st.lists(payloads(), max_size=8), args=st.sampled_from([(), ("--json",)]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([b'{"timestamp": 1}'], ())
@example([json.dumps(EVENT | {"task_type": ["x"]}).encode(), json.dumps(EVENT | {"worker_id": {"a": 1}}).encode()], ())
@example([json.dumps(EVENT | {"progress": 10**400}).encode(), json.dumps(EVENT | {"sequence": 10**400}).encode()], ())
@example([json.dumps(EVENT | {"sequence": number}).encode() for number in (1, 10**30)], ())
@example([json.dumps(CAPABILITY | {"idle_count": 10**400}).encode()], ())
def test_nothing_that_is_published_ends_them(check, found, args):
    check(found, *args)


def test_nothing_ends_them_however_deep_it_is_nested(check):
    """Also not what is just short of too deep to be read: to show it must not take more of Python's stack."""
    nested = [
        start + b"[" * depth + b"]" * depth * (start != b"") + end
        for depth in [*range(800, 1000), 100_000]
        for start, end in [
            (b"", b""),
            (json.dumps(EVENT).encode()[:-1] + b', "data": {"result": ', b"}}"),
            (json.dumps(EVENT).encode()[:-1] + b', "data": {"stage": ', b"}}"),
            (json.dumps(CAPABILITY).encode()[:-1] + b', "status": ', b"}"),
        ]
    ]

    check(nested)
    check(nested, "--json")
