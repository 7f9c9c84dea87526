"""A new task type in an installed package: its queue, route, rows and command follow from its declaration alone."""

import json
import os
import subprocess
import sys

import pytest

from tests.acceptance.deployment import REPOSITORY, deployed
from tests.tooling.environment import without_settings

MODULE = '''\
from tasks.celery import app

@app.task(bind=True)
def count_words(self, text: str, *, twice: bool = False) -> dict:
    """Count the words of a text.

    Args:
        text: What to count.
        twice: Count each one twice.
    """
    return {"words": len(text.split()) * (2 if twice else 1)}
'''
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "word-counter"
version = "1.0"
[project.entry-points."media_tasks.capabilities"]
words = "word_counter"
[tool.setuptools]
py-modules = ["word_counter"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory into which pip has installed a package with one capability, and a broken one."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("word-counter")
    (source / "word_counter.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PYPROJECT)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    broken = target / "broken_plugin-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[media_tasks.capabilities]\nhalf-done = broken_plugin\n")
    (target / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    return target


@pytest.fixture(scope="module")
def deployment(module_server_dir, site, tmp_path_factory):
    path = os.pathsep.join([str(REPOSITORY), str(site)])
    with deployed(module_server_dir, tmp_path_factory.mktemp("deployment"), {"PYTHONPATH": path}) as deployment:
        deployment.start_worker("--concurrency=1")
        yield deployment


@pytest.fixture
def celery(deployment, tmp_path):
    def run(*args):
        env = without_settings(os.environ) | {name: str(value) for name, value in deployment.env.items()}
        command = [sys.executable, "-m", "celery", "-A", "tasks", *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_the_capability_has_its_queue_at_a_worker(deployment):
    (worker,) = deployment.app.live_workers()

    assert "count_words" in worker["capabilities"]
    assert "image_resize" in worker["capabilities"]


def test_its_command_is_made_from_its_declaration(celery):
    shown = celery("submit", "count_words", "--help").stdout

    assert "Count the words of a text." in shown
    assert "--twice" in shown
    assert "TEXT" in shown


def test_a_job_of_it_goes_through_its_queue_and_has_its_row(deployment, celery):
    done = celery("submit", "count_words", "one two three", "--twice", "--wait")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"words": 6}
    (row,) = deployment.app.store.jobs(task_type="count_words")
    assert (row["status"], row["queue"]) == ("completed", "count_words")
    assert row["parameters"] == {"text": "one two three", "twice": True}
    assert deployment.events(row["job_id"]) == ["created", "claimed", "started", "completed"]


def test_a_producer_imports_it_by_its_name(deployment):
    env = without_settings(os.environ) | {name: str(value) for name, value in deployment.env.items()}
    code = "from tasks import count_words; print(count_words.delay('one two').get(timeout=20))"

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert done.stdout == "{'words': 2}\n", done.stderr


def test_its_arguments_are_checked_at_the_call(celery):
    done = celery("submit", "count_words")

    assert done.returncode == 2
    assert "TEXT" in done.stderr


def test_a_broken_plug_in_is_named_in_the_log_and_left_out(deployment):
    log = deployment.workers[0].log()

    assert "'half-done' of broken-plugin is left out" in log
    assert "a_module_that_is_not_there" in log
    assert deployment.workers[0].is_alive()


def test_a_broken_plug_in_does_not_disturb_a_producer(deployment, celery):
    done = celery("submit", "--help")

    assert done.returncode == 0
    assert "count_words" in done.stdout
