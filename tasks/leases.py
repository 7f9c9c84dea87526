"""Leases: who holds attempts, and whether they live. In: this process's worker, or a holder's row. Out: a `Liveness`.

A worker's main process holds one lease for all its attempts: a `flock` that the kernel lets go at any death, and a row;
both are renewed. A process that runs a job itself (`apply()`) holds one meanwhile. On the host where the lock can be
seen the lock decides; a holder that has not renewed it for a minute is stopped, and counts as dead too. Elsewhere the
row decides, after LEASE_TIMEOUT_S. Silence proves nothing after an outage: who could not reach the database could not
renew. No process id is ever compared, and no clock that somebody can set.
"""

import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from mmap import mmap
from pathlib import Path
from threading import Event, Thread, local
from typing import TYPE_CHECKING, Final

from db.records import EAGER, Holder, Liveness
from tasks.broker.lease import Lease, is_held, silent_s
from tasks.errors import SettingsError

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

STOPPED_AFTER_S: Final = 60.0
# A worker that lost its broker renews within a second; one that goes round late, by no more than this.
WATCHED_FOR_S: Final = 3.0
LATE_S: Final = 1.5
LOOK_EVERY_S: Final = 0.25
_REFUSED_AFTER_S: Final = 10.0
_RETRY_S: Final = 0.25


class _Here(local):
    """Of each thread."""

    eager: str | None = None


class Leases:
    """The leases of one deployment, as this host sees them."""

    def __init__(self, app: "MediaTasks") -> None:
        self._app: Final = app
        self._directory: Final = Path(app.settings.server_dir) / "leases"
        self._mine: Lease | None = None
        self._here: Final = _Here()
        # Of this process and of the pool children that it forks: the guard in a child is to know what the upkeep saw.
        self._steady_since: Final = memoryview(mmap(-1, 8)).cast("d")
        self.interrupted()

    def take(self) -> None:
        """Take a lease for this worker; `app.lease` names it, also in the children that are forked later. Repeatable.

        Raises:
            SettingsError: Another living worker has this WORKER_ID, and goes on having it for ten seconds.
        """
        deadline = time.monotonic() + _REFUSED_AFTER_S
        self._refuse_double(deadline)
        self._mine = self._mine or self._make()
        self._app.lease = self._mine.name
        self.renew()
        while self._is_held():  # both have begun at the same moment: both step back, for a while of their own
            self._app.store.forget_lease(self.mine)
            time.sleep(random.uniform(_RETRY_S, 10 * _RETRY_S))  # noqa: S311 (no secret)
            self._refuse_double(deadline)
            self.renew()

    def renew(self) -> None:
        """Say in the file and in the row that this worker lives."""
        self._held.touch()
        self._app.store.renew_lease(self.mine, self._app.worker_id, self.host_id)

    def release(self) -> None:
        """Give the lease back; its row stays for as long as it holds an attempt."""
        if self._app.store.forget_lease(self.mine):
            self._held.release()  # else the lock goes with this process, and its file shows that it did

    @contextmanager
    def of_eager_run(self) -> Iterator[None]:
        """Hold a lease, which is renewed, while this thread runs a job itself: should its process die, others see it.

        A run within a run holds the same. Where no lock can be kept there is none, and nobody can tell.
        """
        try:
            lease = None if self._here.eager else Lease(self._directory, prefix=EAGER)
        except OSError:
            lease = None
        if lease is None:
            yield
            return
        with self._renewed(lease):
            self._here.eager = lease.name
            try:
                yield
            finally:
                self._here.eager = None

    @property
    def eager(self) -> str | None:
        """The name of the lease under which this thread runs a job itself."""
        return self._here.eager

    @contextmanager
    def _renewed(self, lease: Lease) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError  # a producer loads it only when it needs it

        def renew() -> None:
            lease.touch()
            self._app.store.renew_lease(lease.name, self._app.worker_id, self.host_id)

        def go_on_renewing() -> None:
            while not is_over.wait(self._app.settings.lease_renew_s):
                with suppress(SQLAlchemyError):
                    renew()

        is_over = Event()
        thread = Thread(target=go_on_renewing, name=lease.name, daemon=True)
        thread.start()
        try:
            self._app.patiently(renew)
            yield
        finally:
            is_over.set()
            thread.join()
            with suppress(SQLAlchemyError):
                self._app.store.forget_lease(lease.name)
            lease.release()

    @property
    def mine(self) -> str:
        """The name of this worker's own lease.

        Raises:
            RuntimeError: This process is no worker's, or has taken none yet.
        """
        return self._held.name

    @property
    def _held(self) -> Lease:
        if self._mine is None:
            raise RuntimeError("this process holds no lease: only a worker's does")
        return self._mine

    def interrupted(self) -> None:
        """Say that the database was away, or this machine: others were late as well, and for LEASE_TIMEOUT_S silence
        proves nothing. So it is at the beginning, too.
        """
        self._steady_since[0] = time.monotonic()

    @property
    def steady_s(self) -> float:
        """For how long this worker has seen no outage."""
        return time.monotonic() - self._steady_since[0]

    def judge(self, holder: Holder) -> Liveness:
        """Whether a holder lives, as the guard wants to know it."""
        if self.is_dead(holder):
            return Liveness.DEAD
        return Liveness.ALIVE if self._lock_of(holder) else Liveness.UNCERTAIN

    def is_dead(self, holder: Holder) -> bool:
        """Whether a holder is proved to be dead: its lock was let go, or it was silent while there was no outage.

        A lock that can be seen from here and is free is a proof whatever the clocks say. A file that somebody has
        removed proves nothing: its row decides.
        """
        if (path := self._lock_of(holder)) and not is_held(path):
            return True
        return self.seems_dead(holder) and self.steady_s >= self._app.settings.lease_timeout_s

    def seems_dead(self, holder: Holder) -> bool:
        """Whether a holder has let go of its lock or is silent, be it for an outage: what one look can tell."""
        timeout_s = self._app.settings.lease_timeout_s
        if path := self._lock_of(holder):
            return not is_held(path) or silent_s(path) > max(STOPPED_AFTER_S, timeout_s)
        return holder.silent_s > timeout_s

    def _lock_of(self, holder: Holder) -> Path | None:
        """The file of its lock, if that can be seen from here."""
        path = self._directory / holder.lease
        return path if holder.host_id == self.host_id and path.exists() else None

    @property
    def host_id(self) -> str:
        """Equal for two processes if, and only if, one sees the locks of the other: one kernel, one directory."""
        with suppress(OSError):
            status = self._directory.stat()
            return f"{_boot_id()}:{status.st_dev}:{status.st_ino}"
        return f"{_boot_id()}:no directory"

    def _make(self) -> Lease:
        try:
            return Lease(self._directory)
        except OSError as exc:
            raise SettingsError(
                f"CL_SERVER_DIR: {self._directory} can't be written ({exc.strerror}); a worker keeps its lease there"
            ) from exc

    def _refuse_double(self, deadline: float) -> None:
        """Wait a little for a worker of the same name: it may be about to end, or dead on another host."""
        while self._is_held():
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"WORKER_ID={self._app.worker_id}: a worker of this name is alive; give each its own, "
                    "or leave it unset"
                )
            time.sleep(_RETRY_S)

    def _is_held(self) -> bool:
        """Whether somebody else who may be alive has this worker's name."""
        holders = self._app.store.holders(worker_id=self._app.worker_id)
        others = [holder for holder in holders if holder.lease != self._app.lease and not holder.is_eager]
        return not all(self.seems_dead(holder) for holder in others)

    def sweep(self) -> None:
        """Remove the files of the dead."""
        with suppress(OSError):
            for path in self._directory.iterdir():
                is_old = time.time() - path.stat().st_mtime > timedelta(hours=1).total_seconds()
                if is_old and not is_held(path):
                    path.unlink(missing_ok=True)


class Watch:
    """Looks again and again at who holds a job that the broker has redelivered, as it lost the holder's connection.

    Where no lock can be seen the lease tells: a worker that lives renews it within LEASE_RENEW_S, and at once when it
    has lost its broker (`Upkeep.renew_soon`). One that has missed a renewal since the redelivery is dead, unless there
    was an outage: then the watch begins anew.
    """

    def __init__(self, leases: Leases, *, renew_s: float) -> None:
        self._leases: Final = leases
        self._renew_s: Final = renew_s
        self._first: tuple[datetime, float] | None = None

    def judge(self, holder: Holder) -> Liveness:
        """Whether it lives: UNCERTAIN until it has renewed, or should have."""
        if (liveness := self._leases.judge(holder)) is not Liveness.UNCERTAIN:
            return liveness
        renewed_at, watched_since = self._first = self._first or (holder.renewed_at, time.monotonic())
        if holder.renewed_at > renewed_at:
            return Liveness.ALIVE
        is_watched = min(time.monotonic() - watched_since, self._leases.steady_s) >= WATCHED_FOR_S
        return Liveness.DEAD if is_watched and holder.silent_s >= self._renew_s + LATE_S else Liveness.UNCERTAIN


def _boot_id() -> str:
    """Names this run of this machine's kernel; without /proc, the machine."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{uuid.getnode():x}-{os.uname().nodename}"
