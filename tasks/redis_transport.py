"""kombu's Redis transport, with a channel that can be closed twice, and which says what a server refuses.

When Redis restarts, Celery 5.7 closes the channel of a worker again after its connection is gone, and the second time
puts back what was not acknowledged: that fails with an AttributeError, which ends the worker with all of its jobs.
Here it fails as a lost connection does, which Celery gets over. A password or a database number that the server refuses
is no reason to wait, unless this process was accepted before.
"""

from typing import Any, ClassVar

from kombu.transport import redis
from redis.exceptions import AuthenticationError, ResponseError
from redis.exceptions import ConnectionError as ConnectionLost

from tasks.broker.errors import BrokerRefuses, BrokerUnusable

_NO_SUCH_DATABASE = "DB index"


class Channel(redis.Channel):  # type: ignore[misc, unused-ignore]
    """A channel that knows that its connection is gone."""

    def _connparams(self, asynchronous: bool = False) -> Any:
        if self.connection is None or self.connection.client is None:
            raise ConnectionLost("this channel is closed, since its connection was lost")
        return super()._connparams(asynchronous)


class Transport(redis.Transport):  # type: ignore[misc, unused-ignore]
    """Redis, as kombu has it but for its channel."""

    Channel = Channel
    was_accepted: ClassVar[bool] = False

    def establish_connection(self) -> Any:
        try:
            connection = super().establish_connection()
        except (AuthenticationError, ResponseError) as exc:
            if isinstance(exc, ResponseError) and _NO_SUCH_DATABASE not in str(exc):
                raise
            kind = BrokerRefuses if Transport.was_accepted else BrokerUnusable
            raise kind(
                f"CELERY_BROKER_URL: the broker at {self.client.as_uri()} refuses ({exc}); look at "
                "user, password and database number (a Redis has 16, from 0, unless its `databases` says otherwise)"
            ) from exc
        Transport.was_accepted = True
        return connection
