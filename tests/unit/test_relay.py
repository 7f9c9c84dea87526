"""The relay on a real store, with a sink in the test's hands."""

import json
import time
from types import SimpleNamespace

import pytest
from celery.worker.components import Consumer
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from db.models import task_logs
from db.records import Failure, Fence, Status
from tasks import control
from tasks.broadcast import Broadcast
from tasks.duty import Duty
from tasks.relay import NO_PAUSE, UNTIL_NEEDED, WHILE_BUSY, WHILE_IDLE, Relay
from tests.unit.jobs import new_job


class Recorder:
    """A sink that confirms when it is told to."""

    def __init__(self):
        self.is_open, self.window = True, 10
        self.told, self.mentioned = [], []
        self.unconfirmed = 0
        self.refused_from = None

    def tell(self, events):
        self.told += map(json.loads, events.values())
        self.places = list(events)
        self.unconfirmed += len(events)

    def mention(self, event):
        self.mentioned.append(json.loads(event))

    def confirm(self):
        self.unconfirmed = 0

    def refuse(self, taken=0):
        """All that was told last, but for so many."""
        self.refused_from, self.is_open = self.places[taken], False

    def take_back(self):
        if self.refused_from is not None:
            self.refused_from, self.unconfirmed = None, 0

    def taken(self):
        """What was told since the last call."""
        taken, self.told = self.told, []
        return taken


@pytest.fixture
def store(producer):
    producer.app.leases.take()
    return producer.app.store


@pytest.fixture(autouse=True)
def record_at_once(monkeypatch):
    monkeypatch.setattr("tasks.relay.RECORD_EVERY_S", 0)


@pytest.fixture
def sink():
    return Recorder()


@pytest.fixture
def relay(producer, store, sink):
    relay = Relay(producer.app, sink, Duty(producer.app, "relay"))
    relay.round()
    return relay


def enqueue(store, *job_ids):
    for job_id in job_ids:
        store.enqueue(new_job(job_id))


def claim(store, job_id, publication=1):
    job = new_job(job_id)
    return store.claim(
        job_id,
        unknown=lambda: job,
        publication=publication,
        worker_id="w",
        lease=None,
        judge=None,
        max_deaths=3,
    ).attempt


def go(relay, sink, rounds=5):
    """Rounds of a sink that confirms at once."""
    for _ in range(rounds):
        sink.confirm()
        relay.round()
    sink.confirm()


def test_changes_are_told_in_the_order_of_the_log(relay, store, sink):
    enqueue(store, "a", "b")
    store.complete("a", claim(store, "a"), {"x": 1})

    relay.round()

    told = [(event["job_id"], event["event_type"], event["sequence"]) for event in sink.told]
    assert told == [
        ("a", "queued", 1),
        ("b", "queued", 1),
        ("a", "processing", 2),
        ("a", "processing", 3),
        ("a", "completed", 4),
    ]
    assert sink.told[-1]["data"] == {"result": {"x": 1}}


def test_what_is_not_confirmed_is_not_passed(relay, store, sink, producer):
    enqueue(store, "a")
    relay.round()
    enqueue(store, "b")
    relay.round()

    assert [event["job_id"] for event in sink.told] == ["a"]
    assert store.relay_position("relay", producer.app.lease) == 0
    sink.confirm()
    relay.round()
    assert [event["job_id"] for event in sink.told] == ["a", "b"]
    assert store.relay_position("relay", producer.app.lease) == 1


def test_no_more_than_the_window_is_told_at_a_time(relay, store, sink):
    enqueue(store, *map(str, range(25)))

    relay.round()
    assert len(sink.taken()) == 10
    sink.confirm()
    assert relay.round() == NO_PAUSE
    assert len(sink.taken()) == 10
    sink.confirm()
    relay.round()
    assert len(sink.taken()) == 5


def test_what_is_more_than_a_window_is_told_although_nothing_new_is_written(relay, store, sink, monkeypatch):
    monkeypatch.setattr("tasks.relay.RECORD_EVERY_S", 60)  # else the relay itself writes something each time
    enqueue(store, *map(str, range(45)))

    go(relay, sink, rounds=5)

    assert [event["job_id"] for event in sink.told] == list(map(str, range(45)))


def test_rows_of_workers_are_no_events(relay, store, sink):
    store.log_worker("w", "started", "worker started")
    enqueue(store, "a")

    relay.round()

    assert [event["job_id"] for event in sink.told] == ["a"]


def test_the_next_relay_goes_on_where_the_last_one_was(relay, store, sink, producer):
    enqueue(store, "a")
    go(relay, sink)
    enqueue(store, "b")
    relay.round()  # told, and not confirmed: this one dies
    store.take_duty("relay", "other", after=producer.app.lease)
    sink.taken()

    position = store.relay_position("relay", "other")

    assert position == 1
    assert not store.relay_reached("relay", producer.app.lease, 2)
    assert store.relay_position("relay", "other") == 1


def test_a_relay_that_lost_its_duty_tells_no_more(relay, store, sink, producer):
    enqueue(store, "a")
    relay.round()
    sink.taken()
    sink.confirm()
    store.renew_lease("other", "other", "another host")
    store.take_duty("relay", "other", after=producer.app.lease)
    enqueue(store, "b")

    go(relay, sink)

    assert sink.told == []


def test_a_relay_without_its_sink_leaves_the_duty(relay, store, sink):
    sink.is_open = False

    relay.round()

    assert store.duty_holder("relay") is None


def test_what_was_refused_is_told_again_by_whoever_has_the_duty_next(relay, store, sink, producer):
    enqueue(store, "a")
    go(relay, sink)
    enqueue(store, "b", "c")
    relay.round()
    sink.refuse()

    relay.round()
    assert store.duty_holder("relay") is None
    assert sink.unconfirmed == 0
    store.take_duty("relay", "other", after=None)
    assert store.relay_position("relay", "other") == 1
    store.leave_duty("relay", "other")

    sink.taken()
    sink.is_open = True
    go(relay, sink)
    assert [event["job_id"] for event in sink.told] == ["b", "c"]


def test_what_was_taken_before_what_was_refused_is_passed(relay, store, sink, producer):
    """Else a broker that takes less than a window in a while, as one with a quota, would never be told the rest."""
    enqueue(store, *"abcd")
    relay.round()
    sink.refuse(taken=2)
    relay.round()

    store.take_duty("relay", "other", after=None)
    assert store.relay_position("relay", "other") == 2
    store.leave_duty("relay", "other")
    sink.taken()
    sink.is_open = True
    go(relay, sink)
    assert [event["job_id"] for event in sink.told] == ["c", "d"]


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_duty_that_the_database_did_not_take_back_is_left_at_the_next_round(
    relay, store, sink, producer, monkeypatch, is_refused
):
    leave = store.leave_duty

    def fail_once(*_args):
        monkeypatch.setattr(store, "leave_duty", leave)
        raise OperationalError("", None, Exception("the database is away"))

    monkeypatch.setattr(store, "leave_duty", fail_once)
    enqueue(store, "a")
    relay.round()
    if is_refused:
        sink.refuse()
    else:
        sink.is_open = False

    with pytest.raises(OperationalError):
        relay.round()
    assert store.duty_holder("relay") == producer.app.lease
    assert (sink.refused_from is not None) is is_refused
    relay.round()
    assert store.duty_holder("relay") is None
    assert sink.refused_from is None

    sink.taken()
    sink.is_open = True
    go(relay, sink)
    assert [event["job_id"] for event in sink.told] == ["a"] * is_refused


def test_the_place_in_the_log_never_goes_back(relay, store, producer):
    assert store.relay_reached("relay", producer.app.lease, 7)
    assert store.relay_reached("relay", producer.app.lease, 3)
    assert store.relay_position("relay", producer.app.lease) == 7


@pytest.fixture
def first_told(producer, store, sink):
    """A function: what the first relay of these tables tells of what is in them, as (job_id, sequence)."""

    def first_told():
        relay = Relay(producer.app, sink, Duty(producer.app, "relay"))
        relay.begin()
        relay.round()
        return [(event["job_id"], event["sequence"]) for event in sink.taken()]

    return first_told


def test_the_first_relay_tells_what_was_written_before_any_worker(store, first_told):
    enqueue(store, "a", "b")
    control.cancel("b")
    store.log_worker("w", "started", "worker started")

    assert first_told() == [("a", 1), ("b", 1), ("b", 2)]


def test_the_first_relay_tells_no_history_of_workers_but_what_was_submitted_since(store, first_told):
    enqueue(store, "old", "waiting")
    store.complete("old", claim(store, "old"), {})
    enqueue(store, "new")
    control.cancel("waiting")

    assert first_told() == [("new", 1), ("waiting", 2)]


@pytest.mark.parametrize("event", ["lost", "failed", "cancelled"])
def test_what_is_written_for_a_dead_attempt_does_not_hide_what_was_submitted_before(store, first_told, event):
    enqueue(store, "old")
    attempt = claim(store, "old")
    enqueue(store, "new")
    if event == "lost":
        store.close("old", attempt, reason="its worker died")
    else:
        job = new_job("old")
        store.end(job.job_id, Status(event), Failure(error_type="E", error_message="e"))

    assert first_told() == [("new", 1), ("old", 4)]


def test_where_the_first_relay_begins_is_fixed_once(producer, store, sink, first_told):
    enqueue(store, "before")
    Relay(producer.app, sink, Duty(producer.app, "relay")).begin()
    store.complete("before", claim(store, "before"), {})

    assert first_told() == [("before", number) for number in (1, 2, 3, 4)]


def test_what_happens_while_the_broker_is_away_from_the_very_first_start_on_is_told_when_it_comes(
    producer, store, sink
):
    relay = Relay(producer.app, sink, Duty(producer.app, "relay"))
    sink.is_open = False

    relay.round()
    enqueue(store, "meanwhile")
    claim(store, "meanwhile")
    sink.is_open = True
    relay.round()

    assert [(event["job_id"], event["sequence"]) for event in sink.told] == [
        ("meanwhile", 1),
        ("meanwhile", 2),
        ("meanwhile", 3),
    ]


class TestBroadcast:
    """The worker's step: `start` returns before the consumer is started."""

    @pytest.fixture
    def step(self, producer, store, monkeypatch):
        monkeypatch.setattr("tasks.sinks.mqtt.MqttSink.start", lambda self: None)
        monkeypatch.setattr(Broadcast, "_show", lambda self: None)
        monkeypatch.setattr(Broadcast, "_tell", lambda self: None)
        self.watched = []
        step = Broadcast(SimpleNamespace(app=producer.app, upkeep=SimpleNamespace(watch=self.watched.append)))
        yield step
        step.stop(None)

    def test_where_to_begin_is_fixed_when_it_has_started(self, step, store, first_told):
        enqueue(store, "a")

        step.start(step._worker)

        claim(store, "a")
        assert first_told() == [("a", 1), ("a", 2), ("a", 3)]

    def test_a_database_that_is_away_does_not_keep_it_from_starting(self, step, store, monkeypatch, caplog):
        def fail(_duty):
            raise OperationalError("", None, Exception("the database is away"))

        monkeypatch.setattr(store, "begin_relay", fail)

        step.start(step._worker)

        assert "events are told later" in caplog.text

    def test_its_duty_is_left_by_another_thread_when_it_is_stuck(self, step, store, clock, monkeypatch):
        step.start(step._worker)
        (duty,) = self.watched
        assert duty.is_held()
        holders = []

        def be_stuck(_duty):
            clock.pass_s(16)
            duty.leave_if_stuck(15.0)
            holders.append(store.duty_holder("relay"))

        monkeypatch.setattr(step._relay, "_has_begun", False)
        monkeypatch.setattr(store, "begin_relay", be_stuck)

        step._relay.round()

        assert holders == [None]

    def test_what_was_written_until_it_stops_is_told_and_confirmed_before_the_duty_is_left(self, step, monkeypatch):
        step.start(step._worker)
        calls, confirmed_later = [], [1, 1, 0]

        class Confirming:
            is_open = True

            @property
            def unconfirmed(self):
                calls.append("looks")
                return confirmed_later.pop(0)

        relay = SimpleNamespace(round=lambda: calls.append("tells"), leave=lambda: calls.append("leaves"))
        with monkeypatch.context() as patch:
            patch.setattr(step, "_relay", relay)
            patch.setattr(step, "_sink", Confirming())

            step._tell_the_rest()

        assert calls == ["tells", "looks", "looks", "looks", "leaves"]

    def test_it_is_started_before_the_consumer(self):
        """Celery starts the one step that is `last` after all others."""
        assert Consumer.last
        assert not Broadcast.last


def test_a_retry_and_a_failure_say_why_even_when_the_row_has_moved_on(relay, store, sink):
    enqueue(store, "a")
    failure = Failure(error_type="TimeoutError", error_message="slow: very")
    store.requeue("a", attempt=claim(store, "a"), event="retry", retry_count=1, failure=failure)
    job = new_job("a")
    store.end(job.job_id, Status.FAILED, failure, fence=Fence(attempt=claim(store, "a", 2)))
    store.replay("a")

    go(relay, sink)

    retry, error = (event for event in sink.told if event["event_type"] in ("retry", "error"))
    why = {"error_type": "TimeoutError", "error_message": "slow: very"}
    assert retry["data"] == {**why, "retry_count": 1, "run_after_utc": None}
    assert (error["data"], error["status"]) == (why, "failed")
    assert sink.told[-1]["event_type"] == "queued"


def test_a_result_with_no_number_in_it_is_valid_json(relay, store, sink):
    enqueue(store, "a")
    store.complete("a", claim(store, "a"), {"psnr": float("inf")})

    relay.round()

    assert sink.told[-1]["data"] == {"result": {"psnr": None}}


def test_a_row_that_cannot_be_told_is_passed_over(relay, store, sink, monkeypatch, caplog):
    enqueue(store, "a", "b")
    from tasks.sinks import topics

    tell = topics.event

    def event(told, job_id, *args, **kwargs):
        if job_id == "a":
            raise ValueError("broken")
        return tell(told, job_id, *args, **kwargs)

    monkeypatch.setattr("tasks.sinks.topics.event", event)

    relay.round()

    assert [event["job_id"] for event in sink.told] == ["b"]
    assert "can't be told" in caplog.text


def test_an_event_that_this_version_does_not_know_is_passed_over_and_said(relay, store, sink, caplog):
    enqueue(store, "a", "b")
    with store.database.transaction() as connection:
        connection.execute(update(task_logs).where(task_logs.c.job_id == "a").values(event_type="rescued"))

    relay.round()

    assert [event["job_id"] for event in sink.told] == ["b"]
    assert "can't be told and is passed over: 'rescued' is no event" in caplog.text


class TestProgress:
    @pytest.fixture(autouse=True)
    def always_due(self, monkeypatch):
        monkeypatch.setattr("tasks.relay.PROGRESS_EVERY_S", 0)

    def test_it_is_mentioned_when_it_rises(self, relay, store, sink):
        enqueue(store, "a")
        attempt = claim(store, "a")
        for percent in (10, 10, 5, 30):
            store.progress("a", attempt, percent=percent, stage="encode")
            go(relay, sink)

        assert [event["progress"] for event in sink.mentioned] == [10, 30]
        assert sink.mentioned[0]["data"] == {"progress": 10, "stage": "encode"}
        assert {event["sequence"] for event in sink.mentioned} == {3}

    def test_a_new_attempt_begins_anew(self, relay, store, sink):
        enqueue(store, "a")
        store.progress("a", claim(store, "a"), percent=50)
        go(relay, sink)
        store.close("a", 1, reason="died")
        store.progress("a", claim(store, "a", publication=2), percent=20)
        go(relay, sink)

        assert [event["progress"] for event in sink.mentioned] == [50, 20]

    def test_it_waits_for_the_changes_before_it(self, relay, store, sink):
        enqueue(store, *map(str, range(20)))
        store.progress("0", claim(store, "0"), percent=50)

        relay.round()
        assert sink.mentioned == []
        go(relay, sink)

        assert [event["progress"] for event in sink.mentioned] == [50]

    def test_it_is_not_mentioned_behind_a_change_that_came_meanwhile(self, relay, store, sink, monkeypatch):
        enqueue(store, "a")
        attempt = claim(store, "a")
        go(relay, sink)
        store.progress("a", attempt, percent=50)
        rising = store.rising

        def rising_before_the_end():
            rows = rising()
            store.complete("a", attempt, {})
            return rows

        monkeypatch.setattr(store, "rising", rising_before_the_end)
        go(relay, sink, rounds=1)

        assert sink.told[-1]["event_type"] == "completed"
        assert sink.mentioned == []

    def test_it_is_not_mentioned_once_the_job_has_ended(self, relay, store, sink):
        enqueue(store, "a")
        attempt = claim(store, "a")
        store.progress("a", attempt, percent=50)
        store.complete("a", attempt, {})

        go(relay, sink)

        assert sink.told[-1]["event_type"] == "completed"
        assert sink.mentioned == []


def test_progress_is_told_twice_a_second_however_often_it_rises(relay, store, sink):
    enqueue(store, "a")
    attempt = claim(store, "a")
    go(relay, sink)
    deadline = time.monotonic() + 1.6

    while (left_s := deadline - time.monotonic()) > 0:
        store.progress("a", attempt, percent=90 - 50 * left_s)
        go(relay, sink, rounds=1)
        time.sleep(0.01)

    assert 2 <= len(sink.mentioned) <= 4


class TestNews:
    def looks(self, relay, store, monkeypatch):
        """In how many of the next rounds it looks into the log, one second of them."""
        looks = []
        changes = store.changes
        with monkeypatch.context() as patch:
            patch.setattr(store, "changes", lambda *args, **kwargs: looks.append(1) or changes(*args, **kwargs))
            for _ in range(10):
                relay.round()
        return len(looks)

    def test_nothing_is_read_while_nothing_is_written(self, relay, store, sink, monkeypatch):
        go(relay, sink)

        assert self.looks(relay, store, monkeypatch) == 0

    def test_after_a_commit_it_looks_twice(self, relay, store, sink, monkeypatch):
        go(relay, sink)
        relay._record_due = float("inf")  # else its own commit is news, too
        store.log_worker("w", "started", "no event, so nothing has to be confirmed")

        assert self.looks(relay, store, monkeypatch) == 2

    def test_it_looks_once_a_second_all_the_same(self, relay, store, sink, monkeypatch):
        go(relay, sink)
        relay._look_due = 0.0

        assert self.looks(relay, store, monkeypatch) == 1

    def test_an_idle_one_goes_round_less_often(self, relay, store, sink):
        enqueue(store, "a")
        go(relay, sink)
        assert relay.round() == WHILE_BUSY

        relay._busy_until = 0.0

        assert relay.round() == WHILE_IDLE
        assert WHILE_BUSY.seconds < WHILE_IDLE.seconds < 0.1


class TestPauses:
    """Who has to wait for the sink is woken by it."""

    def test_without_a_sink(self, relay, sink):
        sink.is_open = False

        assert relay.round() == UNTIL_NEEDED

    def test_until_all_is_confirmed(self, relay, store, sink):
        enqueue(store, "a")
        relay.round()

        assert relay.round() == UNTIL_NEEDED
        sink.confirm()
        assert relay.round() == WHILE_BUSY

    def test_while_another_worker_relays(self, relay, store, producer):
        relay.leave()
        store.renew_lease("other", "other", "another host")
        store.take_duty("relay", "other", after=None)

        assert relay.round() == UNTIL_NEEDED
