"""Real processes for the tests: forked, started at the same moment, and killed if they hang."""

import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def fork() -> int:
    """`os.fork()` without Python 3.12's warning about threads, which are the point of some tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_processes(count: int, work: Callable[[int], Any], *, timeout_s: float = 60.0) -> list[Any]:
    """The results of `work(0)`, `work(1)`, ... each in a forked process of its own, all let go at once.

    Raises:
        AssertionError: One raised (the message is its traceback), or hung.
    """
    ready, go = os.pipe()
    children = []
    for number in range(count):
        read, write = os.pipe()
        pid = fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)
            _answer(write, work, number)
        os.close(write)
        children.append((pid, read))
    os.close(ready)
    os.close(go)
    return [_result(pid, read, time.monotonic() + timeout_s) for pid, read in children]


def _answer(write: int, work: Callable[[int], Any], number: int) -> None:
    try:
        said = ("result", work(number))
    except BaseException:
        said = ("error", traceback.format_exc())
    with os.fdopen(write, "wb") as pipe:
        pickle.dump(said, pipe)
    os._exit(0)


def _result(pid: int, read: int, deadline: float) -> Any:
    chunks = []
    while True:
        if not select.select([read], [], [], max(deadline - time.monotonic(), 0))[0]:
            os.kill(pid, signal.SIGKILL)
            break
        if not (chunk := os.read(read, 65536)):
            break
        chunks.append(chunk)
    os.close(read)
    os.waitpid(pid, 0)
    assert chunks, f"process {pid} hung or died"
    kind, value = pickle.loads(b"".join(chunks))  # noqa: S301 (from our own child)
    assert kind == "result", value
    return value
