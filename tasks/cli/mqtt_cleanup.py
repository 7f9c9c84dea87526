"""`celery -A tasks mqtt cleanup PATTERN`: retained messages that nobody will clear any more are cleared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tasks.cli.app import IntegerRange, with_app
from tasks.cli.mqtt_connection import Connection, Refused
from tasks.cli.text import counted, line, remark

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


@click.command("cleanup")
@click.argument("pattern")
@click.option("--broker", help="Another host than MQTT_BROKER.")
@click.option("--port", type=IntegerRange(1, 65535), help="Another port than MQTT_PORT.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Only list them.")
@click.option("--force", "is_forced", is_flag=True, help="Also where PATTERN could be anybody's topics, such as #.")
@with_app
def clean_up(
    app: "MediaTasks", pattern: str, broker: str | None, port: int | None, is_dry: bool, is_forced: bool
) -> None:
    """List and clear the retained messages below PATTERN, such as "inference/workers/#".

    Workers that live publish theirs again at their next heartbeat.
    """
    from dataclasses import replace

    from tasks.mqtt_values import host_fault

    _check(pattern, is_forced=is_forced or is_dry)
    if broker and (reason := host_fault(broker)):
        raise click.BadParameter(f"it {reason}".replace("MQTT_PORT", "--port"), param_hint="--broker")
    settings = app.settings
    settings = replace(settings, mqtt_broker=broker or settings.mqtt_broker, mqtt_port=port or settings.mqtt_port)
    with Connection(settings) as connection:
        topics = sorted({message.topic for message in connection.retained(pattern) if message.payload})
        if is_dry:
            for topic in topics:
                click.echo(line(topic))
            click.echo(f"{counted(len(topics), 'retained message')}; nothing was changed")
        else:
            _clear(connection, topics)


def _clear(connection: Connection, topics: Sequence[str]) -> None:
    cleared = 0
    for topic in topics:
        try:
            connection.publish(topic, b"", is_retained=True)
        except Refused as exc:
            remark(f"Error: {exc.message}")
            continue
        cleared += 1
        click.echo(line(topic))
    click.echo(f"{counted(cleared, 'retained message')} cleared")
    if cleared < len(topics):
        raise click.exceptions.Exit(1)


def _check(pattern: str, *, is_forced: bool) -> None:
    """
    Raises:
        click.ClickException: It is no pattern, or one of anybody's topics.
    """
    from tasks.mqtt_values import is_sendable

    levels = pattern.split("/")
    is_pattern = all(level in ("#", "+") or not set(level) & set("#+\0") for level in levels)
    if not is_sendable(pattern):
        raise click.BadParameter(f"{pattern[:60]!r} is too long, or no UTF-8 text", param_hint="PATTERN")
    if not pattern or not is_pattern or "#" in levels[:-1] or levels[0] == "$share":
        raise click.BadParameter(
            f"{pattern!r} is no pattern; # may only be its last level, + only a level of its own", param_hint="PATTERN"
        )
    if not is_forced and (levels[0] in ("#", "+", "") or levels[0].startswith("$")):
        raise click.ClickException(
            f"{pattern} could clear what others keep on this broker; name the first level, or give --force"
        )
