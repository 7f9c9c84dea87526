"""Which engines can be used here, found by trying them in a process of its own (`tasks.media.engines`).

In: tasks, with the modules that they need. Out: what is wrong with which of these, and which image formats are missing.
libvips that is touched before a fork hangs children, and a broken engine may end the process that loads it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final

TRY_WITHIN_S: Final = 30.0
TRIES: Final = 3
NOT_INSTALLED: Final = "is not installed"


@dataclass(frozen=True, slots=True)
class Engines:
    """What they can't do here. `unusable`: {module: what is wrong with it}, `formats`: {image format: why it fails}."""

    unusable: dict[str, str]
    formats: dict[str, str] = field(default_factory=dict)

    def lacked_by(self, task: Any) -> dict[str, str]:
        """{module: what is wrong with it} of those that a task needs."""
        return {module: self.unusable[module] for module in getattr(task, "requires", ()) if module in self.unusable}


def try_engines(tasks: Iterable[Any]) -> Engines:
    """Try the engines that these tasks need; this process loads none of them."""
    needed = sorted({module for task in tasks for module in getattr(task, "requires", ())})
    found = Engines({module: NOT_INSTALLED for module in needed if find_spec(module) is None})
    left = [module for module in needed if module not in found.unusable]
    while left:
        left = left[_try_some(left, found) :]
    return found


def _try_some(modules: Sequence[str], found: Engines) -> int:
    """Try the first of them, up to one that ends the process; how many that were."""
    for _ in range(TRIES):
        said, end, is_killed = _try(modules)
        if not is_killed:  # by somebody else: engines don't end themselves so
            break
    tried = 0
    for line in said.splitlines():
        answer = json.loads(line)
        if "format" in answer:
            found.formats[answer["format"]] = answer["reason"]
            continue
        tried += 1
        if answer["reason"] is not None:
            found.unusable[answer["module"]] = f"can't be used: {answer['reason']}"
    if tried < len(modules):
        found.unusable[modules[tried]] = end
        tried += 1
    return tried


def _try(modules: Sequence[str]) -> tuple[str, str, bool]:
    """What the process says, how it ended, and whether it was killed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "tasks.media.engines", *modules]
    try:
        done = subprocess.run(  # noqa: S603 (names of modules that tasks declare)
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRY_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stdout or b""
        return said.decode() if isinstance(said, bytes) else said, f"does not load within {TRY_WITHIN_S:g} s", False
    *_, last = ["", *done.stderr.splitlines()]
    end = f"can't be used: its import ends the process with code {done.returncode} {last}".rstrip()
    return done.stdout, end, -done.returncode in (signal.SIGKILL, signal.SIGTERM)
