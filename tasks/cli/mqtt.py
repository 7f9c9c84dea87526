"""`celery -A tasks mqtt watch | workers | replay | cleanup | check`: the group of all commands on MQTT."""

import click

from tasks.cli.mqtt_check import check_broker
from tasks.cli.mqtt_cleanup import clean_up
from tasks.cli.mqtt_replay import replay_events
from tasks.cli.mqtt_watch import watch_events
from tasks.cli.mqtt_workers import show_workers


@click.group()
def mqtt() -> None:
    """Follow jobs and workers over MQTT; look after the broker."""


for command in (watch_events, show_workers, replay_events, clean_up, check_broker):
    mqtt.add_command(command)
