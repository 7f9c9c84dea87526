"""kombu's RabbitMQ transport, which says what a server refuses, and what helps. A worker that starts does not wait for
that; one that was accepted before does. A job that runs for longer than the server waits for acknowledgements costs a
new connection, and nothing else.
"""

from typing import Any, ClassVar

from amqp.exceptions import AccessRefused, NotAllowed, PreconditionFailed
from kombu.transport import pyamqp

from tasks.broker.errors import BrokerRefuses, BrokerUnusable


class AcknowledgementOverdue(ConnectionResetError):
    """The server's `consumer_timeout` (30 minutes, rabbitmq.com/docs/consumers#acknowledgement-timeout) has passed in
    mid-job: it closes the channel, and redelivers what was reserved there. The guard leaves what runs alone.
    """


class Connection(pyamqp.Connection):  # type: ignore[misc, unused-ignore]
    """As kombu's. Celery ends a worker whose channel is closed; one whose connection is lost makes another."""

    def drain_events(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().drain_events(*args, **kwargs)
        except PreconditionFailed as exc:
            if "acknowledgement" in exc.reply_text:
                raise AcknowledgementOverdue(exc.reply_text) from exc
            raise


class _Explained:
    """Connections whose refusal names the setting."""

    client: Any
    was_accepted: ClassVar[bool] = False

    def establish_connection(self) -> Any:
        try:
            connection = super().establish_connection()  # type: ignore[misc]
        except (AccessRefused, NotAllowed) as exc:
            if "is down" in exc.reply_text:  # a vhost that is about to come back
                raise
            kind = BrokerRefuses if _Explained.was_accepted else BrokerUnusable
            raise kind(
                f"CELERY_BROKER_URL: the broker at {self.client.as_uri()} refuses ({exc.reply_text}); look at "
                "user, password and vhost (rabbitmqctl change_password, add_vhost and set_permissions help)"
            ) from exc
        _Explained.was_accepted = True
        return connection


class Transport(_Explained, pyamqp.Transport):  # type: ignore[misc, unused-ignore]
    """RabbitMQ, as kombu has it."""

    Connection = Connection


class SSLTransport(_Explained, pyamqp.SSLTransport):  # type: ignore[misc, unused-ignore]
    """The same with TLS."""

    Connection = Connection
