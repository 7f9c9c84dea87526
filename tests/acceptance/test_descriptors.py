"""What a failed image job held is free when it has ended: descriptors of its process, space on its disk."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import pyvips

from tests.tooling.processes import HAS_PROC
from tests.tooling.waiting import eventually

FAILURES = 30
OWN_AFFAIRS = 6  # connections and log files that a process may have opened meanwhile

pytestmark = pytest.mark.skipif(not HAS_PROC, reason="descriptors are counted in /proc")


@pytest.fixture
def noise(tmp_path):
    path = tmp_path / "noise.jpg"
    pyvips.Image.gaussnoise(900, 900).cast("uchar").jpegsave(str(path))
    return path


@pytest.fixture
def corrupt(noise):
    """Good until its pixels are decoded."""
    path = noise.with_name("corrupt.jpg")
    path.write_bytes(noise.read_bytes()[:60_000])
    return path


@pytest.fixture(params=["prefork", "threads"])
def worker_pid(request, own, task, noise):
    """The one process of a worker that runs jobs, when it has run one."""
    worker = own.start_worker("--pool", request.param, "--concurrency=1")
    task.image_resize.delay(noise, noise.with_name("warm.webp"), width=10).get(timeout=20)
    return worker.child_pids()[0] if request.param == "prefork" else worker.pid


def opened(pid: int) -> list[str]:
    """What the descriptors of a process lead to."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(str(descriptor.readlink()))
    return found


def test_corrupt_inputs_leave_no_descriptor_open(worker_pid, own, task, corrupt, tmp_path):
    before = opened(worker_pid)

    jobs = [task.image_resize.delay(corrupt, tmp_path / "out.webp", width=100) for _ in range(FAILURES)]
    for job in jobs:
        assert own.wait_for(job, "failed")["error_type"] == "CorruptMedia"

    after = opened(worker_pid)
    assert [path for path in after if path.startswith(str(tmp_path)) and (".part" in path or ".jpg" in path)] == []
    assert len(after) <= len(before) + OWN_AFFAIRS


def test_a_full_disk_has_its_space_back_before_the_retry(small_disk, worker_pid, own, task, noise):
    free = os.statvfs(small_disk).f_bfree

    job = task.image_resize.delay(noise, small_disk / "out.png", width=1800, enlarge=True)
    eventually(lambda: "retry" in own.events(job), 20)

    assert own.row(job)["error_type"] == "DiskFull"
    assert os.statvfs(small_disk).f_bfree == free
    assert [path for path in opened(worker_pid) if path.startswith(str(small_disk))] == []
