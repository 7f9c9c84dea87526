"""What is particular to a broker follows from the scheme of its URL, however that is written."""

import pytest

from tasks.brokers import EMBEDDED, MEMORY, RABBITMQ, REDIS, broker_kind


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("sqlite:////data/broker.db", EMBEDDED),
        ("amqp://guest@h//", RABBITMQ),
        ("AMQPS://guest@h//", RABBITMQ),
        ("pyamqp://guest@h1//;amqp://guest@h2//", RABBITMQ),
        ("redis://h/0", REDIS),
        ("rediss://h/0", REDIS),
        ("redis+socket:///run/redis.sock", REDIS),
        ("memory://", MEMORY),
    ],
)
def test_the_kind_is_told_by_the_scheme(url, kind):
    assert broker_kind(url) is kind


def test_a_url_of_no_known_broker_has_no_kind():
    with pytest.raises(KeyError):
        broker_kind("kafka://redis")
