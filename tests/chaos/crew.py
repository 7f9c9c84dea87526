"""The crew: a few real workers, each at its post, started again whenever they are gone, as systemd would.

In: what havoc wants done to one of them. Out: blows, that is what was done to whom and when, so that the audit can tell
deaths that were dealt from deaths that were imagined.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.acceptance.deployment import Deployment
from tests.chaos.servers import Hold
from tests.tooling import processes
from tests.tooling.worker import Worker

POOL_CHILDREN = 2
LOOK_EVERY_S = 0.2
STOPS_WITHIN_S = 30.0
# What Celery says of a start during which a child was killed.
NO_CHILDREN = "Could not start worker processes"
# What a kill -9 is called once it was dealt.
KILLED = ("child killed", "worker killed", "main killed")
# A worker that is stopped for so long may count as dead: where its lock is seen, and where only its lease tells.
STOPPED_FOR_S, SILENT_FOR_S = 55.0, 4.0
# Kinds of blows after which attempts may count as dead.
DEADLY = frozenset({*KILLED, "worker stopped for long", "exit"})


@dataclass
class Blow:
    """What was done to a worker or a server, from when to when."""

    kind: str
    at: datetime
    worker: str = ""
    note: str = ""
    until: datetime | None = None

    def over(self) -> None:
        self.until = datetime.now(UTC)


@dataclass
class Post:
    """A worker's place, with its name; `lock` is held by whoever does something to the worker."""

    name: str
    worker: Worker | None = None
    is_exit_expected: bool = False
    restart_at: float = 0.0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.worker.is_alive() and " ready." in self.worker.log()


class Crew:
    """So many workers, watched by a thread between `start` and `stop`.

    Args:
        hosts: A server directory for each host; the workers are spread over them, and none sees the locks of another's.
    """

    def __init__(self, deployment: Deployment, size: int, hosts: Sequence[Path]) -> None:
        self._deployment = deployment
        self._hosts = hosts
        self.posts = [Post(f"worker-{number}") for number in range(1, size + 1)]
        self.blows: list[Blow] = []
        self.exits: list[str] = []
        """Of workers that ended by themselves; a supervisor starts them again."""
        self.crashes: list[str] = []
        """Those of workers that had begun to work: nothing may end these."""
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._keep_manned, name="crew", daemon=True)

    def start(self) -> None:
        for post in self.posts:
            self._man(post)
        for post in self.posts:
            post.worker.wait_until_ready(60)
        self._watch.start()

    def stop_watching(self) -> None:
        self._over.set()
        if self._watch.is_alive():
            self._watch.join()

    def blow(self, kind: str, worker: str = "", note: str = "") -> Blow:
        """Note it before it is dealt."""
        blow = Blow(kind, datetime.now(UTC), worker, note)
        self.blows.append(blow)
        return blow

    def victim(self, chance: random.Random) -> Post | None:
        """A worker with a child at work; else one that is ready, or at least alive."""
        alive = [post for post in self.posts if post.worker is not None and post.worker.is_alive()]
        ready = [post for post in alive if post.is_ready]
        busy = [post for post in ready if self.is_busy(post)]
        return chance.choice(busy or ready or alive) if alive else None

    @staticmethod
    def is_busy(post: Post) -> bool:
        return any(map(_is_busy, post.worker.child_pids()))

    # What can be done to a worker; each is called with the post's lock held

    def kill_child(self, post: Post, chance: random.Random) -> bool:
        """False if there is none: it has just died, or its worker has only begun."""
        if not (children := post.worker.child_pids()):
            return False
        pid = chance.choice([*filter(_is_busy, children)] or children)
        self.blow("child killed", post.name, f"pid {pid} of {post.worker.pid}")
        processes.send([pid], signal.SIGKILL)
        return True

    def kill_worker(self, post: Post, chance: random.Random) -> None:
        self._gone(post, chance, "worker killed")
        post.worker.kill9_everything()

    def kill_main(self, post: Post, chance: random.Random) -> None:
        self._gone(post, chance, "main killed")
        post.worker.kill9()

    def terminate(self, post: Post, chance: random.Random) -> None:
        """A restart in order: SIGTERM, and a new one once it is gone."""
        blow = self._gone(post, chance, "worker terminated")
        post.worker.terminate()
        # A process that is stopped gets no signal; service managers continue it, too (systemd.kill(5)).
        processes.send([post.worker.pid, *post.worker.child_pids()], signal.SIGCONT)
        deadline = time.monotonic() + STOPS_WITHIN_S
        while post.worker.is_alive() and time.monotonic() < deadline:
            self._over.wait(LOOK_EVERY_S)
        blow.over()
        if post.worker.is_alive():
            self.crashes.append(
                f"{post.name} did not stop within {STOPS_WITHIN_S:g} s of SIGTERM (log {self.log_of(post)})"
            )
            self._gone(post, chance, "worker killed")
            post.worker.kill9_everything()

    def freeze_child(self, post: Post, chance: random.Random, hold: Hold) -> bool:
        """False if there is none."""
        if not (children := post.worker.child_pids()):
            return False
        self._freeze(post, "child stopped", [chance.choice(children)], hold)
        return True

    def freeze_worker(self, post: Post, chance: random.Random, hold: Hold) -> None:
        self._freeze(post, "worker stopped", [post.worker.pid, *post.worker.child_pids()], hold)

    def freeze_main(self, post: Post, chance: random.Random, hold: Hold) -> None:
        self._freeze(post, "main stopped", [post.worker.pid], hold)

    def _freeze(self, post: Post, kind: str, pids: list[int], hold: Hold) -> None:
        blow = self.blow(kind, post.name, f"pids {pids}")
        processes.send(pids, signal.SIGSTOP)
        try:
            hold()
        finally:
            processes.send(pids, signal.SIGCONT)
            blow.over()
            if (blow.until - blow.at).total_seconds() >= (STOPPED_FOR_S if len(self._hosts) == 1 else SILENT_FOR_S):
                blow.kind = "worker stopped for long"

    def _gone(self, post: Post, chance: random.Random, kind: str) -> Blow:
        post.is_exit_expected = True
        post.restart_at = time.monotonic() + chance.uniform(0.0, 2.0)
        return self.blow(kind, post.name, f"pid {post.worker.pid}")

    # The watch

    def log_of(self, post: Post) -> str:
        return post.worker._log_path.name

    def _keep_manned(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            for post in self.posts:
                if post.lock.acquire(blocking=False):
                    try:
                        self._look(post)
                    finally:
                        post.lock.release()

    def _look(self, post: Post) -> None:
        if post.worker.is_alive():
            return
        if not post.is_exit_expected:
            log = post.worker.log()
            last = " | ".join(log.splitlines()[-3:])
            self.blow("exit", post.name, f"{post.worker.returncode}: {last}")
            self.exits.append(f"{post.name} exited with {post.worker.returncode} (log {self.log_of(post)}): {last}")
            if (" ready." in log or "Unrecoverable error" in log) and NO_CHILDREN not in log:
                self.crashes.append(self.exits[-1])
            post.is_exit_expected, post.restart_at = True, time.monotonic() + 1.0
        if time.monotonic() >= post.restart_at:
            self._man(post)

    def _man(self, post: Post) -> None:
        post.is_exit_expected = False
        host = self._hosts[self.posts.index(post) % len(self._hosts)]
        post.worker = self._deployment.start_worker(
            f"--concurrency={POOL_CHILDREN}", env={"WORKER_ID": post.name, "CL_SERVER_DIR": host}, ready_timeout_s=0
        )

    # The end

    def dismiss(self) -> list[str]:
        """Stop all in order; complaints about those that would not, and about what any of them ever left behind."""
        complaints = []
        for post in self.posts:
            with suppress(ProcessLookupError):
                post.worker.terminate()
        for post in self.posts:
            try:
                if (code := post.worker.wait(STOPS_WITHIN_S)) != os.EX_OK:
                    complaints.append(f"{post.name} ended with {code} at SIGTERM")
            except AssertionError:
                complaints.append(f"{post.name} did not stop within {STOPS_WITHIN_S:g} s (log {self.log_of(post)})")
        for worker in list(self._deployment.workers):
            try:
                self._deployment.stop(worker)
            except AssertionError as exc:
                self._deployment.workers.remove(worker)
                complaints.append(str(exc).partition("\n")[0])
        return complaints


def _is_busy(pid: int) -> bool:
    """Whether a process computes right now, or writes: its job is under way."""
    with suppress(OSError):
        return (processes.PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "RD"
    return False
