"""What `celery` itself shows of our commands, for this app and for those of others."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.deployment import install_entry_point
from tests.cli.conftest import REPOSITORY

HEAVY = ("tasks.celery", "tasks.job", "tasks.settings", "tasks.capabilities")
HEAVY_PACKAGES = ("sqlalchemy", "alembic", "rich", "db", "pyvips", "PIL", "numpy", "tasks.media")
# Flower, a command of Celery's own neighbourhood, may be installed or not: what it imports is not ours.
WHAT_THEY_IMPORT = """
import json, sys
import click, kombu
before = set(sys.modules)
from tasks.cli import db, jobs, queues, reconcile, submit
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_help_lists_the_commands_with_what_they_are_for(celery):
    text = celery("--help").stdout

    for command, purpose in {
        "submit": "Submit a job: submit image_resize",
        "jobs": "Look at jobs",
        "queues": "Look at queues",
        "reconcile": "Find jobs whose worker is dead",
        "db": "Look after the job database",
    }.items():
        assert re.search(rf"^  {command} +{purpose}", text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ("jobs", ["cancel", "explain", "list", "replay", "retry", "show"]),
        ("queues", ["list", "pause", "purge", "resume"]),
        ("db", ["backup", "checkpoint", "pragmas", "stats", "upgrade", "vacuum"]),
    ],
)
def test_the_help_of_a_group_lists_its_commands(celery, group, commands):
    done = celery(group, "--help")

    listed = done.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed if line[2] != " "] == commands


@pytest.mark.parametrize(
    ("app", "command"),
    [
        ("tests.tooling.sample_app", "jobs list"),
        ("tests.tooling.sample_app", "submit image_resize a b --width 8"),
        (None, "db stats"),
        (None, "queues list"),
        (None, "reconcile"),
    ],
)
def test_another_app_is_told_whose_commands_these_are(celery, app, command):
    done = celery(*command.split(), app=app)

    assert done.returncode == 1
    assert "of Media Tasks, and this is another app" in done.error
    assert f"run: celery -A tasks {command.split()[0]}" in done.error
    assert done.stderr.count("\n") == 1


def test_a_setting_that_cannot_be_used_is_named_in_one_line(celery):
    done = celery("jobs", "list", env={"MAX_PIXELS": "many"})

    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "MAX_PIXELS='many' is not a whole number" in done.stderr


def test_a_server_directory_that_cannot_be_made_is_named_in_one_line(celery, tmp_path):
    (tmp_path / "file").write_text("")

    done = celery("jobs", "list", env={"CL_SERVER_DIR": tmp_path / "file" / "server"})

    assert done.returncode == 1
    assert f"{tmp_path}/file/server" in done.error
    assert "CL_SERVER_DIR" in done.error


@pytest.mark.parametrize("way", ["strict", "broker"])
def test_a_broker_that_does_not_answer_is_said_in_one_line(celery, way):
    env = {"CELERY_BROKER_URL": "redis://:hunter2@127.0.0.1:1/0", "ENQUEUE": way}

    done = celery("submit", "image_resize", "a.jpg", "b.webp", "--width", 80, env=env)

    assert done.returncode == 1
    assert done.error.startswith("Error: the broker does not answer at redis://:**@127.0.0.1:1/0 (")
    assert done.error.count("does not answer") == 1
    assert "CELERY_BROKER_URL" in done.error
    assert "hunter2" not in done.stderr


@pytest.fixture(params=["a wrong password", "a missing vhost", "a missing database", "a stranger"])
def refused_url(request):
    """A broker that answers, and refuses, with what it says."""
    if request.param == "a wrong password":
        url = request.getfixturevalue("rabbitmq_server").url()
        return url.replace("guest:guest@", "guest:hunter2@"), "Login was refused"
    if request.param == "a missing vhost":
        return request.getfixturevalue("rabbitmq_server").url("no such vhost"), "vhost no such vhost not found"
    server = f"127.0.0.1:{request.getfixturevalue('redis_server').port}"
    if request.param == "a missing database":
        return f"redis://{server}/9999", "DB index is out of range"
    return f"redis://nobody:hunter2@{server}/0", "invalid username-password pair"


@pytest.mark.parametrize("command", ["submit image_resize a.jpg b.webp --width 80", "worker -c 1"])
def test_a_broker_that_refuses_ends_a_command_with_what_to_look_at(celery, refused_url, command):
    url, reason = refused_url

    done = celery(*command.split(), env={"CELERY_BROKER_URL": url})

    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert "CELERY_BROKER_URL: the broker at " in said
    assert f"refuses ({reason}" in said.replace("ACCESS_REFUSED - ", "").replace("NOT_ALLOWED - ", "")
    assert "; look at user, password and " in said
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize(("level", "has_traceback"), [("INFO", False), ("DEBUG", True)])
def test_a_broken_plug_in_is_named_in_one_line(celery, tmp_path, level, has_traceback):
    site = install_entry_point(tmp_path / "site", "half_done", "broken-plugin")
    (site / "half_done.py").write_text("import a_module_that_is_not_there\n")
    env = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(site)]), "LOG_LEVEL": level}

    done = celery("submit", "--help", env=env)

    assert done.returncode == 0
    first = done.stderr.splitlines()[0]
    assert "capability plug-in 'tests' of broken-plugin is left out: it can't be imported (ModuleNotFoundError" in first
    assert "a_module_that_is_not_there" in first
    assert ("Traceback" in done.stderr) is has_traceback
    assert (done.stderr.count("\n") > 1) is has_traceback


@pytest.mark.parametrize("command", ["jobs list", "jobs list --json", "queues list"])
def test_an_output_that_takes_nothing_is_said_in_one_line(celery, photo, command):
    celery("submit", "image_resize", photo, "out.webp", "--width", 80)

    with Path("/dev/full").open("w") as full:
        done = celery(*command.split(), stdout=full)

    assert (done.returncode, done.error) == (1, "Error: the output can't be written: No space left on device")


def test_no_command_of_another_app_pays_for_ours():
    """Celery imports the entry points of everybody's commands, whatever it is asked for."""
    done = subprocess.run([sys.executable, "-c", WHAT_THEY_IMPORT], capture_output=True, text=True, check=True)

    imported = json.loads(done.stdout)
    assert "tasks.cli.jobs" in imported
    assert [name for name in imported if name in HEAVY or name.startswith(HEAVY_PACKAGES)] == []


@pytest.mark.parametrize(
    ("url", "said"), [(None, "it is no SQLite database"), ("sqlite://rel.db", "CELERY_BROKER_URL")]
)
def test_a_broker_that_no_waiting_makes_usable_ends_the_worker_in_one_line(celery, server_dir, url, said):
    (server_dir / "broker.db").write_bytes(b"x" * 20_000)
    done = celery("worker", "-c1", env={"CELERY_BROKER_URL": url} if url else {})

    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
