import errno
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tasks.errors import AttemptDisturbed, AttemptLost, DiskFull, OutputNotWritable
from tasks.media.output import TEMP_PREFIX, atomic_outputs, raise_for_write_error, temp_files_of, token_in
from tests.media.conftest import files_under


def test_an_output_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "out.bin"
    with atomic_outputs([str(target)], token="job-1") as (staged,):
        os.write(staged.fd, b"half")
        assert not target.exists()
        assert staged.temp.parent == tmp_path
        assert staged.temp.name.startswith(".")
        os.write(staged.fd, b" and half")
    assert target.read_bytes() == b"half and half"
    assert files_under(tmp_path) == {"out.bin"}


def test_an_output_that_exists_is_replaced_in_one_step(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with atomic_outputs([str(target)]) as (staged,):
        os.write(staged.fd, b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_missing_directories_are_made(tmp_path):
    with atomic_outputs([str(tmp_path / "a" / "b" / "out.bin")]) as (staged,):
        os.write(staged.fd, b"x")
    assert (tmp_path / "a" / "b" / "out.bin").read_bytes() == b"x"


def test_an_output_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_outputs([str(tmp_path / "out.bin")]):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.bin").stat().st_mode) == 0o640


def test_an_error_leaves_the_old_output_and_no_temp_file(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_outputs([str(target)]) as (staged,):
            os.write(staged.fd, b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert target.read_bytes() == b"old"
    assert files_under(tmp_path) == {"out.bin"}


def test_an_attempt_that_lost_its_job_writes_none_of_its_outputs(tmp_path):
    asked = []

    def confirm() -> None:
        asked.append(files_under(tmp_path))
        raise AttemptLost("another worker has it")

    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(AttemptLost), atomic_outputs(paths, token="t", confirm=confirm) as outputs:
        os.write(outputs[1].fd, b"x")

    assert len(asked) == 1
    assert all(name.startswith(TEMP_PREFIX) for name in asked[0])
    assert files_under(tmp_path) == set()


def test_the_temp_files_of_a_killed_attempt_can_be_found_by_its_token(tmp_path):
    code = (
        "import os, sys\n"
        "from tasks.media.output import atomic_outputs\n"
        "with atomic_outputs([sys.argv[1] + '/a', sys.argv[1] + '/b'], token='job-1.2'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([os.sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    with atomic_outputs([str(tmp_path / "c")], token="job-1.20"):
        found = temp_files_of("job-1.2", tmp_path)
        assert len(found) == 2
        assert len(temp_files_of("job-1.*", tmp_path)) == 3, "those of all attempts"
        assert temp_files_of("job-1", tmp_path) == []
        assert {token_in(path) for path in found} == {"job-1.2"}
    assert files_under(tmp_path) == {path.name for path in found} | {"c"}


def test_a_file_in_place_of_a_directory_is_reported_with_path_and_remedy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "out.bin", tmp_path / "file" / "deeper" / "out.bin"):
        message = r"can't be written: a file stands where its directory should be; move that away, or write elsewhere$"
        with pytest.raises(OutputNotWritable, match=message) as refused, atomic_outputs([str(path)]):
            pytest.fail("the block must not run")
        assert str(path) in str(refused.value)


def test_a_directory_that_vanishes_meanwhile_is_reported_with_what_helps(tmp_path):
    said = r"out\.bin can't be written: its directory is not there; keep it while the job runs, or write elsewhere$"
    with pytest.raises(OutputNotWritable, match=said), atomic_outputs([str(tmp_path / "gone" / "out.bin")]):
        shutil.rmtree(tmp_path / "gone")


def test_a_directory_that_takes_no_files_is_reported_in_the_systems_words(tmp_path):
    """As root hears it of /proc."""
    said = r"out\.bin can't be written: No such file or directory; choose a directory in which files can be made"
    with pytest.raises(OutputNotWritable, match=said):
        raise_for_write_error(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), tmp_path / "out.bin")


def test_a_temp_file_that_somebody_removes_is_written_anew_by_the_next_attempt(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    with pytest.raises(AttemptDisturbed, match=str(target)), atomic_outputs([str(target)]) as (staged,):
        staged.temp.unlink()

    assert target.read_bytes() == b"old"


def test_a_directory_in_place_of_the_output_is_reported_before_any_work(tmp_path):
    said = f"{tmp_path} can't be written: it is a directory, not a regular file; name a file in it, or write elsewhere"
    with pytest.raises(OutputNotWritable, match=said), atomic_outputs([str(tmp_path)]):
        pytest.fail("the block must not run")


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, Path("/dev/null").stat().st_rdev)
    except PermissionError:
        path.symlink_to("/dev/null")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (_device, "a device"),
        (os.mkfifo, "a pipe"),
        (_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
    ],
)
def test_a_device_a_pipe_and_a_socket_are_never_replaced(monkeypatch, tmp_path, make, what):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(Path("special"))
    before = (tmp_path / "special").lstat()

    said = f"{tmp_path}/special can't be written: it is {what}, not a regular file; write elsewhere"
    with pytest.raises(OutputNotWritable, match=said), atomic_outputs([str(tmp_path / "special")]):
        pytest.fail("the block must not run")

    assert os.path.samestat((tmp_path / "special").lstat(), before)
    assert files_under(tmp_path) == {"special"}


@pytest.mark.parametrize("target", ["nowhere", "link", "file/below"])
def test_a_link_to_nothing_is_replaced(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(target)

    with atomic_outputs([str(tmp_path / "link")]) as (staged,):
        os.write(staged.fd, b"x")

    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"x"


def test_a_name_that_is_too_long_is_to_be_shorter(tmp_path):
    said = r"x\.png can't be written: File name too long; give it a shorter name, or write elsewhere"
    with pytest.raises(OutputNotWritable, match=said), atomic_outputs([str(tmp_path / f"{'x' * 252}.png")]):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EACCES, OutputNotWritable),
        (errno.EROFS, OutputNotWritable),
    ],
)
def test_what_the_disk_says_decides_whether_trying_again_helps(tmp_path, monkeypatch, code, error):
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(error, match=str(tmp_path / "out.bin")), atomic_outputs([str(tmp_path / "out.bin")]):
        monkeypatch.setattr(os, "fsync", fail)
    assert files_under(tmp_path) == set()
