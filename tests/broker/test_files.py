"""The file system below a path and the file behind it, as the kernel tells them."""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tasks.broker.files import NETWORK_FILE_SYSTEMS, file_system_of, identity, set_patiently, type_of

# A mount below another, hidden by one above it; optional fields, none, and blanks in a path and a source.
MOUNTS = (
    "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
    "30 22 0:41 / /mnt/share rw shared:9 master:2 - nfs4 server:/export rw,vers=4.2\n"
    "31 30 0:42 / /mnt/share/local rw - tmpfs tmpfs rw\n"
    "32 22 0:43 / /mnt/with\\040blank rw - cifs //server/x\\040y rw\n"
    "33 22 254:16 / /srv rw - ext4 /dev/vdb rw\n"
    "34 33 0:44 / /srv rw - fuse.sshfs me@host: rw\n"
    "35 22 254:32 /@home /mnt rw - btrfs /dev/vdc rw,subvol=/@home\n"
)


@pytest.mark.parametrize(
    ("major", "minor", "kind"),
    [
        (254, 1, "ext4"),
        (0, 41, "nfs4"),
        (0, 42, "tmpfs"),
        (0, 43, "cifs"),
        (254, 16, "ext4"),
        (0, 44, "fuse.sshfs"),
        (254, 32, "btrfs"),
    ],
)
def test_a_device_has_the_type_that_its_mount_has(major, minor, kind):
    assert type_of(os.makedev(major, minor), MOUNTS) == kind


@pytest.mark.parametrize(("major", "minor"), [(0, 4), (0, 410), (54, 1), (25, 41)])
def test_a_device_that_no_mount_names_has_no_type(major, minor):
    assert type_of(os.makedev(major, minor), MOUNTS) == ""
    assert type_of(os.makedev(major, minor), "") == ""


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="mounts are read from /proc")
def test_the_file_system_is_that_of_the_directory_behind_all_links(tmp_path):
    (tmp_path / "link").symlink_to("/proc/self")

    assert file_system_of(Path("/proc")) == "proc"
    assert file_system_of(tmp_path / "link") == "proc"
    assert file_system_of(tmp_path) not in {"proc"} | NETWORK_FILE_SYSTEMS


def test_a_directory_that_is_missing_can_not_be_asked(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_system_of(tmp_path / "missing")


def test_a_file_that_is_replaced_or_removed_is_another(tmp_path):
    path = tmp_path / "file"
    path.touch()
    first = identity(path)
    with path.open():  # its number is not given away again
        assert identity(path) == first
        path.unlink()
        gone = identity(path)
        path.touch()

        assert gone == (0, 0)
        assert identity(path) not in (first, gone)


def test_what_can_not_be_reached_is_no_file(tmp_path):
    (tmp_path / "file").touch()

    assert identity(tmp_path / "file" / "below") == (0, 0)


def test_a_pragma_that_finds_the_file_locked_is_tried_until_the_deadline(tmp_path):
    with (
        closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None, timeout=0)) as holder,
        closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None, timeout=0)) as late,
    ):
        holder.execute("CREATE TABLE t (id)")
        holder.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            set_patiently(late, "journal_mode=WAL", began + 0.2)
        waited_s = time.monotonic() - began
        holder.execute("COMMIT")

        set_patiently(late, "journal_mode=WAL", time.monotonic())

        assert late.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert 0.2 <= waited_s < 5


def test_any_other_error_of_a_pragma_is_no_reason_to_wait(tmp_path):
    (tmp_path / "text.db").write_text("Dear diary, " * 100)

    with (
        closing(sqlite3.connect(tmp_path / "text.db")) as connection,
        pytest.raises(sqlite3.DatabaseError, match="not a database"),
    ):
        set_patiently(connection, "journal_mode=WAL", time.monotonic() + 60)
