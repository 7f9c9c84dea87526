"""`celery -A tasks mqtt check`: what a worker needs of the broker, step by step, each failure with its remedy.

It uses a topic of its own below the worker's, so that nobody takes it for a worker, and leaves nothing retained.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import click

from tasks.cli.app import with_app
from tasks.cli.mqtt_connection import ANSWER_WITHIN_S, Connection
from tasks.cli.text import line, remark

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.settings import Settings

OWN_LEVEL: Final = "check"


@click.command("check")
@with_app
def check_broker(app: "MediaTasks") -> None:
    """Try what a worker needs of the MQTT broker: connect, publish, receive, last will.

    Ends with exit code 1 at the first step that fails.
    """
    from tasks.sinks import trouble

    if app.settings.broadcast_type == "noop":
        remark("BROADCAST_TYPE=noop: workers with this setting don't use the broker")
    for what in trouble.ignored(app.settings):
        remark(what)
    _Check(app.settings).run()


class _Check:
    """The steps, in order; a later one stands on those before it."""

    def __init__(self, settings: "Settings") -> None:
        from tasks.sinks.topics import capability_topic

        self._settings = settings
        self._topic = f"{capability_topic(settings.capability_topic_prefix, settings.worker_id)}/{OWN_LEVEL}"
        self._text = uuid4().hex
        self._connection = self._tried("connect", lambda: self._client("check"))

    def run(self) -> None:
        with self._tried("connect", self._connection.__enter__, self._way_in()) as connection:
            self._tried("publish", lambda: self._publish(connection), self._topic)
            self._tried("receive", lambda: self._receive(connection), "own message")
            self._tried("will", lambda: self._lose_a_client(connection), "of a client that was cut off")
        click.echo(
            line(
                "events  ",
                "untried",
                f"whether this user may publish to {self._settings.mqtt_topic} (MQTT_TOPIC), since its subscribers "
                "would get it; a worker that may not says so in its log",
            )
        )

    def _client(self, name: str, **options: Any) -> Connection:
        return Connection(self._settings, client_id=f"{self._settings.worker_id}-{name}", **options)

    def _publish(self, connection: Connection) -> None:
        connection.subscribe(self._topic)
        connection.publish(self._topic, self._text)

    def _receive(self, connection: Connection) -> None:
        self._await(
            connection,
            self._text,
            f"what was published to {self._topic} did not come back; "
            "the broker's ACL has to let MQTT_USERNAME read it (docker/mosquitto/acl does)",
        )

    def _lose_a_client(self, connection: Connection) -> None:
        will = f"will {self._text}"
        with self._client("check-will", will_topic=self._topic, will=will) as lost:
            lost.vanish()
            self._await(
                connection,
                will,
                f"the will of a lost client did not come within {ANSWER_WITHIN_S:g} s; is there a proxy between here "
                "and MQTT_BROKER that keeps connections open, or an ACL that refuses wills?",
            )

    def _await(self, connection: Connection, text: str, remedy: str) -> None:
        deadline = time.monotonic() + ANSWER_WITHIN_S
        while (left_s := deadline - time.monotonic()) > 0:
            message = connection.next(left_s)
            if message is not None and message.payload == text.encode():
                return
        raise click.ClickException(remedy)

    def _way_in(self) -> str:
        from tasks.sinks import trouble

        user = "with a user name" if self._settings.mqtt_username is not None else "without a user name"
        tls = ", TLS" if self._settings.mqtt_use_tls else ""
        return f"{trouble.address(self._settings)}, MQTT 5{tls}, {user}"

    def _tried(self, step: str, do: Callable[[], Any], said: str = "") -> Any:
        """Do a step and print how it went.

        Raises:
            click.exceptions.Exit: It failed; code 1.
        """
        from tasks.errors import SettingsError

        start_s = time.monotonic()
        try:
            done = do()
        except (click.ClickException, SettingsError) as exc:
            reason = exc.message if isinstance(exc, click.ClickException) else str(exc)
            click.echo(line(f"{step:8}", "failed", reason))
            raise click.exceptions.Exit(1) from exc
        if said:
            click.echo(line(f"{step:8}", "ok    ", said, f"{(time.monotonic() - start_s) * 1000:.0f} ms"))
        return done
