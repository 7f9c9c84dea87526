"""Who is alive: a lease is a locked file that the kernel lets go at any death, kill -9 included.

In: a directory. Out: `Lease`, whose `name` may be written down as the owner of something, and `is_held`, which tells
from any process of the host whether that owner still lives. A long task is not a dead one; `silent_s` tells of an owner
that is stopped, by the kernel's own clock, which nobody sets.
"""

import fcntl
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_leases: "weakref.WeakSet[Lease]" = weakref.WeakSet()


class Lease:
    """A `flock` on a file with a unique name, held by this process until `release` or death.

    Names are never used again (process ids are: in containers all are alike). Children that are forked close their
    copy of the descriptor, otherwise they would keep the lease of a dead parent alive.

    Raises:
        OSError: the directory can't be made or written.
    """

    def __init__(self, directory: Path, *, prefix: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.name = f"{prefix}{uuid4().hex}"
        self.path = directory / self.name
        unlocked = self.path.with_suffix(".new")
        self._fd: int | None = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(self.path)  # so that nobody sees the file before it is locked
        _leases.add(self)

    @property
    def is_held(self) -> bool:
        """False once released, and in a child that was forked meanwhile."""
        return self._fd is not None

    def touch(self) -> None:
        """Note in the file that the owner goes on. Does nothing where the lease is not held, or the disk is full."""
        if self._fd is not None:
            with suppress(OSError):
                os.pwrite(self._fd, f"{time.monotonic():020.3f}".encode(), 0)

    def release(self) -> None:
        """Let go and remove the file. Does nothing where the lease is not held."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def is_held(path: Path) -> bool:
    """Tell whether a living process of this host holds the lease at `path`; a missing file is held by nobody."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def silent_s(path: Path) -> float:
    """For how many seconds the owner of the lease at `path` has not touched it; 0 where it never has."""
    try:
        return time.monotonic() - float(path.read_bytes())
    except (OSError, ValueError):
        return 0.0


def _forget_inherited() -> None:
    for lease in list(_leases):
        lease._close()


os.register_at_fork(after_in_child=_forget_inherited)
