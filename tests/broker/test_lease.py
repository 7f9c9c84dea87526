"""A lease says whether its holder lives, whatever the holder's death looked like."""

import errno
import os
import signal
import subprocess
import sys

from tasks.broker.lease import Lease, is_held
from tests.tooling.waiting import eventually

HOLD = """
import os, sys, time
from pathlib import Path
from tasks.broker.lease import Lease
lease = Lease(Path(sys.argv[1]))
child = os.fork() if sys.argv[2] == "fork" else 0
if child or sys.argv[2] != "fork":
    print(lease.name, child, flush=True)
time.sleep(60)
"""


def hold(directory, mode):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), mode], stdout=subprocess.PIPE, text=True, close_fds=True
    )
    name, child = process.stdout.readline().split()
    process.stdout.close()
    return process, directory / name, int(child)


def test_a_lease_is_held_until_it_is_released(tmp_path):
    lease = Lease(tmp_path / "own")

    assert is_held(lease.path)
    lease.release()
    assert not is_held(lease.path)
    assert not lease.is_held
    assert list((tmp_path / "own").iterdir()) == []


def test_nobody_holds_a_lease_that_never_was(tmp_path):
    assert not is_held(tmp_path / "missing")


def test_kill_9_ends_a_lease_that_another_process_held(tmp_path):
    process, path, _ = hold(tmp_path, "alone")
    assert is_held(path)

    process.kill()
    process.wait()

    assert path.exists()
    assert not is_held(path)


def test_a_forked_child_does_not_keep_a_dead_parents_lease(tmp_path):
    process, path, child = hold(tmp_path, "fork")
    assert is_held(path)

    process.kill()
    process.wait()

    try:
        os.kill(child, 0)  # it lives
        eventually(lambda: not is_held(path), 2)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lease_is_kept_where_a_full_disk_takes_no_note_of_it(tmp_path, monkeypatch):
    lease = Lease(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    lease.touch()

    assert is_held(lease.path)
    lease.release()
