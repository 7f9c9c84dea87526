"""The processes of this machine: who descends from whom, who carries a mark in its environment, who is still there.

Reads /proc where there is one and asks `ps` elsewhere (there, marks can't be read).
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
HAS_PROC = (PROC / "self" / "stat").exists()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return pid in _parents()


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a living process, in no particular order."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    frontier = [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


def marked(mark: str) -> list[int]:
    """Processes that were started with `mark` ("NAME=value") in their environment, however far down and in
    whatever session. Empty where there is no /proc.
    """
    if not HAS_PROC:
        return []
    wanted = mark.encode()
    found = []
    for pid in _parents():
        with contextlib.suppress(OSError):
            if wanted in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def command_line(pid: int) -> str:
    """The command of a process for a message; empty when it is gone."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def send(pids: Iterable[int], signum: signal.Signals) -> None:
    """Signal processes; those that are gone by now don't matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _parents() -> dict[int, int]:
    """pid -> parent's pid of everything that is no zombie."""
    if not HAS_PROC:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True)
        rows = [line.split() for line in listing.stdout.splitlines()]
        return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}
    parents = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # "pid (comm) state ppid ...": comm may hold blanks and parentheses.
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    return parents
