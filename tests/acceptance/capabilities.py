"""Task types for the tests, found by workers through an entry point, as those of an installed package are."""

import os
import signal
import subprocess
import time
from asyncio import CancelledError
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from celery import chain, chord, group
from celery.exceptions import Ignore, Reject, Retry

from tasks.arguments import InputPath, OutputPath
from tasks.celery import app
from tasks.errors import LimitExceeded, RateLimited, TransientError
from tasks.job import Job
from tasks.media.output import atomic_outputs


@app.task
def add(x: int, y: int = 0) -> int:
    """A step of a canvas."""
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    """The body of a chord."""
    return sum(numbers)


@app.task(typing=True)
def strict_total(numbers: list[int]) -> int:
    """Celery itself looks at its arguments, before we do."""
    return sum(numbers)


@app.task
def note(file: str, text: str = "", sleep_s: float = 0.0) -> str:
    """Append "begin" and "end" to a file, so that a test can count how often the body ran."""
    if not file.startswith("/dev/"):
        _append(str(Path(file).with_suffix(".pid")), str(os.getpid()))
    _append(file, f"begin {text}")
    time.sleep(sleep_s)
    _append(file, f"end {text}")
    return text


@app.task
def note_parts(parts: list[Any], file: str) -> list[Any]:
    """The body of a chord, which leaves a line each time that it runs."""
    _append(file, f"body {parts}")
    return parts


@app.task
def note_error(request: Any, exc: BaseException, traceback: Any, file: str) -> None:
    """An errback of the new style: called with the request, in the worker that saw the failure."""
    _append(file, f"errback {request.id} {type(exc).__name__}")


@app.task(ignore_result=True)
def quiet(number: int) -> int:
    """Nobody wants its result; its row does."""
    return number


@app.task(ignore_result=True)
def quiet_failure() -> None:
    raise ValueError("nobody listens")


@app.task
def fail(*args: object, message: str = "this can't work") -> None:
    raise ValueError(message)


@app.task
def refuse(path: str) -> None:
    raise LimitExceeded(f"{path} is too large; make it smaller")


@app.task
def recover(file: str, failures: int = 1) -> int:
    """Fail as a network does, so many times; then return how often it ran."""
    _append(file, "run")
    runs = len(Path(file).read_text().splitlines())
    if runs <= failures:
        raise TransientError(f"the network is away, run {runs}")
    return runs


@app.task
def be_limited(retry_after_s: int) -> None:
    """A server asks to be left alone, as our own error says it."""
    raise RateLimited("slow down", retry_after_s)


@app.task
def be_limited_by_http(retry_after_s: int) -> None:
    """As the standard library says it, by the header."""
    headers = Message()
    headers["Retry-After"] = str(retry_after_s)
    raise HTTPError("http://host/", 429, "Too Many Requests", headers, None)


@app.task
def recover_when(file: str, number: int) -> int:
    """Fail for good until somebody has made the file: replayed then, it works."""
    if not Path(file).exists():
        raise LimitExceeded(f"{file} is missing; make it, and replay this job")
    return number


@app.task
def kill_its_worker(file: str, signum: int = signal.SIGKILL) -> None:
    """A file that crashes the library which reads it."""
    _append(file, "run")
    time.sleep(0.3)
    os.kill(os.getpid(), signum)


@app.task(bind=True)
def report(self: Job, sleep_s: float = 1.0) -> str:
    """Say how far it is in Celery's way, then wait."""
    self.update_state(state="PROGRESS", meta={"progress": 40, "stage": "halfway"})
    time.sleep(sleep_s)
    return "done"


@app.task
def call_another(x: int) -> str:
    """Submit a job from inside a job."""
    return str(add.delay(x, 1).id)


@app.task(bind=True)
def become_add(self: Job, x: int) -> Any:
    return self.replace(add.s(x, 1))


@app.task(bind=True)
def become_canvas(self: Job, kind: str) -> Any:
    canvas = {
        "chain": chain(add.si(1, 2), add.s(3)),
        "group": group([add.si(1, 2)]),
        "chord": chord([add.s(1)], total.s()),
    }
    return self.replace(canvas[kind])


@app.task(bind=True)
def retry_by_hand(self: Job) -> None:
    raise Retry("later")


@app.task(bind=True)
def become_later(self: Job, file: str) -> Any:
    """Another job in its place, a moment later; it must not come back as itself."""
    _append(file, "became")
    raise self.replace(add.si(40, 2).set(countdown=0.2))


@app.task(bind=True)
def retry_and_fail(self: Job, file: str) -> None:
    """Ask for another try, and go on."""
    _append(file, "run")
    if self.request.retries:
        return
    self.retry(countdown=0.2, throw=False)
    raise ValueError("too late to fail")


@app.task(bind=True)
def count_down(self: Job, file: str, left: int) -> str:
    """Run again with other arguments, until none is left."""
    _append(file, str(left))
    if left:
        raise self.retry(args=(file, left - 1), countdown=0.1)
    return "lift-off"


@app.task(bind=True)
def reject(self: Job, file: str, requeue: bool = False) -> str:
    """Not for this worker; the second time it is."""
    _append(file, "run")
    if len(Path(file).read_text().splitlines()) == 1:
        raise Reject("not now", requeue=requeue)
    return "done"


@app.task
def ignore() -> None:
    raise Ignore("not today")


@app.task
def secret_keeper(password: str) -> dict[str, str]:
    """What it takes and returns must not be logged."""
    return {"answer": f"result-of-{password}"}


@app.task
def unreadable(input: InputPath, output: OutputPath) -> object:  # noqa: A002 (the name of the contract)
    """Its result can't be written as JSON."""
    return object()


@app.task
def stay(file: str, seconds: float, started: bool = False) -> str:
    """Take its time; a soft time limit interrupts it. With `started`, a program does, in a session of its own."""
    _append(file, "begin")
    if started:
        child = subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
        _append(str(Path(file).with_suffix(".started")), str(child.pid))
    time.sleep(seconds)
    _append(file, "end")
    return "stayed"


@app.task
def stay_whatever(file: str, seconds: float) -> str:
    """A call into C that no soft time limit interrupts."""
    _append(file, "begin")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(Exception):
            time.sleep(deadline - time.monotonic())
    return "stayed"


@app.task
def dawdle(file: str, first_s: float, later_s: float) -> int:
    """Take more time at the first attempt than later."""
    _append(file, "run")
    runs = len(Path(file).read_text().splitlines())
    time.sleep(first_s if runs == 1 else later_s)
    return runs


@app.task(soft_time_limit=1, seconds_per_megabyte=10.0)
def read(input: InputPath, seconds: float) -> str:  # noqa: A002 (the name of the contract)
    """Take its time; a soft time limit interrupts it, for a larger input a later one."""
    time.sleep(seconds)
    return "read"


@app.task(time_limit=1, seconds_per_megabyte=10.0)
def read_whatever(input: InputPath, seconds: float) -> str:  # noqa: A002 (the name of the contract)
    """The same by a hard limit."""
    time.sleep(seconds)
    return "read"


@app.task(retry_on_timeout=True)
def hurry(file: str, seconds: float) -> int:
    """Take its time at the first attempt only; a time limit is an error that may pass."""
    _append(file, "run")
    runs = len(Path(file).read_text().splitlines())
    if runs == 1:
        time.sleep(seconds)
    return runs


@app.task(bind=True)
def litter(self: Job, output: OutputPath) -> None:
    """Open one temp file after the other, until its process is killed."""
    _append(f"{output}.pid", str(os.getpid()))
    while True:
        with suppress(TransientError), atomic_outputs([output], token=self.token):
            time.sleep(0.01)
            raise TransientError("it is not good enough")


@app.task(bind=True)
def write_in_the_end(self: Job, output: OutputPath) -> int:
    """Which attempt has written its output: the first takes half a minute, later ones wait for a file."""
    attempt = int(self.request.attempt)
    _append(f"{output}.pids", str(os.getpid()))
    with atomic_outputs([output], token=self.token, confirm=self.confirm) as (staged,):
        os.write(staged.fd, b"whole")
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline and not (attempt > 1 and Path(f"{output}.goes-on").exists()):
            time.sleep(0.02)
    return attempt


@app.task
def list_beside(output: OutputPath) -> list[str]:
    """What lies in the directory of its output as it begins."""
    return sorted(os.listdir(Path(output).parent))  # noqa: PTH208


@app.task
def leave(file: str, how: str) -> None:
    """Raise what is to end a process, or a coroutine."""
    _append(file, "begin")
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "cancel": CancelledError()}[how]


@app.task
def exhaust_memory() -> None:
    raise MemoryError("as numpy says it")


def _append(file: str, line: str) -> None:
    with Path(file).open("a") as stream:
        stream.write(f"{line}\n")
