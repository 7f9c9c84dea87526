"""The sink by itself: what it takes from paho's thread. The broker is in the test's hands."""

import itertools
from types import SimpleNamespace

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from tasks.settings import read_settings
from tasks.sinks.mqtt import WINDOW, MqttSink
from tests.tooling.waiting import eventually

EVENT = '{"number": 1}'


class Client:
    """Numbers what is published, and has the numbers of what the broker has not answered."""

    def __init__(self):
        self._numbers = itertools.count(1)
        self.unanswered = []
        self.on_publish = None

    def publish(self, *_args, **_options):
        number = next(self._numbers)
        self.unanswered.append(number)
        if self.on_publish is not None:
            self.on_publish(number)
        return SimpleNamespace(mid=number)


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def sink(client):
    sink = MqttSink(read_settings({"HOME": "/home/x"}), "w")
    sink._client, sink._is_open = client, True
    return sink


@pytest.fixture
def answer(sink, client):
    """A function: the broker answers all that is unanswered, or these numbers."""

    def answer(*numbers, code="Success"):
        for number in numbers or client.unanswered:
            sink._on_publish(None, None, number, ReasonCode(PacketTypes.PUBACK, code), None)
        client.unanswered = []

    return answer


def test_confirmations_that_nobody_waits_for_are_not_kept(sink, answer):
    """A relay's worker that waits for its Celery broker at start shows no capability, and counts none."""
    for _ in range(5):
        sink.tell([EVENT] * WINDOW)
        answer()
        assert sink.unconfirmed == 0

    assert len(sink._showing._confirmed) == 0


def test_what_is_confirmed_before_its_number_is_known_counts(sink, client, answer):
    client.on_publish = answer

    sink.tell([EVENT])
    sink.show(["add"], 1, is_draining=False)

    assert (sink.unconfirmed, sink._showing.count()) == (0, 0)


def test_an_event_that_is_refused_closes_the_sink_until_it_is_tried_again(sink, answer, monkeypatch, caplog):
    monkeypatch.setattr("tasks.sinks.mqtt.WAIT_WHEN_REFUSED_S", 0.3)
    sink.tell([EVENT] * 3)
    answer(1)
    answer(2, code="Not authorized")
    answer(3)

    assert (sink.is_open, sink.unconfirmed) == (False, 1)
    assert sink.take_back()
    assert not sink.take_back()
    assert (sink.is_open, sink.unconfirmed) == (False, 0)
    assert len(caplog.records) == 1
    eventually(lambda: sink.is_open, 5)


def test_a_refused_capability_keeps_no_event_back(sink, answer):
    sink.show(["add"], 1, is_draining=False)
    answer(1, code="Not authorized")

    assert sink.is_open
    assert not sink.take_back()
    assert sink._showing.count() == 0


def test_what_was_taken_back_is_not_told_again_when_the_connection_comes_back(sink, client, answer):
    sink.tell([EVENT] * 2)
    answer(1, code="Not authorized")
    sink.take_back()
    sink.tell([EVENT])
    topic = sink._settings.mqtt_topic
    left = [SimpleNamespace(mid=number, topic=topic, payload=EVENT.encode()) for number in (2, 3)]

    sink._tell_again(client, left)

    assert client.unanswered == [3, 4]
    answer(4)
    assert sink.unconfirmed == 0


def test_each_kind_of_reason_is_said_once_in_an_outage(sink, caplog):
    """paho says of a connection that is refused, too, that it is lost."""
    unspecified = ReasonCode(PacketTypes.DISCONNECT, "Unspecified error")
    paho = SimpleNamespace(reconnect_delay_set=lambda *_: None, drop_out_messages=lambda: [])

    def answer(code):
        sink._on_connect(paho, None, None, ReasonCode(PacketTypes.CONNACK, code), None)

    def fail(exc):
        try:
            raise exc
        except OSError:
            sink._on_connect_fail(paho, None)

    def kinds():
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        caplog.clear()
        return [next(word for word in ("reached", "refuses", "answer") if word in line) for line in said]

    def outage():
        for _ in range(2):
            fail(ConnectionRefusedError(111, "Connection refused"))
            fail(OSError(113, "No route to host"))
            answer("Not authorized")
            sink._on_disconnect(paho, None, None, unspecified, None)
            sink._on_disconnect(paho, None, None, unspecified, None)
            fail(TimeoutError())

    sink._is_open = False
    outage()
    assert kinds() == ["reached", "refuses", "answer"]

    answer("Success")
    sink._on_disconnect(paho, None, None, unspecified, None)
    assert kinds() == []
    outage()
    assert kinds() == ["reached", "refuses", "answer"]
