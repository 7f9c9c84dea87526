"""What SQLite files need that several processes share, the broker's and the job table's. The standard library only.

In: a path, or an open connection. Out: the file system below it, the file behind it, a pragma that is set.
"""

import os
import sqlite3
import time
from pathlib import Path
from typing import Final

# Locks and shared memory do not hold between hosts: sqlite.org/wal.html, sqlite.org/faq.html#q5
NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "ncpfs"}
    | {"nfs", "nfs4", "smb3", "smbfs"}
)
_TRY_AGAIN_AFTER_S: Final = 0.01


def file_system_of(directory: Path) -> str:
    """The type of the file system that holds a directory; '' where that is not known: no Linux, or no /proc.

    Raises:
        OSError: The directory can't be asked.
    """
    device = directory.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ""
    return type_of(device, mounts)


def type_of(device: int, mounts: str) -> str:
    """The type of a mounted device, by the text of proc_pid_mountinfo(5); '' if it is not there.

    The kernel says which device a directory is on, whatever is mounted above or below it. A subvolume of btrfs has a
    device of its own that no mount names.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for mount in mounts.splitlines():
        fields, _, source = mount.partition(" - ")
        if fields.split(" ")[2] == number:
            return source.split(" ", 1)[0]
    return ""


def identity(path: Path) -> tuple[int, int]:
    """Tells a file from another one at the same path, while it is open; (0, 0) if nothing can be seen there."""
    try:
        status = os.stat(path)  # noqa: PTH116 (called for each transaction, and half as dear as Path.stat)
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)


def set_patiently(connection: sqlite3.Connection, pragma: str, deadline: float) -> None:
    """Set a pragma, such as `journal_mode=WAL`, trying again until `deadline` (of `time.monotonic`).

    Processes that switch a new file to WAL at once: SQLite doesn't wait there, whatever its timeout.

    Raises:
        sqlite3.OperationalError: Still locked at the deadline, or anything else at once.
    """
    while True:
        try:
            connection.execute(f"PRAGMA {pragma}").close()
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_TRY_AGAIN_AFTER_S)
