"""The processes that a pool child has started: encoders, say. In: a process id. Out: they are gone, whatever session
they are in. A pool child that is killed can't end them itself.
"""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found, unseen = [], [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def kill_descendants(pid: int) -> None:
    """End them with SIGKILL. Stopped first, none can start another one meanwhile."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for descendant in descendants(pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(descendant, signum)


def _parents() -> list[tuple[int, int]]:
    """(process, its parent) of all: proc_pid_stat(5), or what ps says."""
    if not _PROC.joinpath("self/stat").exists():
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=False)  # noqa: S607
        return [(int(pid), int(parent)) for pid, parent in map(str.split, listed.stdout.splitlines())]
    pairs = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                pairs.append((int(entry.name), int(fields[1])))
    return pairs
