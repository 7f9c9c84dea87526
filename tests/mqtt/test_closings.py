"""What the end of a connection tells, by its reason code and by how the ones before it ended."""

import itertools
from types import SimpleNamespace

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from tasks.settings import read_settings
from tasks.sinks import closings
from tasks.sinks.closings import KEEP_ALIVE_TIMEOUT, SESSION_TAKEN_OVER, UNSPECIFIED, Cause, Closings
from tasks.sinks.events import Place
from tasks.sinks.mqtt import MqttSink


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        at_s = 1000.0

        def monotonic(self):
            return self.at_s

    clock = Clock()
    monkeypatch.setattr(closings, "time", clock)
    return clock


@pytest.fixture
def close(clock):
    """A function that opens a connection, lets it live, and closes it."""
    history = Closings()

    def close(*, lived_s, code=UNSPECIFIED, has_confirmed=False, has_unconfirmed=False):
        history.opened()
        if has_confirmed:
            history.confirmed()
        clock.at_s += lived_s
        cause = history.closed(code, has_unconfirmed=has_unconfirmed)
        if cause is Cause.NAMESAKE:
            history.thrown_off()
        return cause

    close.history = history
    return close


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (SESSION_TAKEN_OVER, Cause.NAMESAKE),
        (KEEP_ALIVE_TIMEOUT, Cause.SILENCE),
        (0x95, Cause.TOO_LARGE),
        (0x82, Cause.TOO_LARGE),
        (UNSPECIFIED, Cause.OUTAGE),
    ],
)
def test_a_broker_that_says_why_is_believed(close, code, cause):
    assert close(lived_s=60, code=code, has_unconfirmed=True) is cause


@pytest.mark.parametrize("code", [0x87, 0x89, 0x8B, 0x93, 0x96, 0x97, 0x98, 0x9A])
@pytest.mark.parametrize("has_unconfirmed", [True, False])
def test_a_broker_that_says_another_reason_is_believed_however_often_it_does(close, code, has_unconfirmed):
    causes = [close(lived_s=0.1, code=code, has_unconfirmed=has_unconfirmed) for _ in range(4)]

    assert causes == [Cause.OUTAGE] * 4


def test_restarts_are_outages_however_many_if_each_connection_lives_for_a_while(close):
    assert {close(lived_s=4) for _ in range(5)} == {Cause.OUTAGE}


def test_the_third_short_connection_in_a_row_is_a_namesakes(close):
    assert [close(lived_s=1) for _ in range(3)] == [Cause.OUTAGE, Cause.OUTAGE, Cause.NAMESAKE]


def test_a_broker_that_could_not_be_reached_meanwhile_was_restarted(close):
    for _ in range(3):
        assert close(lived_s=1) is Cause.OUTAGE
        close.history.missed()


def test_a_namesake_is_known_again_at_once_for_ten_minutes(close, clock):
    close(lived_s=60, code=SESSION_TAKEN_OVER)

    assert close(lived_s=1) is Cause.NAMESAKE
    clock.at_s += 601
    close.history.missed()
    assert close(lived_s=1) is Cause.OUTAGE


def test_what_closes_two_connections_in_a_row_before_it_is_confirmed_may_be_too_large(close):
    causes = [close(lived_s=2, has_unconfirmed=True) for _ in range(2)]

    assert causes == [Cause.OUTAGE, Cause.PERHAPS_TOO_LARGE]


def test_a_connection_on_which_others_were_confirmed_has_to_be_closed_at_once_for_that(close):
    kept = {"has_confirmed": True, "has_unconfirmed": True}

    assert [close(lived_s=2, **kept), close(lived_s=1, **kept)] == [Cause.OUTAGE, Cause.OUTAGE]
    close.history.missed()
    assert [close(lived_s=0.4, **kept), close(lived_s=0.4, **kept)] == [
        Cause.OUTAGE,
        Cause.PERHAPS_TOO_LARGE,
    ]


def test_only_what_the_broker_answers_is_confirmed(monkeypatch):
    """paho says of a message with QoS 0 that it is published when it is written."""
    sink, confirmations, numbers = MqttSink(read_settings({"HOME": "/home/x"}), "w"), [], itertools.count(1)
    monkeypatch.setattr(sink._closings, "confirmed", lambda: confirmations.append(1))
    sink._client, sink._is_open = SimpleNamespace(publish=lambda *_, **__: SimpleNamespace(mid=next(numbers))), True
    sink.mention('{"number": 1}')
    sink.tell({Place(1, "a", 1): '{"number": 2}'})
    sink.show(["add"], 1, is_draining=False)

    counts = []
    for number in (1, 2, 3):
        sink._on_publish(None, None, number, ReasonCode(PacketTypes.PUBACK), None)
        counts.append(len(confirmations))

    assert counts == [0, 1, 2]
