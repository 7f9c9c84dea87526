"""The prefix under which a test's topics stand leaves nothing behind, however much was retained."""

import paho.mqtt.publish

MANY = 3000


def test_thousands_of_retained_topics_are_removed(private_mosquitto):
    server = private_mosquitto().server
    with server.prefix() as mine:
        topics = [f"{mine.topic_prefix}/{number}" for number in range(MANY)]
        # At QoS 0 paho disconnects before all are written.
        messages = [{"topic": topic, "payload": "x", "qos": 1, "retain": True} for topic in topics]
        paho.mqtt.publish.multiple(messages, hostname=server.host, port=server.port)
        assert sorted(mine.retained()) == sorted(topics)

    assert mine.retained() == []
