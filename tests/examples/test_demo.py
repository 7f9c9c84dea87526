"""`make demo`: a newcomer sees real jobs, the reason of the one that fails, and nothing is left running."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import termios
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.tooling import processes
from tests.tooling.waiting import eventually

BY = "\N{MULTIPLICATION SIGN}"
REPOSITORY = Path(__file__).resolve().parents[2]


def named(output: str, label: str) -> Path:
    """The path that the demo prints behind a label."""
    return Path(re.search(rf"^  {label} +(\S+)$", output, re.MULTILINE)[1])


def row_of(output: str, name: str) -> str:
    """The line of the table of outputs that begins with this input."""
    return next(line for line in output.splitlines() if line.startswith(f"  {name} "))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def noise(path: Path, size: tuple[int, int] = (320, 240)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 40).convert("RGB").save(path)
    return path


def worker_of(demo: subprocess.Popen) -> int:
    """The main process of the demo's worker."""

    def found():
        children = processes.descendants(demo.pid)
        return [pid for pid in children if " worker " in processes.command_line(pid)]

    return eventually(found, 20)[0]


def test_a_newcomer_sees_every_photo_and_why_the_broken_one_failed(finish, tmp_path):
    # When the demo runs with the settings of a host that has servers of its own
    code, output = finish(
        "demo.py", env={"CELERY_BROKER_URL": "amqp://127.0.0.1:1//", "DATABASE_URL": "postgresql://127.0.0.1:1/x"}
    )

    # Then it succeeds, and shows each file with what became of it
    assert code == 0, output
    photos = {"landscape.jpg", "orientation-6.jpg", "cmyk.jpg", "alpha.png", "16-bit.png", "animation.gif"}
    for name in photos:
        assert "failed" not in row_of(output, name)
    columns = rf"800{BY}600 +\d+ kB +\d+\.\d\d s +4000{BY}3000 +.* 4 to 1200{BY}900 "
    assert re.search(columns, row_of(output, "landscape.jpg"))
    assert f"{BY}12 " in row_of(output, "animation.gif")
    assert row_of(output, "broken-cut-off.jpg").count("✗ failed") == 3
    assert re.search(r"✗ broken-cut-off.jpg can't be decoded as jpeg.*; upload it again", output)
    assert re.search(r"33 jobs in \d+\.\d s: 30 completed, 3 failed for good", output)

    # And the outputs are where it says
    resized = named(output, "Outputs") / "orientation-6.jpg" / "resized.avif"
    with Image.open(resized) as image:
        assert image.size == (800, 600)
    assert len(list((named(output, "Outputs") / "alpha.png" / "renditions").iterdir())) == 4
    assert not (named(output, "Outputs") / "broken-cut-off.jpg" / "resized.avif").exists()

    # And the job table holds every job, also for the command that it prints
    with closing(sqlite3.connect(named(output, "Job table"))) as table:
        counts = dict(table.execute("SELECT status, count(*) FROM task_queue GROUP BY status"))
        assert counts == {"completed": 30, "failed": 3}
    command = re.search(r"^  Look into it +(.*)$", output, re.MULTILINE)[1]
    looked = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S602
    assert looked.stdout.count("completed") == 30
    assert "SecurityWarning" not in named(output, "Worker's log").read_text()


def test_the_folder_of_a_user_may_hold_anything_and_stays_as_it_is(finish, tmp_path):
    # Given a folder with photos in folders, and with what else lies around
    folder = tmp_path / "my photos [2026]"
    noise(folder / "beach.jpg")
    noise(folder / "beach.png")
    noise(folder / "trip" / "café ☀.JPG")
    noise(folder / "trip" / "[red]new\nline\x1b[2J.png")
    noise(folder / "no suffix.jpg").rename(folder / "no suffix")
    noise(folder / ".hidden" / "secret.jpg")
    (folder / "notes.txt").write_text("buy milk")
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no photo")
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "huge.jpg").open("wb") as huge:
        huge.write((folder / "beach.jpg").read_bytes()[:500])
        huge.truncate(5 * 2**30)
    with contextlib.suppress(OSError):  # not every file system takes such a name
        shutil.copy(folder / "beach.jpg", os.fsencode(folder) + b"/latin-\xe9.jpg")
    before = snapshot(folder)

    # When
    code, output = finish("demo.py", "--input", folder)

    # Then images are done, what only looks like one is shown as failed, and the rest is left out
    assert code == 0, output
    for name in ("beach.jpg", "beach.png", "trip/café ☀.JPG", r"trip/[red]new\nline\x1b[2J.png"):
        assert f"320{BY}240" in row_of(output, name), output
    for name in ("empty.jpg", "text.jpg", "huge.jpg"):
        assert row_of(output, name).count("✗ failed") == 3
    assert "✗ empty.jpg is empty (0 bytes)" in output
    assert "✗ huge.jpg has 5,368,709,120 bytes; the limit is" in output
    assert "and left out 4 other files" in output
    for name in ("secret.jpg", "folder.jpg", "circle/"):
        assert name not in output
    assert "\x1b" not in output

    # And nothing in the folder has changed
    assert snapshot(folder) == before
    outputs = named(output, "Outputs")
    assert not outputs.is_relative_to(folder)
    assert (outputs / "beach.jpg" / "resized.avif").stat().st_size > 0
    assert (outputs / "beach.png" / "resized.avif").stat().st_size > 0


def test_a_large_folder_is_cut_short_and_a_server_directory_that_is_given_is_used(finish, tmp_path):
    for number in range(5):
        noise(tmp_path / "in" / f"{number}.jpg", (80, 60))
    server_dir = tmp_path / "a server"

    code, output = finish("demo.py", "--input", "in", "--limit", 2, env={"CL_SERVER_DIR": server_dir})

    assert code == 0, output
    assert "took the first 2 images of" in output
    assert "6 jobs in " in output
    assert (server_dir / "media_store.db").exists()
    assert f"CL_SERVER_DIR='{server_dir}' " in output
    assert [path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith("media-tasks-demo")] == []


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--input", "nowhere"], {}, "nowhere does not exist"),
        (["--input", "bare"], {}, "bare holds no image; looked for .avif"),
        (["--input", "in"], {"CL_SERVER_DIR": "in/server"}, "where nothing is to be written"),
        (["--input", "in"], {"CL_SERVER_DIR": "in/a.jpg/server"}, "CL_SERVER_DIR"),
        (["--input", "in"], {"MAX_PIXELS": "many"}, "MAX_PIXELS='many' is not a whole number"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(finish, tmp_path, arguments, env, said):
    (tmp_path / "bare").mkdir()
    noise(tmp_path / "in" / "a.jpg")

    code, output = finish("demo.py", *arguments, env=env)

    assert code == 1
    assert "The demo failed: " in output
    assert said in output
    assert "Traceback" not in output.split("ends with:")[0]
    assert not (tmp_path / "in" / "server").exists()


def test_the_death_of_its_worker_ends_the_demo_with_the_end_of_the_log(start, tmp_path):
    for number in range(24):
        noise(tmp_path / "in" / f"{number}.jpg", (2400, 1800))
    demo = start("demo.py", "--input", "in")
    worker = worker_of(demo)
    for line in demo.stdout:  # until the first job has ended
        if "/72 " in line:
            break

    os.kill(worker, signal.SIGKILL)

    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 1
    assert "The demo failed: the worker ended with -9; its log, " in output
    assert "succeeded in" in output.split("ends with:")[1]


def test_sigterm_ends_the_demo_and_its_worker(start, tmp_path):
    for number in range(24):
        noise(tmp_path / "in" / f"{number}.jpg", (2400, 1800))
    demo = start("demo.py", "--input", "in")
    worker = worker_of(demo)

    demo.terminate()

    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert "Stopped. The worker is gone" in output
    assert not processes.is_running(worker)


def test_in_a_terminal_bars_show_the_way_and_ctrl_c_leaves_nothing_running(start, tmp_path):
    # Given a terminal of 80 columns
    for number in range(24):
        noise(tmp_path / "in" / f"{number}.jpg", (2400, 1800))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    demo = start(
        "demo.py",
        "--input",
        "in",
        env={"TERM": "xterm"},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        **terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = bytearray()

    def read() -> str:
        with contextlib.suppress(OSError):
            seen.extend(os.read(ours, 65536))
        return seen.decode(errors="replace")

    # When some jobs are done, and Ctrl-C is typed
    eventually(lambda: re.search(r"Resize to 800 px AVIF.*━.* [1-9]\d?/24 ", read()), 30, read)
    worker = worker_of(demo)
    os.write(ours, b"\x03")

    # Then it says so, shows its cursor again, and is gone with its worker
    eventually(lambda: (read(), demo.poll())[1] is not None, 20, read)
    output = read()
    os.close(ours)
    assert demo.returncode == 130
    assert "Stopped. The worker is gone" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    assert "Traceback" not in output
    assert not processes.is_running(worker)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make (Debian: apt-get install make)")
@pytest.mark.parametrize("way", ["argument", "environment"])
@pytest.mark.parametrize(
    "folder", ["~/My Pictures", """/a"b'c""", "/$HOME/$(HOME)/$$", "/`touch ran`;$(touch ran)", "$(shell touch ran)"]
)
def test_make_demo_hands_the_folder_over_as_it_is(tmp_path, folder, way):
    # Given an environment whose Python shows what it is called with
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("""#!/bin/sh\nprintf '%s\\n' "$@"\n""")
    python.chmod(0o755)
    (tmp_path / ".venv" / ".runtime").touch()

    # When
    make = ["make", "--no-print-directory", "-f", REPOSITORY / "Makefile", "--old-file=.venv/.runtime", "demo"]
    given = {"args": [*make, f"INPUT={folder}"]} if way == "argument" else {"args": make, "env": {"INPUT": folder}}
    env = {**os.environ, **given.pop("env", {})}
    done = subprocess.run(**given, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)

    # Then
    assert done.stdout.splitlines() == ["examples/demo.py", "--input", folder]
    assert not (tmp_path / "ran").exists()
