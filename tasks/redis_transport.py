"""kombu's Redis transport, with a channel that can be closed twice.

When Redis restarts, Celery 5.7 closes the channel of a worker again after its connection is gone, and the second time
puts back what was not acknowledged: that fails with an AttributeError, which ends the worker with all of its jobs.
Here it fails as a lost connection does, which Celery gets over.
"""

from typing import Any

from kombu.transport import redis
from redis.exceptions import ConnectionError as ConnectionLost


class Channel(redis.Channel):  # type: ignore[misc, unused-ignore]
    """A channel that knows that its connection is gone."""

    def _connparams(self, asynchronous: bool = False) -> Any:
        if self.connection is None or self.connection.client is None:
            raise ConnectionLost("this channel is closed, since its connection was lost")
        return super()._connparams(asynchronous)


class Transport(redis.Transport):  # type: ignore[misc, unused-ignore]
    """Redis, as kombu has it but for its channel."""

    Channel = Channel
