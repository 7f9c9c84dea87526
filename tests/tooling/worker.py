"""A real Celery worker in a process of its own, with its log, its pids and its death in the test's hands."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tooling import processes
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "MEDIA_TASKS_TEST_WORKER"
GONE_WITHIN_S = 5.0


class Worker:
    """`celery -A <app> worker <args>`, in its own session and process group.

    Everything that it starts carries a mark in its environment, so that `leftovers()` finds also what left the
    process group (where there is a /proc).
    """

    def __init__(
        self,
        *args: str,
        app: str = "tasks",
        env: Mapping[str, Any] | None = None,
        log_path: Path,
        cwd: Path = REPOSITORY,
    ) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._log_path = log_path
        self.args = [sys.executable, "-m", "celery", "-A", app, "worker", *self._with_log_level(args)]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.args,
                env=self._environment(env or {}),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The worker's main process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; -9 after SIGKILL, as in subprocess."""
        return self._process.poll()

    def is_alive(self) -> bool:
        return self.returncode is None

    def log(self) -> str:
        """Everything that it wrote to stdout and stderr so far."""
        return self._log_path.read_text(errors="replace")

    def child_pids(self) -> list[int]:
        """Pool children and whatever they started; empty when the main process is gone."""
        return sorted(processes.descendants(self.pid)) if self.is_alive() else []

    def leftovers(self) -> list[int]:
        """Processes of this worker that still run: the main process, its children, and what they started."""
        return sorted({*processes.marked(self._mark), *self.child_pids(), *([self.pid] if self.is_alive() else [])})

    def wait_for_log(self, text: str, timeout_s: float = 10.0) -> str:
        """Wait until the log holds `text`; return the log. Fails at once when the worker exits before."""

        def said() -> str:
            is_over = not self.is_alive()
            log = self.log()
            if text in log:
                return log
            if is_over:
                raise AssertionError(f"the worker exited with {self.returncode} before it said {text!r}:\n{log}")
            return ""

        return eventually(said, timeout_s, lambda: f"{text!r} in the worker's log:\n{self.log()}")

    def wait_until_ready(self, timeout_s: float = 30.0) -> None:
        self.wait_for_log(" ready.", timeout_s)

    def wait(self, timeout_s: float = 15.0) -> int:
        """Wait until the main process exits; its return code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker did not exit within {timeout_s:g} s:\n{self.log()}") from None

    def signal(self, signum: signal.Signals) -> None:
        """Signal the main process only."""
        self._process.send_signal(signum)

    def terminate(self) -> None:
        """Ask for a warm shutdown, as systemd and Kubernetes do."""
        self.signal(signal.SIGTERM)

    def kill9(self) -> None:
        """Kill the main process, as the OOM killer does, and wait for its death. Its children notice by themselves."""
        self._process.kill()
        self.wait()

    def kill9_everything(self) -> None:
        """Kill the main process and all that belongs to it at once, as when a machine is lost."""
        self.signal(signal.SIGSTOP)  # a main process that runs would replace its dead children
        processes.send([pid for pid in self.leftovers() if pid != self.pid], signal.SIGKILL)
        self.kill9()

    def clean_up(self) -> None:
        """Kill what still runs and fail if any process outlives the main process by more than 5 s."""
        seen = set(self.child_pids())
        if self.is_alive():
            self.kill9()

        def left() -> list[int]:
            return [pid for pid in {*self.leftovers(), *seen} if processes.is_running(pid)]

        try:
            eventually(lambda: not left(), GONE_WITHIN_S)
        except AssertionError:
            commands = {pid: processes.command_line(pid) for pid in left()}
            processes.send(commands, signal.SIGKILL)
            raise AssertionError(f"processes of worker {self.pid} outlived it: {commands}\n{self.log()}") from None

    def _environment(self, env: Mapping[str, Any]) -> dict[str, str]:
        name, _, value = self._mark.partition("=")
        search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        base = without_settings(os.environ) | {"PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1", name: value}
        return base | {name: str(value) for name, value in env.items()}

    @staticmethod
    def _with_log_level(args: Sequence[str]) -> list[str]:
        """The line that says "ready." is logged at INFO."""
        has_level = any(arg == "-l" or arg.startswith("--loglevel") for arg in args)
        return [*args] if has_level else [*args, "--loglevel=INFO"]
