"""Attempts that are taken for dead and go on: who has taken the job over completes it, and they change nothing."""

import os
import signal
import time

import pytest
import pyvips

from tests.acceptance.deployment import REPOSITORY, install_entry_point, lines
from tests.tooling import processes
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

TAKEN_OVER = ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
STOPPED_AFTER_S = 60  # tasks.leases
GET = {"timeout": 60}
# Loaded by workers as a plug-in. The first attempt at a picture waits before it opens its output, so that nobody can
# remove its temp file, and tells no progress, which would stop it: only `confirm()` is left to do so.
HELD_BACK = """\
import os
import time
from pathlib import Path

import tests.acceptance.capabilities
from tasks import images

hooks_of = images._hooks


def held_back(job):
    hooks, folder = hooks_of(job), Path(os.environ["HELD_BACK_IN"])
    try:
        (folder / "waits").touch(exist_ok=False)
    except FileExistsError:
        return hooks
    while not (folder / "goes-on").exists():
        time.sleep(0.02)
    return hooks | {"progress": None}


images._hooks = held_back
"""


@pytest.fixture
def own(own_on_broker):
    return own_on_broker


@pytest.fixture
def start(own, tmp_path):
    """Start a worker for pictures, in which the first attempt of all waits."""
    site = install_entry_point(tmp_path / "site", "held_back")
    (site / "held_back.py").write_text(HELD_BACK)
    path = os.pathsep.join([str(REPOSITORY), str(site)])

    def start(concurrency):
        env = {"PYTHONPATH": path, "HELD_BACK_IN": tmp_path}
        return own.start_worker(f"--concurrency={concurrency}", "-Q", "image_resize", env=env)

    return start


@pytest.fixture
def job(task, tmp_path):
    """A resize of a picture; submitted, not begun."""
    pyvips.Image.gaussnoise(600, 400).cast("uchar").pngsave(str(tmp_path / "in.png"))
    return task.image_resize.delay(tmp_path / "in.png", tmp_path / "out" / "out.png", width=300)


def waits(tmp_path):
    eventually((tmp_path / "waits").exists, 30, "the first attempt begins")


def temp_files(folder):
    return list(folder.glob(".media-tasks-*"))


def identity(file):
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def test_a_zombie_leaves_the_output_of_its_successor_alone(own, start, job, tmp_path):
    worker = start(2)
    waits(tmp_path)
    row = own.wait_for(job, "running")

    # As the reconciler does with an attempt whose holder is silent, while this one in truth goes on.
    own.app.store.close(job.id, row["attempt"], reason="taken for dead")
    assert job.get(**GET)["width"] == 300
    written = identity(tmp_path / "out" / "out.png")
    (tmp_path / "goes-on").touch()

    worker.wait_for_log(f"image_resize[{job.id}]: attempt {row['attempt']} no longer owns the job", 30)
    assert identity(tmp_path / "out" / "out.png") == written
    assert own.events(job) == TAKEN_OVER
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.png"]


@pytest.mark.parametrize("end", ["its hard time limit strikes", "its process dies"])
@pytest.mark.parametrize("broker", ["embedded"], indirect=True)
def test_the_end_of_a_zombie_leaves_what_its_successor_writes_alone(own, task, tmp_path, end):
    for _ in range(2):
        own.start_worker("--concurrency=1", "-Q", "write_in_the_end")
    limit = {"time_limit": 10} if "limit" in end else {}
    job = task.write_in_the_end.apply_async((tmp_path / "out",), **limit)
    (first,) = eventually(lambda: temp_files(tmp_path), 10)
    (zombie_pid,) = map(int, lines(tmp_path / "out.pids"))

    if limit:
        time.sleep(4.0)  # so much later the limit strikes the successor
    assert own.app.store.close(job.id, own.row(job)["attempt"], reason="taken for dead")
    (later,) = eventually(lambda: [path for path in temp_files(tmp_path) if path != first], 4)
    if not limit:
        os.kill(zombie_pid, signal.SIGKILL)
    eventually(lambda: not processes.is_running(zombie_pid), 10)
    eventually(lambda: not first.exists(), 3)
    assert later.exists(), "it is over before its successor is"
    (tmp_path / "out.goes-on").touch()

    assert job.get(**GET) == own.row(job)["attempt"] == 3
    assert (tmp_path / "out").read_text() == "whole"
    assert own.events(job) == TAKEN_OVER
    assert temp_files(tmp_path) == []


@pytest.mark.parametrize("broker", ["embedded", "rabbitmq"], indirect=True)
def test_a_worker_that_is_stopped_for_long_and_continued_changes_nothing(own, start, job, tmp_path):
    zombie = start(1)
    waits(tmp_path)
    row = own.wait_for(job, "running")
    everyone = [zombie.pid, *zombie.child_pids()]

    processes.send(everyone, signal.SIGSTOP)
    start(1)
    successor = own.wait_for(job, "completed", timeout_s=STOPPED_AFTER_S + 60)
    written = identity(tmp_path / "out" / "out.png")
    (tmp_path / "goes-on").touch()
    processes.send(everyone, signal.SIGCONT)

    zombie.wait_for_log(f"image_resize[{job.id}]: attempt {row['attempt']} no longer owns the job", 30)
    assert identity(tmp_path / "out" / "out.png") == written
    assert own.events(job) == TAKEN_OVER
    assert (row["claimed_by"], successor["claimed_by"], successor["deaths"]) == ("w1", "w2", 1)
    assert dict(own.row(job)) == dict(successor)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.png"]
    eventually(lambda: len(own.app.live_workers()) == 2, 30)  # it serves again
