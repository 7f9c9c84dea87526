"""The prefix under which a test's topics stand leaves nothing behind, however much was retained."""

import paho.mqtt.publish

MANY = 3000


def test_thousands_of_retained_topics_are_removed(private_mosquitto):
    server = private_mosquitto("max_queued_messages 0").server  # else it drops what its subscriber is too slow for
    with server.prefix() as mine:
        topics = [f"{mine.topic_prefix}/{number}" for number in range(MANY)]
        messages = [{"topic": topic, "payload": "x", "retain": True} for topic in topics]
        paho.mqtt.publish.multiple(messages, hostname=server.host, port=server.port)
        assert sorted(mine.retained()) == sorted(topics)

    assert mine.retained() == []
