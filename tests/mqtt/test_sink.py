"""The sink by itself: what it takes from paho's thread. The broker is in the test's hands."""

import itertools
from types import SimpleNamespace

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from tasks.settings import read_settings
from tasks.sinks.events import Place
from tasks.sinks.mqtt import WINDOW, MqttSink
from tests.tooling.waiting import eventually
from tests.unit.jobs import Clock

EVENT = '{"number": 1}'


def events(count, first=1):
    return {Place(number, "a", number): EVENT for number in range(first, first + count)}


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
        sink.tell(events(WINDOW))
        answer()
        assert sink.unconfirmed == 0

    assert len(sink._showing._answers) == 0


def test_what_is_confirmed_before_its_number_is_known_counts(sink, client, answer):
    client.on_publish = answer

    sink.tell(events(1))
    sink.show(["add"], 1, is_draining=False)

    assert (sink.unconfirmed, sink._showing.count()) == (0, 0)


def test_an_event_that_is_refused_closes_the_sink_until_it_is_tried_again(sink, answer, monkeypatch, caplog):
    monkeypatch.setattr("tasks.sinks.refusals.WAIT_WHERE_SOME_ARE_TAKEN_S", 0.3)
    sink.tell(events(3))
    answer(1)
    answer(2, code="Not authorized")
    answer(3)

    assert (sink.is_open, sink.unconfirmed) == (False, 1)
    assert sink.refused_from == Place(2, "a", 2)
    sink.take_back()
    assert (sink.is_open, sink.unconfirmed, sink.refused_from) == (False, 0, None)
    assert len(caplog.records) == 1
    assert "write MQTT_TOPIC" in caplog.records[0].getMessage()
    eventually(lambda: sink.is_open, 5)


def test_a_broker_that_refuses_all_is_tried_again_later_than_one_that_takes_some(sink, answer, monkeypatch):
    monkeypatch.setattr("tasks.sinks.refusals.WAIT_WHERE_SOME_ARE_TAKEN_S", 0)
    sink.tell(events(2))
    answer(code="Not authorized")

    sink.take_back()

    assert not sink.is_open


def test_a_refusal_counts_when_all_are_answered_or_the_connection_is_lost(sink, answer):
    sink.tell(events(2))
    answer(1, code="Unspecified error")

    assert sink.is_open
    sink._is_open = False
    assert sink.refused_from == Place(1, "a", 1)
    sink.take_back()
    assert sink.unconfirmed == 0


@pytest.fixture
def try_again(sink, client, answer, monkeypatch):
    """A function: so many events are told, all but these are refused with a code, and so it goes on at once."""
    monkeypatch.setattr("tasks.sinks.refusals.WAIT_S", 0)
    monkeypatch.setattr("tasks.sinks.refusals.WAIT_WHERE_SOME_ARE_TAKEN_S", 0)

    def told(count, refused, code, first=1):
        """How many were published."""
        client.unanswered = []
        sink.tell(events(count, first))
        numbers = client.unanswered
        for place, number in zip(range(first, first + count), numbers, strict=False):
            answer(number, code=code if place in refused else "Success")
        sink.take_back()
        return len(numbers)

    return told


@pytest.mark.parametrize("code", ["Payload format invalid", "Implementation specific error", "Not authorized"])
def test_an_event_that_is_refused_twice_while_later_ones_are_taken_is_passed_over(sink, try_again, caplog, code):
    assert [try_again(3, {1}, code) for _ in range(3)] == [3, 3, 2]

    assert (sink.is_open, sink.unconfirmed) == (True, 0)
    refusal, passed_over = (record.getMessage() for record in caplog.records)
    assert "refuses messages" in refusal
    assert "change 1 of job a" in passed_over
    assert "mqtt replay" in passed_over


def test_an_event_that_is_taken_at_the_second_time_is_told(try_again):
    """Say, since the ACL was mended between the answers to two events."""
    assert [try_again(3, refused, "Not authorized") for refused in ({1}, {}, {1})] == [3, 3, 3]


def test_no_event_is_passed_over_while_none_is_taken_after_it(try_again):
    assert [try_again(3, {2, 3}, "Not authorized") for _ in range(4)] == [3] * 4
    assert [try_again(1, {4}, "Not authorized", first=4) for _ in range(4)] == [1] * 4


def test_no_event_is_passed_over_for_a_quota(try_again, caplog):
    assert [try_again(3, {1}, "Quota exceeded") for _ in range(4)] == [3] * 4

    (record,) = caplog.records
    assert "Quota exceeded" in record.getMessage()
    assert "MQTT_TOPIC" not in record.getMessage()


def test_a_refusal_is_said_again_when_there_was_none_for_ten_minutes(sink, try_again, caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tasks.sinks.refusals.time", clock)
    for wait_s in (0, 400, 400, 700, 400):
        clock.pass_s(wait_s)
        try_again(1, {1}, "Not authorized")

    assert len(caplog.records) == 2


def test_what_is_passed_over_is_forgotten_when_the_log_is_told_beyond_it(sink, try_again):
    for _ in range(3):
        try_again(3, {1}, "Payload format invalid")

    sink.tell(events(1, first=4))

    assert not sink._refusals.is_passed_over(Place(1, "a", 1))


def test_a_refused_capability_keeps_no_event_back(sink, answer):
    sink.show(["add"], 1, is_draining=False)
    answer(1, code="Not authorized")

    assert sink.is_open
    assert sink.refused_from is None
    assert sink._showing.count() == 0


def test_what_was_taken_back_is_not_told_again_when_the_connection_comes_back(sink, client, answer):
    sink.tell(events(2))
    answer(1, code="Not authorized")
    sink.take_back()
    sink.tell(events(1))
    topic = sink._settings.mqtt_topic
    left = [SimpleNamespace(mid=number, topic=topic, payload=EVENT.encode()) for number in (2, 3)]

    sink._tell_again(client, left)

    assert client.unanswered == [3, 4]
    answer(4)
    assert sink.unconfirmed == 0


def test_what_is_told_again_on_the_next_connection_keeps_its_place(sink, client, answer):
    sink.tell(events(2))
    left = [SimpleNamespace(mid=n, topic=sink._settings.mqtt_topic, payload=EVENT.encode()) for n in (1, 2)]
    client.unanswered = []

    sink._tell_again(client, left)
    answer(3)
    answer(4, code="Not authorized")

    assert sink.refused_from == Place(2, "a", 2)
    assert sink._told.last_taken == Place(1, "a", 1)


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
