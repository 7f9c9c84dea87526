"""What the brokers differ in. In: the URL of one. Out: a frozen `BrokerKind` with the facts that others go by."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerKind:
    """One kind of broker.

    Attributes:
        schemes: What its URLs begin with, before a `+`.
        has_strategies: Whether it knows more claim orders than PRIORITY.
        is_redelivery_a_loss: Whether it redelivers a message only once its holder is lost.
        is_lowest_first: Whether it serves the priority 0 first, and 9 last.
    """

    schemes: tuple[str, ...]
    has_strategies: bool = False
    is_redelivery_a_loss: bool = False
    is_lowest_first: bool = False


EMBEDDED: Final = BrokerKind(schemes=("sqlite",), has_strategies=True, is_redelivery_a_loss=True)
RABBITMQ: Final = BrokerKind(schemes=("amqp", "amqps", "pyamqp"), is_redelivery_a_loss=True)
# It hands a message to anyone once its visibility timeout is over, whether its holder lives or not.
REDIS: Final = BrokerKind(schemes=("redis", "rediss"), is_lowest_first=True)
MEMORY: Final = BrokerKind(schemes=("memory",))
_OF_SCHEME: Final = {scheme: kind for kind in (EMBEDDED, RABBITMQ, REDIS, MEMORY) for scheme in kind.schemes}
SCHEMES: Final = tuple(_OF_SCHEME)


def broker_kind(url: str) -> BrokerKind:
    """The kind of the broker that a URL names, the first of several.

    Raises:
        KeyError: It begins with none of `SCHEMES`.
    """
    return _OF_SCHEME[url.partition("://")[0].partition("+")[0].lower()]
