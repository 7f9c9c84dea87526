"""A tour in one command: a folder of images in, derivatives and a job table out; nothing keeps running.

    make demo                       # makes a photo-like set of its own, one file of it broken
    make demo INPUT=~/Pictures      # takes the images of a folder; nothing is written into it

It starts a real worker (`celery -A tasks worker`) on the embedded broker, in a directory of its own (or in
CL_SERVER_DIR), submits three jobs for each image, follows their rows, and stops the worker. Settings of this machine's
own broker and database are left aside.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tasks.errors import MediaTasksError

REPOSITORY = Path(__file__).resolve().parents[1]
LEFT_ASIDE = (
    *("CELERY_", "MQTT_", "WORKER_", "LEASE_", "LOG_", "SQLITE_", "DATABASE_URL", "DB_POOL_SIZE", "ENQUEUE", "MIRROR"),
    *("QUEUE_STRATEGY", "MEDIA_ROOTS", "SHUTDOWN_GRACE_S", "RETENTION_DAYS", "BROADCAST_TYPE"),
)
MAX_IMAGES = 24
READY_WITHIN_S = 60.0
SILENT_FOR_S = 300.0
POLL_S = 0.1
LOG_LINES = 15
SHOWN_FAILURES = 8
WIDE_COLUMNS = 110
BY = "\u00d7"
BROKEN = "broken"  # the file of the demo's own set that has to fail is named so
BAD_INPUT = {"InputMissing", "UnsupportedMedia", "CorruptMedia", "LimitExceeded", "PathNotAllowed"}


class DemoFailed(Exception):
    """Something went wrong that is not the fault of an image; the message says what."""


@dataclass(frozen=True)
class Kind:
    """One of the jobs that every image gets."""

    task: str
    title: str
    column: str
    output: str
    options: Mapping[str, Any]


KINDS = (
    Kind("image_resize", "Resize to 800 px AVIF", "800 px AVIF", "resized.avif", {"width": 800}),
    Kind("image_conversion", "Convert to WebP", "WebP", "converted.webp", {}),
    Kind(
        "image_renditions",
        "Make 4 renditions",
        "renditions",
        "renditions",
        {"sizes": [400, 1200], "formats": ["jpeg", "webp"]},
    ),
)


@dataclass
class Job:
    """A submitted job and the last that is known of its row. `refused` says why it could not be submitted."""

    image: Path
    kind: Kind
    job_id: str = ""
    refused: str = ""
    row: Any = None

    @property
    def has_ended(self) -> bool:
        return bool(self.refused) or (
            self.row is not None and self.row["status"] in ("completed", "failed", "cancelled")
        )

    @property
    def has_failed(self) -> bool:
        return self.has_ended and (bool(self.refused) or self.row["status"] != "completed")

    @property
    def percent(self) -> float:
        return 100.0 if self.has_ended else self.row["progress"] if self.row else 0.0

    @property
    def took_s(self) -> float:
        if self.refused or self.row["started_at"] is None or self.row["completed_at"] is None:
            return 0.0
        return float((self.row["completed_at"] - self.row["started_at"]).total_seconds())

    @property
    def reason(self) -> str:
        """Why it failed, without the folder that all images are in."""
        return self.refused or str(self.row["error_message"]).replace(f"{self.image.parent}{os.sep}", "")


def main() -> int:
    arguments = _arguments()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, emoji=False, width=None if has_width else WIDE_COLUMNS + 30)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        return run(console, arguments.input, arguments.limit)
    except (DemoFailed, MediaTasksError) as exc:
        console.print("\n[bold red]The demo failed:[/] ", Text(str(exc)), sep="", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped. The worker is gone; jobs that had not ended would go on with the next one.")
        return 130


def run(console: Console, folder: Path | None, limit: int) -> int:
    images, note = found_images(folder, limit) if folder else ([], "")
    server_dir, place = make_place(folder)
    forget_settings(server_dir)
    console.print("\n[bold]Media Tasks[/]: a worker, a broker and a job table, all of it here\n")
    started_at = time.monotonic()
    with worker(place) as process:
        if folder is None:
            with console.status("Making photos ..."):
                images, folder = make_photos(place / "photos"), place / "photos"
            note = f"made {len(images)} photos: EXIF orientation, alpha, CMYK, animations, and a broken one"
        with console.status("Starting a worker ..."):
            wait_until_ready(process, place)
        processes = f"{concurrency()} process{'es' if concurrency() > 1 else ''}"
        _say(
            console, f"started a worker with {processes} on the embedded broker ({time.monotonic() - started_at:.1f} s)"
        )
        _say(console, note)
        console.print()
        submitted_at = time.monotonic()
        jobs = submit(images, folder, place / "outputs")
        follow(console, jobs, process, place)
        elapsed_s = time.monotonic() - submitted_at
    show_outputs(console, jobs, folder)
    unexpected = [job for job in jobs if job.has_failed and not is_expected(job, place)]
    show_summary(console, jobs, elapsed_s, server_dir, place)
    if unexpected:
        first = unexpected[0]
        raise DemoFailed(f"{len(unexpected)} jobs failed that should not have, first {first.kind.task}: {first.reason}")
    return 0


# What goes in


def found_images(folder: Path, limit: int) -> tuple[list[Path], str]:
    """The first images of a folder and its subfolders, by suffix, and a sentence on what was left out."""
    from tasks.media.formats import FORMATS, READ_ONLY

    suffixes = {f".{suffix}" for f in FORMATS.values() for suffix in (*f.suffixes, *READ_ONLY)}
    images: list[Path] = []
    skipped = 0
    for path in _files(folder):
        if path.suffix.lower() not in suffixes or not path.is_file():
            skipped += 1
        elif limit and len(images) == limit:
            return images, f"took the first {limit} images of {folder} (--limit 0 takes all)"
        else:
            images.append(path)
    if not images:
        raise DemoFailed(f"{folder} holds no image; looked for {', '.join(sorted(suffixes))}")
    others = f", and left out {_count(skipped, 'other file')}" if skipped else ""
    return images, f"found {_count(len(images), 'image')} in {folder}{others}"


def _files(folder: Path) -> Iterator[Path]:
    if not folder.exists():
        raise DemoFailed(f"{folder} does not exist; name a folder of images")
    if not folder.is_dir():
        yield folder
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def make_photos(directory: Path) -> list[Path]:
    from tasks.media import samples

    try:
        return samples.make_photos(directory)
    except ImportError as exc:
        raise DemoFailed(f"{exc}; pip install '.[image]'") from exc


def make_place(folder: Path | None) -> tuple[Path, Path]:
    """The server directory, and a new directory for this run: neither is inside the folder of images."""
    given = os.environ.get("CL_SERVER_DIR")
    try:
        if given:
            server_dir = Path(given).expanduser().absolute()
            if folder and server_dir.resolve().is_relative_to(folder.resolve()):
                raise DemoFailed(f"CL_SERVER_DIR={given} lies in {folder}, where nothing is to be written; set another")
            server_dir.mkdir(parents=True, exist_ok=True)
            return server_dir, Path(tempfile.mkdtemp(prefix="demo-", dir=server_dir))
        for parent in (Path(tempfile.gettempdir()), Path("/var/tmp")):  # noqa: S108 (mkdtemp in it)
            if folder is None or not parent.resolve().is_relative_to(folder.resolve()):
                place = Path(tempfile.mkdtemp(prefix="media-tasks-demo-", dir=parent)).resolve()
                return place, place
    except OSError as exc:
        raise DemoFailed(f"no directory for the outputs: {exc}; set CL_SERVER_DIR to a writable one") from exc
    raise DemoFailed(f"{folder} holds every place for temporary files; set CL_SERVER_DIR to one outside of it")


def forget_settings(server_dir: Path) -> None:
    """The demo stands on its own: no broker, database or log format of this machine, in it or in its worker."""
    for name in list(os.environ):
        if name.startswith(LEFT_ASIDE):
            del os.environ[name]
    os.environ |= {"CL_SERVER_DIR": str(server_dir), "BROADCAST_TYPE": "noop"}


# The worker


@contextmanager
def worker(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker as anybody starts one, in a process group of its own; gone at the end, whatever happens."""
    python = [sys.executable, "-W", "ignore:You're running the worker with superuser"]
    command = [*python, "-m", "celery", "-A", "tasks", "worker", "-l", "INFO", f"--concurrency={concurrency()}"]
    with _log_of(place).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            command,
            cwd=REPOSITORY,
            env=os.environ | {"WORKER_ID": _worker_id()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    except BaseException:
        _stop(process, within_s=3)
        raise
    _stop(process, within_s=20)


def _stop(process: subprocess.Popen[bytes], *, within_s: float) -> None:
    """Ask the worker to finish; kill what is left of it. Nothing interrupts this."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], place: Path) -> None:
    from tasks import app

    deadline = time.monotonic() + READY_WITHIN_S
    while not any(alive["worker_id"] == _worker_id() for alive in app.live_workers()):
        check_alive(process, place)
        if time.monotonic() > deadline:
            raise DemoFailed(f"the worker was not ready within {READY_WITHIN_S:g} s; {_log_tail(place)}")
        time.sleep(POLL_S)


def check_alive(process: subprocess.Popen[bytes], place: Path) -> None:
    if process.poll() is not None:
        raise DemoFailed(f"the worker ended with {process.returncode}; {_log_tail(place)}")


def concurrency() -> int:
    return min(os.cpu_count() or 1, 4)


def _worker_id() -> str:
    return f"demo-{os.getpid()}"


def _log_of(place: Path) -> Path:
    return place / "worker.log"


def _log_tail(place: Path) -> str:
    lines = _log_of(place).read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"its log, {_log_of(place)}, ends with:", *(f"  {line}" for line in lines)])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# The jobs


def submit(images: Sequence[Path], folder: Path, outputs: Path) -> list[Job]:
    """Three jobs for each image; its outputs get a directory with its name."""
    from tasks import app

    app.load_capabilities()
    jobs = []
    for image in images:
        target = outputs / (image.relative_to(folder) if image != folder else image.name)
        for kind in KINDS:
            job = Job(image, kind)
            try:
                job.job_id = app.tasks[kind.task].delay(image, target / kind.output, **kind.options).id
            except (MediaTasksError, ValueError) as exc:
                job.refused = str(exc)
            jobs.append(job)
    return jobs


def follow(console: Console, jobs: Sequence[Job], process: subprocess.Popen[bytes], place: Path) -> None:
    """Show the jobs until all have ended: bars in a terminal, else one line for each job that ends."""
    changed_at, was = time.monotonic(), -1.0
    has_bars = console.is_terminal and not console.is_dumb_terminal
    with _bars(console, jobs) if has_bars else _lines(console, jobs) as show:
        while True:
            is_over = process.poll() is not None  # asked first: what it wrote before its end is read below
            refresh(jobs)
            show()
            if all(job.has_ended for job in jobs):
                return
            if is_over:
                check_alive(process, place)
            if (percent := sum(job.percent for job in jobs)) != was:
                changed_at, was = time.monotonic(), percent
            if time.monotonic() - changed_at > SILENT_FOR_S:
                raise DemoFailed(f"nothing has happened for {SILENT_FOR_S:g} s; {_log_tail(place)}")
            time.sleep(POLL_S)


def refresh(jobs: Sequence[Job]) -> None:
    """Read the rows of the jobs that have not ended."""
    from tasks import app

    waiting = {job.job_id: job for job in jobs if not job.has_ended}
    for row in app.store.jobs_by_id(list(waiting)):
        waiting[row["job_id"]].row = row


@contextmanager
def _bars(console: Console, jobs: Sequence[Job]) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("  {task.description:24}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[ended]:>3}/{task.fields[jobs]}"),
        TimeElapsedColumn(),
        TextColumn("[red]{task.fields[failed]}[/]"),
    )
    with Progress(*columns, console=console) as progress:
        count = len(jobs) // len(KINDS)
        bars = [progress.add_task(kind.title, total=100.0 * count, ended=0, jobs=count, failed="") for kind in KINDS]

        def show() -> None:
            for kind, bar in zip(KINDS, bars, strict=True):
                mine = [job for job in jobs if job.kind is kind]
                failed = sum(job.has_failed for job in mine)
                progress.update(
                    bar,
                    completed=sum(job.percent for job in mine),
                    ended=sum(job.has_ended for job in mine),
                    failed=f"{failed} failed" if failed else "",
                )

        yield show


@contextmanager
def _lines(console: Console, jobs: Sequence[Job]) -> Iterator[Callable[[], None]]:
    said: set[int] = set()

    def show() -> None:
        for job in jobs:
            if not job.has_ended or id(job) in said:
                continue
            said.add(id(job))
            how = f"failed: {job.reason}" if job.has_failed else f"{job.took_s:.2f} s"
            line = f"  {len(said):3}/{len(jobs)}  {job.kind.task:17} {_shown(job.image.name)}  {_shown(how)}"
            console.print(line, markup=False, soft_wrap=True)

    yield show


def is_expected(job: Job, place: Path) -> bool:
    """Whether a failure is the image's own fault; of the demo's own set only the broken file may fail."""
    is_own = job.image.is_relative_to(place)
    is_bad_input = bool(job.refused) or job.row["error_type"] in BAD_INPUT
    return is_bad_input and (not is_own or BROKEN in job.image.name)


# What came out


def show_outputs(console: Console, jobs: Sequence[Job], folder: Path) -> None:
    """A line for each image: what each job made of it; then why jobs failed."""
    has_room = console.width >= WIDE_COLUMNS
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("  input", no_wrap=True)
    if has_room:
        table.add_column("size", justify="right", no_wrap=True)
    for kind in KINDS:
        table.add_column(kind.column, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    by_image: dict[Path, list[Job]] = {}
    for job in jobs:
        by_image.setdefault(job.image, []).append(job)
    for image, mine in by_image.items():
        name = str(image.relative_to(folder)) if image != folder else image.name
        took = f"{sum(job.took_s for job in mine):.1f} s"
        size = [_size(_bytes_of(image))] if has_room else []
        table.add_row(
            f"  {_end_of(_shown(name), 38 if has_room else 20)}",
            *size,
            *(_outcome(job, has_room) for job in mine),
            took,
        )
    console.print()
    console.print(table, markup=False)
    reasons: dict[Path, str] = {}
    for job in jobs:
        if job.has_failed:
            reasons.setdefault(job.image, job.reason)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for image, reason in list(reasons.items())[:SHOWN_FAILURES]:
        said = reason if image.name in reason else f"{image.name}: {reason}"
        grid.add_row(Text("  ✗", style="red"), Text(_shown(said)))
    if len(reasons) > SHOWN_FAILURES:
        grid.add_row("", f"and {len(reasons) - SHOWN_FAILURES} more")
    if reasons:
        console.print()
        console.print(grid)
    console.print()


def _outcome(job: Job, has_room: bool) -> Text:
    if job.has_failed:
        return Text("✗ failed", style="red")
    result = job.row["result_data"]
    outputs = result.get("outputs", [result])
    size = _size(sum(output["size_bytes"] for output in outputs))
    largest = max(outputs, key=lambda output: output["width"])
    frames = f"{BY}{largest['frames']}" if largest.get("frames", 1) > 1 else ""
    dimensions = f"{largest['width']}{BY}{largest['height']}{frames}"
    if not has_room:
        return Text(f"{size:>7}" if len(outputs) > 1 else f"{dimensions} {size:>7}")
    count = f"{len(outputs)} to " if len(outputs) > 1 else ""
    return Text(f"{count}{dimensions} {size:>7} {job.took_s:5.2f} s")


def show_summary(console: Console, jobs: Sequence[Job], elapsed_s: float, server_dir: Path, place: Path) -> None:
    failed = sum(job.has_failed for job in jobs)
    completed = len(jobs) - failed
    console.print(
        f"  [bold]{len(jobs)} jobs in {elapsed_s:.1f} s[/]: [green]{completed} completed[/]"
        + (f", [red]{failed} failed[/] for good" if failed else "")
        + ". Nothing keeps running.\n"
    )
    celery = Path(sys.executable).with_name("celery")
    if celery.is_relative_to(Path.cwd()):
        celery = celery.relative_to(Path.cwd())
    look = f"CL_SERVER_DIR={shlex.quote(str(server_dir))} {shlex.quote(str(celery))} -A tasks jobs list"
    for name, value in {
        "Outputs": place / "outputs",
        "Job table": server_dir / "media_store.db",
        "Look into it": look,
        "Worker's log": _log_of(place),
    }.items():
        console.print(f"  [dim]{name:13}[/]", Text(str(value)), sep="", soft_wrap=True)
    console.print()


def _say(console: Console, done: str) -> None:
    console.print(Text("  ✓ ", style="green"), Text(_shown(done)), sep="", soft_wrap=True)


def _shown(text: str) -> str:
    """On one line, without what could steer a terminal: a file's name may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _end_of(name: str, length: int) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.0f} {unit}" if size_bytes >= 9.95 or unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Resize and convert images with a worker of its own, and show it.")
    parser.add_argument("--input", type=_folder, metavar="FOLDER", help="take its images (default: make some)")
    parser.add_argument(
        "--limit", type=int, default=MAX_IMAGES, help=f"take so many images at most, 0: all (default {MAX_IMAGES})"
    )
    return parser.parse_args()


def _folder(text: str) -> Path:
    return Path(text).expanduser().absolute()


if __name__ == "__main__":
    sys.exit(main())
