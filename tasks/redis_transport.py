"""kombu's Redis transport, with a channel that can be closed twice, and which says what a server refuses.

When Redis restarts, Celery 5.7 closes the channel of a worker again after its connection is gone, and the second time
puts back what was not acknowledged: that fails with an AttributeError, which ends the worker with all of its jobs.
Here it fails as a lost connection does, which Celery gets over. A password or a database number that the server refuses
is no reason to wait.
"""

from typing import Any

from kombu.transport import redis
from redis.exceptions import AuthenticationError, ResponseError
from redis.exceptions import ConnectionError as ConnectionLost

from tasks.broker.errors import BrokerUnusable

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

    def establish_connection(self) -> Any:
        try:
            return super().establish_connection()
        except (AuthenticationError, ResponseError) as exc:
            if isinstance(exc, ResponseError) and _NO_SUCH_DATABASE not in str(exc):
                raise
            raise BrokerUnusable(
                f"CELERY_BROKER_URL: the broker at {self.client.as_uri()} refuses ({exc}); look at "
                "user, password and database number (a Redis has 16, from 0, unless its `databases` says otherwise)"
            ) from exc
