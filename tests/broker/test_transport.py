"""What kombu's users see: routing, acknowledgement, redelivery, several connections and processes at once."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import kombu
import pytest
from kombu.asynchronous.hub import Hub
from kombu.exceptions import ChannelError

from tasks.broker.errors import BrokerReplaced, BrokerUnavailable, BrokerUnusable
from tasks.broker.lease import is_held
from tests.tooling.waiting import eventually

QUEUE = kombu.Queue("q", routing_key="q")


def publish(connection, *bodies, queue=QUEUE, **options):
    with connection.channel() as channel:
        producer = kombu.Producer(channel, serializer="json")
        for body in bodies:
            producer.publish(
                body, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue], retry=True, **options
            )


def consume(connection, queue=QUEUE, *, ack=True, **options):
    """A consumer and the list of messages that it gets."""
    received = []

    def on_message(message):
        received.append(message)
        if ack:
            message.ack()

    channel = connection.channel()
    consumer = kombu.Consumer(channel, [queue], on_message=on_message, **options)
    consumer.consume()
    return consumer, received


def drain(connection, timeout=0.3):
    try:
        while True:
            connection.drain_events(timeout=timeout)
    except TimeoutError:
        pass


def bodies(messages):
    return [message.payload for message in messages]


@pytest.mark.parametrize("url", ["sqlite://rel.db", "sqlite://"])
def test_an_url_that_names_no_file_is_refused_with_its_variable_and_an_example(url):
    said = r"\(CELERY_BROKER_URL\) names no file; write sqlite:////absolute/path/broker\.db"
    with kombu.Connection(url) as connection, pytest.raises(BrokerUnusable, match=said):
        connection.connect()


@pytest.mark.parametrize("slashes", ["absolute", "relative"])
def test_the_url_names_the_file(tmp_path, monkeypatch, slashes):
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/named.db" if slashes == "absolute" else "sqlite:///named.db"
    with kombu.Connection(url) as connection:
        publish(connection, "hello")
        assert (tmp_path / "named.db").exists()


def test_importing_and_registering_loads_neither_the_transport_nor_sqlite():
    code = "import tasks.broker, sys; tasks.broker.register(); assert 'sqlite3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_bytes_headers_and_properties_arrive_as_sent(connect):
    publish(connect(), {"a": "ä"}, headers={"h": 1}, correlation_id="id-1", priority=7)
    with connect().channel() as channel:
        kombu.Producer(channel).publish(b"\x00\xff", routing_key="q", content_type="application/octet-stream")
    connection = connect()
    _, received = consume(connection)
    drain(connection)

    first, second = received
    assert (first.payload, first.headers, first.properties["correlation_id"]) == ({"a": "ä"}, {"h": 1}, "id-1")
    assert first.properties["priority"] == 7
    assert second.body == b"\x00\xff"


def test_no_more_than_the_prefetch_count_is_handed_over(connect):
    connection = connect()
    publish(connection, *range(5))
    _, received = consume(connection, ack=False, prefetch_count=2)

    drain(connection)
    assert bodies(received) == [0, 1]
    received[0].ack()
    drain(connection)
    assert bodies(received) == [0, 1, 2]


def test_the_prefetch_count_is_that_of_all_queues_of_a_channel_together(connect):
    connection = connect()
    queues = [kombu.Queue(name, routing_key=name) for name in ("a", "b", "c")]
    for queue in queues:
        publish(connection, *[queue.name] * 3, queue=queue)
    received = []

    with kombu.Consumer(connection.channel(), queues, on_message=received.append, prefetch_count=4):
        drain(connection)

        assert len(received) == 4


def test_a_requeued_message_comes_again_and_says_so(connect):
    connection = connect()
    publish(connection, "one")
    _, received = consume(connection, ack=False)
    drain(connection)
    received[0].requeue()
    drain(connection)

    seen = [message.delivery_info for message in received]
    assert [(info["redelivered"], info["delivery_count"]) for info in seen] == [(False, 1), (True, 2)]


def test_a_closed_channel_gives_back_what_it_held_and_its_late_acks_mean_nothing(connect):
    leaving, staying = connect(), connect()
    publish(leaving, "one", "two")
    consumer, received = consume(leaving, ack=False)
    drain(leaving)
    assert bodies(received) == ["one", "two"]

    consumer.channel.close()
    for message in received:
        message.ack()
    _, again = consume(staying)
    drain(staying)

    assert bodies(again) == ["one", "two"]
    assert all(message.delivery_info["redelivered"] for message in again)


def test_a_callback_that_raises_keeps_only_its_own_message(connect):
    connection, other = connect(), connect()
    publish(connection, "one", "two", "three")

    def fail(message):
        raise ZeroDivisionError(message.payload)

    with kombu.Consumer(connection.channel(), [QUEUE], on_message=fail), pytest.raises(ZeroDivisionError, match="one"):
        connection.drain_events(timeout=5)
    _, received = consume(other)
    drain(other)

    assert bodies(received) == ["two", "three"]


def test_fanout_reaches_every_queue_that_any_connection_bound(connect):
    exchange = kombu.Exchange("fan", type="fanout", durable=False)
    listeners = [connect(), connect()]
    inboxes = [
        consume(listener, kombu.Queue(f"fan.{number}", exchange, exclusive=True))[1]
        for number, listener in enumerate(listeners)
    ]
    publisher = connect().channel()
    kombu.Producer(publisher, exchange).publish("news", declare=[exchange])
    for listener in listeners:
        drain(listener)

    assert [bodies(inbox) for inbox in inboxes] == [["news"], ["news"]]


def test_bindings_outlive_the_connection_that_made_them(connect):
    exchange = kombu.Exchange("topics", type="topic")
    first, second, third = connect(), connect(), connect()
    kombu.Queue("all", exchange, routing_key="a.#")(first.channel()).declare()
    first.release()
    kombu.Producer(second.channel(), exchange).publish("x", routing_key="a.b.c", declare=[exchange])
    kombu.Producer(second.channel(), exchange).publish("y", routing_key="b.c", declare=[exchange])
    _, received = consume(third, kombu.Queue("all", exchange, routing_key="a.#"))
    drain(third)

    assert bodies(received) == ["x"]


def test_an_exchange_is_deleted_with_its_bindings_and_may_become_another(connect):
    connection = connect()
    channel = connection.channel()
    queue = kombu.Queue("news", kombu.Exchange("news", type="fanout"))(channel)
    queue.declare()
    kombu.Exchange("news", type="fanout")(channel).delete()

    other = kombu.Exchange("news", type="topic")(channel)
    other.declare()
    kombu.Producer(channel, other).publish("x", routing_key="any")

    assert queue.get() is None
    assert channel.get_table("news") == []


def test_a_queue_is_deleted_only_as_it_was_asked_for(connect):
    connection, other = connect(), connect()
    queue = QUEUE(other.channel())
    publish(connection, "one")

    queue.delete(if_empty=True)
    assert queue.queue_declare(passive=True).message_count == 1
    consumer, _ = consume(connection)
    drain(connection)
    queue.delete(if_unused=True)
    assert queue.queue_declare(passive=True).consumer_count == 1
    consumer.cancel()
    queue.delete(if_empty=True, if_unused=True)

    with pytest.raises(ChannelError, match="NOT_FOUND"):
        queue.queue_declare(passive=True)


def test_an_exclusive_queue_is_refused_to_others_and_goes_with_its_connection(connect):
    mine, other = connect(), connect()
    queue = kombu.Queue("mine", exclusive=True, routing_key="mine")
    queue(mine.channel()).declare()
    with pytest.raises(ChannelError, match="RESOURCE_LOCKED"):
        queue(other.channel()).declare()

    mine.release()

    with pytest.raises(ChannelError, match="NOT_FOUND"):
        queue(other.channel()).queue_declare(passive=True)


def test_an_auto_delete_queue_goes_with_its_last_consumer(connect):
    connection, other = connect(), connect()
    queue = kombu.Queue("brief", auto_delete=True, routing_key="brief")
    first, _ = consume(connection, queue)
    second, _ = consume(other, queue)

    first.cancel()
    assert queue(other.channel()).queue_declare(passive=True).consumer_count == 1
    second.cancel()
    with pytest.raises(ChannelError, match="NOT_FOUND"):
        queue(other.channel()).queue_declare(passive=True)


def test_control_messages_overtake_tasks(connect):
    connection = connect()
    control = kombu.Queue("control", routing_key="control")
    publish(connection, "task 1", "task 2")
    publish(connection, "revoke", queue=control)
    order = []

    def note(message):
        order.append(message.payload)

    with (
        kombu.Consumer(connection.channel(), [QUEUE], on_message=note),
        kombu.Consumer(connection.channel(), [control], on_message=note, no_ack=True),
    ):
        connection.drain_events(timeout=5)

    assert order == ["revoke", "task 1", "task 2"]


def test_queues_take_turns(connect):
    connection = connect()
    queues = [kombu.Queue(name, routing_key=name) for name in ("a", "b", "c")]
    for queue in queues:
        publish(connection, *[queue.name] * 3, queue=queue)
    order = []

    def note(message):
        order.append(message.payload)
        message.ack()

    with kombu.Consumer(connection.channel(), queues, on_message=note, prefetch_count=1):
        drain(connection)

    assert sorted(order[:3]) == sorted(order[3:6]) == ["a", "b", "c"]


def test_a_sleeping_consumer_is_woken_long_before_its_poll(connect):
    sleeper, publisher = connect(poll_interval=60), connect()
    _, received = consume(sleeper)
    drain(sleeper)
    timer = threading.Timer(0.2, publish, [publisher, "wake up"])
    timer.start()

    began = time.monotonic()
    sleeper.drain_events(timeout=30)

    assert bodies(received) == ["wake up"]
    assert time.monotonic() - began < 15
    timer.join()


def test_who_leaves_wakes_others_for_what_it_held(connect):
    leaving, sleeper = connect(), connect(poll_interval=60)
    publish(leaving, "one")
    consume(leaving, ack=False)
    drain(leaving)
    _, received = consume(sleeper)
    drain(sleeper)
    timer = threading.Timer(0.2, leaving.release)
    timer.start()

    began = time.monotonic()
    sleeper.drain_events(timeout=30)

    assert bodies(received) == ["one"]
    assert time.monotonic() - began < 15
    timer.join()


def test_a_closed_channel_says_so(connect):
    channel = connect().channel()
    channel.close()

    with pytest.raises(BrokerUnavailable, match="this channel is closed, since its connection was lost"):
        channel.queue_declare("q")


def test_acknowledgements_in_an_event_loop_are_settled_when_the_connection_closes(connect, store):
    connection = connect()
    publish(connection, "one", "two")
    _, received = consume(connection, ack=False)
    hub = Hub()
    connection.register_with_event_loop(hub)
    eventually(lambda: hub.run_once() or len(received) == 2, 5)
    received[0].ack()

    connection.release()
    hub.close()

    assert store.sizes()["q"] == 1
    assert store.owners() == set()


@pytest.fixture
def turn():
    """`turn(connection)` has it in an event loop; `turn()` runs that until nothing more happens."""
    hub = Hub()
    hub.call_repeatedly(0.1, lambda: None)  # else a turn would wait for the next poll

    def turn(connection=None):
        if connection is not None:
            connection.register_with_event_loop(hub)
        for _ in range(10):
            hub.run_once()

    yield turn
    hub.close()


@pytest.mark.parametrize(("number", "no_ack"), [(5, True), (150, False)], ids=["without ack", "without a limit"])
def test_in_an_event_loop_all_messages_come_before_the_next_poll(connect, turn, number, no_ack):
    connection = connect(poll_interval=60)
    publish(connection, *range(number))
    _, received = consume(connection, ack=False, no_ack=no_ack)

    turn(connection)

    assert bodies(received) == list(range(number))
    connection.release()


def test_in_an_event_loop_a_new_consumer_gets_what_is_there_before_the_next_poll(connect, turn):
    connection = connect(poll_interval=60)
    publish(connection, "one")
    turn(connection)

    _, received = consume(connection)
    turn()

    assert bodies(received) == ["one"]
    connection.release()


def test_in_an_event_loop_a_higher_limit_takes_effect_before_the_next_poll(connect, turn):
    connection = connect(poll_interval=60)
    publish(connection, "one", "two", "three")
    consumer, received = consume(connection, ack=False, prefetch_count=1)
    turn(connection)
    assert bodies(received) == ["one"]

    consumer.qos(prefetch_count=3)
    turn()

    assert bodies(received) == ["one", "two", "three"]
    connection.release()


def test_an_acknowledgement_in_an_event_loop_waits_for_a_locked_file(connect, store, broker_path, turn):
    connection = connect(poll_interval=0.1, busy_timeout=0.05)
    publish(connection, "one", correlation_id="a")
    _, received = consume(connection, ack=False)
    turn(connection)

    with closing(sqlite3.connect(broker_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        received[0].ack()
        turn()
        other.execute("ROLLBACK")
    assert store.held(["a"]) == {"a"}
    turn()

    assert store.held(["a"]) == set()
    connection.release()


def test_a_producer_goes_on_with_the_new_file_when_the_old_one_was_removed(connect, broker_path):
    connection = connect()
    publish(connection, "lost")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{broker_path}{suffix}").unlink()

    publish(connection, "kept")

    reader = connect()
    _, received = consume(reader)
    drain(reader)
    assert bodies(received) == ["kept"]


HOLD_ONE = """
import sys, time, kombu, tasks.broker
tasks.broker.register()
connection = kombu.Connection(sys.argv[1])
message = connection.SimpleQueue("q").get(timeout=10)
print(connection.transport.owner, flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_held_comes_back_within_a_poll_and_its_traces_vanish(connect, broker_path):
    publish(connect(), "one")
    url = f"sqlite:///{broker_path}"
    holder = subprocess.Popen([sys.executable, "-c", HOLD_ONE, url], stdout=subprocess.PIPE, text=True)
    owner = holder.stdout.readline().strip()
    holder.stdout.close()
    connection = connect(poll_interval=0.2)
    _, received = consume(connection)
    drain(connection, timeout=1)
    assert received == []  # the holder lives, however long it takes

    holder.kill()
    holder.wait()
    connection.drain_events(timeout=2)

    assert (bodies(received), received[0].delivery_info["delivery_count"]) == (["one"], 2)
    directory = broker_path.with_name("broker.db.own")
    assert not is_held(directory / owner)
    assert not [path for path in directory.iterdir() if path.name.startswith(owner)]


def test_who_finds_a_dead_process_wakes_others_for_what_it_held(connect, broker_path):
    publish(connect(), "one")
    command = [sys.executable, "-c", HOLD_ONE, f"sqlite:///{broker_path}"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    holder.stdout.close()
    sleeper, finder = connect(poll_interval=60), connect()
    _, received = consume(sleeper)
    drain(sleeper)
    holder.kill()
    holder.wait()
    timer = threading.Timer(0.2, consume, [finder, kombu.Queue("other", routing_key="other")])
    timer.start()

    began = time.monotonic()
    sleeper.drain_events(timeout=30)

    assert bodies(received) == ["one"]
    assert time.monotonic() - began < 15
    timer.join()


def test_traces_of_a_killed_process_that_held_nothing_vanish_too(connect, broker_path):
    code = "import sys; from pathlib import Path; from tasks.broker.lease import Lease; Lease(Path(sys.argv[1]))"
    directory = broker_path.with_name("broker.db.own")
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True)
    assert len(list(directory.iterdir())) == 1

    connection = connect()
    consume(connection)
    assert {path.stem for path in directory.iterdir()} == {connection.transport.owner}


def test_a_process_that_is_just_taking_its_lease_is_not_taken_for_dead(connect, broker_path, monkeypatch):
    """Its file gets its name when it is locked: who asks for that name before, and removes it after, would harm it."""
    directory = broker_path.with_name("broker.db.own")
    directory.mkdir()
    (directory / "beginning.new").touch()
    asked = []
    monkeypatch.setattr("tasks.broker.transport.is_held", lambda path: asked.append(path.name) or False)

    consume(connect())

    assert "beginning" not in asked
    assert (directory / "beginning.new").exists()


@pytest.mark.parametrize("suffix", ["", ".wake"])
def test_a_consumer_whose_lock_or_socket_was_removed_reconnects_at_its_next_poll(connect, broker_path, suffix):
    connection = connect(poll_interval=0.05)
    consume(connection)
    (broker_path.with_name("broker.db.own") / f"{connection.transport.owner}{suffix}").unlink()

    with pytest.raises(BrokerReplaced, match=r"broker\.db\.own was emptied"):
        connection.drain_events(timeout=5)


def test_a_forked_child_reads_and_writes_on_its_own_and_leaves_its_parents_messages_alone(connect):
    connection = connect()
    publish(connection, "parents")
    _, received = consume(connection, ack=False)
    drain(connection)
    pid = os.fork()
    if not pid:
        try:
            publish(connection, "childs")
            connection.release()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

    drain(connection)
    assert bodies(received) == ["parents", "childs"]
    for message in received:
        message.ack()
    assert connection.transport.store.sizes()["q"] == 0
    assert connection.transport.store.owners() == {connection.transport.owner}


PRODUCE = """
import sys, kombu, tasks.broker
tasks.broker.register()
with kombu.Connection(sys.argv[1]) as connection:
    producer = connection.Producer(serializer="json")
    queue = kombu.Queue("q", routing_key="q")
    for number in range(300):
        producer.publish(f"{sys.argv[2]}-{number}", routing_key="q", declare=[queue])
"""
CONSUME = """
import sys, kombu, tasks.broker
tasks.broker.register()
def on_message(message):
    print(message.payload)
    message.ack()
with kombu.Connection(sys.argv[1]) as connection:
    queue = kombu.Queue("q", routing_key="q")
    with connection.Consumer([queue], on_message=on_message, prefetch_count=4):
        try:
            while True:
                connection.drain_events(timeout=3)
        except TimeoutError:
            pass
"""


def test_many_processes_at_once_lose_nothing_and_get_nothing_twice(broker_path):
    url = f"sqlite:///{broker_path}"
    run = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    producers = [subprocess.Popen([sys.executable, "-c", PRODUCE, url, str(n)], **run) for n in range(3)]
    consumers = [subprocess.Popen([sys.executable, "-c", CONSUME, url], **run) for _ in range(3)]

    outputs = [process.communicate(timeout=60) for process in producers + consumers]

    assert [error for _, error in outputs if error] == []
    received = sorted(line for output, _ in outputs for line in output.split())
    assert received == sorted(f"{n}-{number}" for n in range(3) for number in range(300))
