"""Atomic outputs: target paths in, open temp files out; all of them appear complete, or none does.

A temp file lies hidden in its target's directory (a rename must not cross file systems) and carries a token, so that
those of an attempt that was killed can be found and deleted.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import AttemptDisturbed, DiskFull, OutputNotWritable
from tasks.media.sniff import kind_of

TEMP_PREFIX = ".media-tasks-"
TEMP_SUFFIX = ".part"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = ("a file stands where its directory should be", "move that away")
_WRITABLE = "make its directory writable for the worker"
# {errno: (what is said, where the system's words don't fit; what helps)}
_NOT_WRITABLE = {
    errno.EACCES: ("", _WRITABLE),
    errno.ENOENT: ("its directory is not there", "keep it while the job runs"),  # it was made before
    errno.EPERM: ("", _WRITABLE),
    errno.EROFS: ("", _WRITABLE),
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: ("", "name a file in it"),
    errno.EEXIST: _IN_THE_WAY,
    errno.ENAMETOOLONG: ("", "give it a shorter name"),
    errno.ELOOP: ("", "mend the links on its way"),
    errno.EFBIG: ("", "raise the limit on the size of files"),
}


@dataclass(frozen=True)
class Staged:
    """An output that is being written: `fd` is open for reading and writing on the temp file."""

    path: Path
    temp: Path
    fd: int


@contextmanager
def atomic_outputs(
    paths: Sequence[str], *, token: str | None = None, confirm: Callable[[], None] | None = None
) -> Iterator[list[Staged]]:
    """Open one temp file per path; when the block ends well, sync them and rename each to its path.

    Missing directories are made. `confirm` is called once, after everything is on disk and before the first rename;
    what it raises (the attempt lost its job) leaves nothing behind. A kill leaves temp files that `temp_files_of`
    finds, and between two renames of a set the first ones; a second run replaces them with the same bytes.

    Raises:
        DiskFull: no space left, or over quota; transient.
        AttemptDisturbed: somebody has removed a temp file meanwhile; transient.
        OutputNotWritable: something stands in the way that is no regular file, or writing is not allowed.
    """
    token = token or secrets.token_hex(8)
    staged: list[Staged] = []
    try:
        for path in paths:
            with _reported(path):
                staged.append(_stage(Path(path), token))
        yield staged
        for output in staged:
            with _reported(output.path):
                os.fsync(output.fd)
        if confirm is not None:
            confirm()
        for output in staged:
            with _reported(output.path):
                _show(output)
        for directory in {output.path.parent for output in staged}:
            _sync_directory(directory)
    finally:
        for output in staged:
            os.close(output.fd)
            with suppress(OSError):
                output.temp.unlink(missing_ok=True)


def temp_files_of(token: str, directory: str | Path) -> list[Path]:
    """The temp files in `directory` of the attempt that wrote with this token; `*` in it stands for anything."""
    return sorted(Path(directory).glob(f"{TEMP_PREFIX}{token}-*{TEMP_SUFFIX}"))


def token_in(temp_file: Path) -> str:
    """The token in the name of a temp file."""
    return temp_file.name.removeprefix(TEMP_PREFIX).rpartition("-")[0]


def raise_for_write_error(exc: OSError, path: str | Path) -> None:
    """Raise the error that an `OSError` met while writing `path` stands for; return when it is none of them."""
    if exc.errno in _FULL:
        raise DiskFull(f"{path}: {exc.strerror} while writing; free space there, or write elsewhere") from exc
    if exc.errno in _NOT_WRITABLE:
        cause, remedy = _NOT_WRITABLE[exc.errno]
        if exc.errno == errno.ENOENT and Path(path).parent.is_dir():  # as in /proc
            cause, remedy = "", "choose a directory in which files can be made"
        said = f"{path} can't be written: {cause or exc.strerror}"
        raise OutputNotWritable(f"{said}; {remedy}, or write elsewhere") from exc


@contextmanager
def _reported(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise_for_write_error(exc, path)
        raise


def _stage(path: Path, token: str) -> Staged:
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_special(path)
    temp = path.with_name(f"{TEMP_PREFIX}{token}-{secrets.token_hex(4)}{TEMP_SUFFIX}")
    fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask decides, as for any file
    return Staged(path, temp, fd)


def _show(output: Staged) -> None:
    """Rename it to its path; the last step, so that a temp file that is gone leaves nothing behind."""
    try:
        output.temp.replace(output.path)
    except FileNotFoundError as exc:
        if not output.path.parent.is_dir():
            raise
        raise AttemptDisturbed(
            f"{output.path}: somebody has removed its temp file {output.temp.name} before it was complete; leave such "
            "files to the workers"
        ) from exc


def _refuse_special(path: Path) -> None:
    """Refuse what a rename would fail on, or destroy: a directory, a device, a pipe, a socket, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # nothing, or a link to nothing
            return
        raise
    if not stat.S_ISREG(mode):
        remedy = "name a file in it, or write elsewhere" if stat.S_ISDIR(mode) else "write elsewhere"
        raise OutputNotWritable(f"{path} can't be written: it is {kind_of(mode)}, not a regular file; {remedy}")


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
