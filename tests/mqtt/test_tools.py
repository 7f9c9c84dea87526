"""`celery -A tasks mqtt`: the group itself, and what it costs those who don't use it."""

import json
import subprocess
import sys

from tasks.cli.mqtt import mqtt

WHAT_IT_IMPORTS = """
import json, sys
import click, kombu
before = set(sys.modules)
from tasks.cli import mqtt
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_help_lists_the_commands(tools):
    listed = tools.run(mqtt, "--help").stdout.split("Commands:\n")[1].splitlines()

    assert [line.split()[0] for line in listed if line[2] != " "] == ["check", "cleanup", "replay", "watch", "workers"]


def test_a_real_command_is_found_and_prints_its_help(tools):
    started = tools.start("--help")

    assert started.wait() == 0
    assert "Follow jobs and workers over MQTT" in "".join(started.rest())


def test_no_command_of_another_app_pays_for_it():
    done = subprocess.run([sys.executable, "-c", WHAT_IT_IMPORTS], capture_output=True, text=True, check=True)

    assert json.loads(done.stdout) == ["tasks", "tasks.cli", "tasks.cli.mqtt"]


def test_no_command_costs_more_than_it_needs_to_be_found():
    code = (
        "import json, sys; from tasks.cli.mqtt import COMMANDS, mqtt; "
        "print([mqtt.get_command(None, name) for name in COMMANDS]); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    heavy = ("paho", "ssl", "sqlalchemy", "rich", "db.", "tasks.settings", "tasks.sinks", "tasks.celery", "tasks.relay")
    imported = json.loads(done.stdout.splitlines()[-1])
    assert "tasks.cli.mqtt_watch" in imported
    assert [name for name in imported if name.startswith(heavy)] == []


def test_a_command_that_is_none_is_said(tools):
    result = tools.run(mqtt, "wacth")

    assert result.exit_code == 2
    assert "No such command 'wacth'" in result.stderr


def test_a_broker_that_chooses_no_client_ids_takes_them(tools_for, private_mosquitto):
    tools = tools_for(private_mosquitto("allow_zero_length_clientid false").port)

    for args in (["workers"], ["cleanup", "inference/#"], ["watch", "--timeout", "0.5"]):
        result = tools.mqtt(*args)
        assert result.exit_code == 0, result.output
