"""The store gives messages out in claim order, once, and takes back what was not acknowledged."""

import sqlite3

import pytest

from tests.tooling.waiting import eventually, stays


def put(store, *texts, queue="q", **options):
    for text in texts:
        store.put([queue], "{}", text, **options)


def bodies(deliveries):
    return [delivery.body for delivery in deliveries]


def reserve_all(store, queue="q", owner="me"):
    return bodies(store.reserve(queue, owner, 100))


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        ("FIFO", ["low", "high", "low2", "high2"]),
        ("LIFO", ["high2", "low2", "high", "low"]),
        ("PRIORITY", ["high", "high2", "low", "low2"]),
    ],
)
def test_each_strategy_has_its_claim_order(open_store, strategy, order):
    store = open_store(queue_strategy={"q": strategy})
    for text in ("low", "high", "low2", "high2"):
        put(store, text, priority=9 if text.startswith("high") else 1)

    assert reserve_all(store) == order


def test_weighted_random_draws_in_proportion_to_the_priority(open_store):
    """Given as many messages of 1 as of 9, about nine of ten of the first half are of 9; and none starves."""
    store = open_store(queue_strategy={"q": "WEIGHTED_RANDOM"})
    for _ in range(1000):
        store.put(["q"], "{}", "low", priority=1)
        store.put(["q"], "{}", "high", priority=9)

    first = [delivery.body for delivery in store.reserve("q", "me", 400)]

    # 400 draws with p = 0.9 or a little less, as the high ones get fewer: six sigma are 36.
    assert 310 <= first.count("high") <= 390
    assert len(store.reserve("q", "me", 5000)) == 1600


def test_weighted_random_gives_a_late_message_the_chance_that_its_priority_has(open_store):
    """Given a queue of which half was claimed, a new message competes with the other half, neither first nor last."""
    store = open_store(queue_strategy={"*": "WEIGHTED_RANDOM"})
    places = []
    for queue in map(str, range(40)):
        for _ in range(100):
            store.put([queue], "{}", "early", priority=5)
        store.reserve(queue, "me", 50)
        store.put([queue], "{}", "late", priority=5)
        places.append([delivery.body for delivery in store.reserve(queue, "me", 100)].index("late"))

    # Uniform on 0..50: the mean of 40 has a deviation of 2.3.
    assert 12 < sum(places) / len(places) < 38


def test_weighted_random_gives_no_advantage_to_what_comes_after_a_redelivery(open_store):
    """A message that is given back stands where it stood: a claim of it does not take the others' time back."""
    store = open_store(queue_strategy={"*": "WEIGHTED_RANDOM"})
    places = []
    for queue in map(str, range(40)):
        for _ in range(100):
            store.put([queue], "{}", "early", priority=5)
        (first,) = store.reserve(queue, "me", 1)
        store.reserve(queue, "me", 89)
        store.requeue([first.id], "me")
        assert [delivery.id for delivery in store.reserve(queue, "me", 1)] == [first.id]
        store.put([queue], "{}", "late", priority=5)
        places.append([delivery.body for delivery in store.reserve(queue, "me", 100)].index("late"))

    # Uniform on 0..10: the mean of 40 has a deviation of 0.5.
    assert 2 < sum(places) / len(places) < 8


def test_weighted_random_draws_what_has_no_priority_as_if_it_had_the_lowest(open_store):
    store = open_store(queue_strategy={"q": "WEIGHTED_RANDOM"})
    for _ in range(400):
        store.put(["q"], "{}", "none")
        store.put(["q"], "{}", "lowest", priority=1)

    first = bodies(store.reserve("q", "me", 400))

    assert 140 <= first.count("none") <= 260  # six sigma of 400 draws with p = 0.5


def test_a_star_is_the_strategy_of_all_queues_that_are_not_named(open_store):
    store = open_store(queue_strategy={"named": "FIFO", "*": "LIFO"})
    put(store, "first", "second", queue="named")
    put(store, "first", "second", queue="other")

    assert reserve_all(store, "named") == ["first", "second"]
    assert reserve_all(store, "other") == ["second", "first"]


def test_an_unknown_strategy_is_refused_with_the_known_ones(open_store):
    with pytest.raises(ValueError, match="RANDOM: use one of FIFO, LIFO, PRIORITY"):
        open_store(queue_strategy={"q": "RANDOM"})


def test_a_batch_comes_in_claim_order_and_within_its_limit(store):
    for number in range(50):
        put(store, str(number), priority=number % 5)

    batch = store.reserve("q", "me", 12)

    assert bodies(batch) == [str(number) for number in [*range(4, 50, 5), 3, 8]]
    assert len(reserve_all(store)) == 38


def test_a_reserved_message_is_not_given_to_anyone_else(store):
    put(store, "one")
    assert reserve_all(store, owner="me") == ["one"]

    assert reserve_all(store, owner="other") == []
    assert store.take("q", 1) == []


def test_what_is_requeued_stands_where_it_stood_and_counts_its_deliveries(store):
    put(store, "one", "two")
    (first,) = store.reserve("q", "me", 1)
    store.requeue([first.id], "me")

    again = store.reserve("q", "me", 2)

    assert [(delivery.body, delivery.count) for delivery in again] == [("one", 2), ("two", 1)]


def test_only_the_owner_can_acknowledge_or_requeue(store):
    put(store, "one")
    (delivery,) = store.reserve("q", "me", 1)

    store.ack([delivery.id], "other")
    store.requeue([delivery.id], "other")
    assert reserve_all(store) == []

    store.release("me")
    assert reserve_all(store) == ["one"]


def test_an_id_is_never_used_again(store):
    put(store, "one")
    (first,) = store.take("q", 1)
    put(store, "two")
    (second,) = store.take("q", 1)

    assert second.id > first.id


def test_sizes_count_what_is_ready_through_every_change(store, broker_path):
    put(store, *map(str, range(10)))
    taken = store.take("q", 1)
    reserved = store.reserve("q", "me", 5)
    store.ack([reserved[0].id], "me")
    store.requeue([reserved[1].id], "me")
    with pytest.raises(ZeroDivisionError), store.transaction():
        put(store, str(1 / len(store.reserve("q", "me", 0))))

    with sqlite3.connect(broker_path) as db:
        counted = db.execute("SELECT count(*) FROM messages WHERE owner IS NULL").fetchone()[0]
    db.close()
    assert len(taken) == 1
    assert store.sizes() == {"q": 5} == {"q": counted}
    assert store.purge("q") == 5
    assert store.size("q") == 0
    assert store.size("unknown") is None


def test_a_purge_takes_all_that_is_ready_however_much_and_nothing_that_is_reserved(store, monkeypatch):
    monkeypatch.setattr("tasks.broker.messages._PURGE_BATCH", 3)
    put(store, *map(str, range(8)))
    (reserved,) = store.reserve("q", "me", 1)

    assert store.purge("q") == 7

    store.requeue([reserved.id], "me")
    assert reserve_all(store) == ["0"]


def test_who_has_nothing_but_an_exclusive_queue_is_an_owner(store):
    store.declare("mine", owner="me")

    assert store.owners() == {"me"}
    store.release("me")
    assert store.owners() == set()


def test_the_store_tells_which_task_ids_it_still_has(store):
    put(store, "ready", correlation_id="a")
    put(store, "reserved", correlation_id="b", priority=9)
    put(store, "done", correlation_id="c", priority=9)
    _, done = store.reserve("q", "me", 2)
    store.ack([done.id], "me")

    assert store.held(["a", "b", "c", "d"]) == {"a", "b"}


def test_a_message_past_its_time_to_live_is_never_delivered(store):
    store.declare("brief", message_ttl_s=0.0)
    put(store, "by message", ttl_s=0.0)
    put(store, "by queue", queue="brief", ttl_s=60)
    put(store, "lasting", ttl_s=60)

    assert reserve_all(store) == ["lasting"]
    assert reserve_all(store, "brief") == []


def test_a_message_past_its_time_to_live_stays_with_who_has_reserved_it(store):
    put(store, "brief", ttl_s=0.05, correlation_id="a")
    (brief,) = store.reserve("q", "me", 1)

    def others_expire():
        put(store, "briefer", ttl_s=0.0, correlation_id="b")
        store.expire()
        return store.held(["a", "b"]) == {"a"}

    stays(others_expire, 0.2)
    store.requeue([brief.id], "me")

    store.expire()
    assert store.held(["a"]) == set()


def test_a_queue_expires_when_it_was_unused_for_its_time_but_not_while_somebody_consumes(store):
    store.declare("used", expires_s=0.05)
    store.declare("unused", expires_s=0.05)
    store.declare("lasting")
    store.add_consumer("used", "me", "tag")
    put(store, "goes too", queue="unused")

    def expired():
        store.expire()
        return "unused" not in store.sizes()

    eventually(expired, 5)
    assert store.sizes() == {"used": 0, "lasting": 0}


def test_a_queue_is_unused_from_when_its_last_consumer_leaves(store):
    store.declare("q", expires_s=1.0)
    store.add_consumer("q", "me", "tag")
    stays(lambda: store.sizes() == {"q": 0}, 1.1)

    store.remove_consumer("q", "me", "tag")
    store.expire()

    assert store.sizes() == {"q": 0}


def test_releasing_an_owner_undoes_all_that_it_held(store):
    store.declare("shared", auto_delete=True)
    store.declare("alone", auto_delete=True)
    store.declare("mine", owner="dead")
    store.bind("mine", "fan", "", None)
    store.add_consumer("shared", "dead", "1")
    store.add_consumer("shared", "alive", "1")
    store.add_consumer("alone", "dead", "2")
    put(store, "one")
    reserve_all(store, owner="dead")
    assert store.owners() == {"dead", "alive"}

    assert store.release("dead") == {"q"}

    assert store.sizes() == {"q": 1, "shared": 0}
    assert store.owners() == {"alive"}
    assert store.bindings("fan") == []


def test_a_deleted_queue_takes_reserved_messages_and_consumers_with_it(store):
    put(store, "reserved", "ready")
    (delivery,) = store.reserve("q", "me", 1)
    store.add_consumer("q", "other", "tag")

    store.delete("q")
    store.requeue([delivery.id], "me")

    assert store.sizes() == {}
    assert store.owners() == set()
    assert reserve_all(store) == []


def test_text_and_bytes_come_back_as_they_were(store):
    for body in ("täxt", b"\x00\xff", ""):
        put(store, body)
    assert reserve_all(store) == ["täxt", b"\x00\xff", ""]


def test_claiming_uses_the_index_and_nothing_else(store, broker_path):
    with sqlite3.connect(broker_path) as db:
        plan = db.execute(
            """EXPLAIN QUERY PLAN SELECT id FROM messages WHERE queue = 'q' AND owner IS NULL
            ORDER BY priority DESC, "order", id LIMIT 1"""
        ).fetchall()
    db.close()
    assert [row[3] for row in plan] == ["SEARCH messages USING INDEX messages_ready (queue=?)"]
