"""`celery -A tasks mqtt watch | workers | replay | cleanup | check`: the group of all commands on MQTT.

Celery loads this module whenever anybody runs `celery`, also as a worker: a command's own is loaded when it is named.
"""

from importlib import import_module
from typing import Final

import click

COMMANDS: Final = {
    "check": "tasks.cli.mqtt_check:check_broker",
    "cleanup": "tasks.cli.mqtt_cleanup:clean_up",
    "replay": "tasks.cli.mqtt_replay:replay_events",
    "watch": "tasks.cli.mqtt_watch:watch_events",
    "workers": "tasks.cli.mqtt_workers:show_workers",
}


class _Group(click.Group):
    """Finds its commands by name, in their modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (Click's signature)
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_Group)
def mqtt() -> None:
    """Follow jobs and workers over MQTT; look after the broker."""
