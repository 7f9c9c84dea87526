"""The composition root: the one place where settings, database, broker, tasks and signals become an app."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import cached_property
from math import inf
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from celery import Celery, signals
from celery.exceptions import SoftTimeLimitExceeded
from celery.loaders.app import AppLoader
from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

import tasks.broker
from tasks import capabilities
from tasks.brokers import REDIS
from tasks.errors import SettingsError
from tasks.options import MAPS
from tasks.settings import Settings, settings

if TYPE_CHECKING:
    from db.records import Row
    from db.store import Store
    from tasks.leases import Leases
    from tasks.results import JobBackend

T = TypeVar("T")
logger = logging.getLogger(__name__)

CONFIGURATION: Final = "celeryconfig"


class _Waits(threading.local):
    total_s = 0.0


_waits: Final = _Waits()


class OwnLoader(AppLoader):  # type: ignore[misc, unused-ignore]
    """Reads our own `celeryconfig`, whichever other one a host project has on the path before it."""

    def config_from_object(self, obj: Any, silent: bool = False) -> Any:
        if obj == CONFIGURATION:
            obj = run_path(str(Path(__file__).parents[1] / f"{CONFIGURATION}.py"))
        return super().config_from_object(obj, silent)


class MediaTasks(Celery):
    """Celery, with a job table: `send_task` writes the row before the broker sees the job.

    Nothing is opened, read or started until it is used; a producer that only imports it does no I/O.
    """

    task_cls = "tasks.job:Job"
    loader_cls = OwnLoader
    control_cls = "tasks.revokes:RecordedControl"
    backend: "JobBackend"
    """With MIRROR=off Celery's own that keeps nothing; nobody calls it then."""
    lease: str | None = None
    """Names this worker's lease, in its main process and in its pool children; see `tasks.leases`."""
    outage_at = -inf
    """When a worker's upkeep last found that it does not answer (`time.monotonic`)."""
    _is_loaded = False

    @property
    def current_worker_task(self) -> Any:
        """As Celery's. A task of another app is none of ours: what it submits comes from a producer."""
        task = super().current_worker_task
        return task if task is not None and task.app is self else None

    @cached_property
    def settings(self) -> Settings:
        return settings()

    @cached_property
    def store(self) -> "Store":
        """The job tables, for this process and its children."""
        from db.engine import Database
        from db.store import Store

        self._make_server_dir()
        return Store(
            Database(
                self.settings.database_url,
                mmap_bytes=self.settings.sqlite_mmap_bytes,
                pool_size=self.settings.db_pool_size,
                dumps=dumps,
                loads=loads,
            )
        )

    @cached_property
    def leases(self) -> "Leases":
        """Who lives, as this host sees it."""
        from tasks.leases import Leases

        return Leases(self)

    def _load_config(self) -> Any:
        """Celery's settings, once they are needed; a bad value stops a command with one line."""
        try:
            return super()._load_config()
        except SettingsError as exc:
            raise _for_people(exc) from exc

    def _connection(self, *args: Any, **kwargs: Any) -> Any:
        self._make_server_dir()
        return super()._connection(*args, **kwargs)

    def _make_server_dir(self) -> None:
        """Make the directory that holds the SQLite files, before the first of them is opened."""
        if all("sqlite" not in url.split(":", 1)[0] for url in (self.settings.database_url, self.settings.broker_url)):
            return
        server_dir = self.settings.server_dir
        try:
            server_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # arguments and results are the user's
        except OSError as exc:
            unmade = (
                f"CL_SERVER_DIR: {server_dir} can't be made ({exc.strerror}); set it to one that this user may write"
            )
            raise _for_people(SettingsError(unmade)) from exc

    def patiently(self, call: Callable[[], T]) -> T:
        """Call the store until the database answers: a job waits for it, it does not fail."""
        from db.engine import patiently

        asked_at = time.monotonic()
        try:
            return patiently(call, on_wait=_warn_of_waiting)
        finally:
            _waits.total_s += time.monotonic() - asked_at

    def in_the_end(self, call: Callable[[], T]) -> T:
        """As `patiently`, for what ends an attempt: a soft time limit that strikes meanwhile comes after the work."""
        while True:
            try:
                return self.patiently(call)
            except SoftTimeLimitExceeded:
                logger.warning("a soft time limit struck while the end of an attempt was written")

    @property
    def waited_s(self) -> float:
        """For how long this thread has waited for the job database, in all of its jobs: look at it twice."""
        return _waits.total_s

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 (Celery's name)
        return self.subclass_with_self("tasks.worker:MediaWorker")

    @cached_property
    def worker_id(self) -> str:
        """Who claims jobs in this process: the worker whose main process this is, or its parent."""
        return self.settings.worker_id

    def gen_task_name(self, name: str, module: str) -> str:  # noqa: ARG002 (Celery's signature)
        """A task is named by its function alone: its name is its queue and its capability."""
        return name

    def new_id(self) -> str:
        return str(uuid())

    def is_recorded(self, name: str) -> bool:
        """Whether jobs of this task have rows here: all but Celery's own, if any has."""
        return self.has_rows and not name.startswith(capabilities.OWN_PREFIX)

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, *positional: Any, **options: Any) -> Any:
        """As Celery's; the row is written first. See `tasks.enqueue.send` for what is raised.

        More options: `unique_key` and `unique_for`, see the README.
        """
        from tasks import enqueue

        self.load_capabilities()
        options = enqueue.by_name(positional, options)
        if name in MAPS or self.is_recorded(name):
            return enqueue.send(self, name, args, kwargs, options)
        if not name.startswith(capabilities.OWN_PREFIX):
            args, kwargs = enqueue.prepared(self, name, args, kwargs, options)
        return super().send_task(name, args, kwargs, **options)

    @property
    def has_rows(self) -> bool:
        """Whether jobs have rows here: not with MIRROR=off, nor in a producer with ENQUEUE=broker."""
        return self.settings.mirror and not self.is_without_database

    @property
    def is_without_database(self) -> bool:
        """ENQUEUE=broker: a producer only has the broker; a worker always has the job table."""
        return self.settings.enqueue == "broker" and self.lease is None

    def publish(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        *,
        publication: int,
        priority: int,
        has_begun: bool,
        expires: str | None,
        options: dict[str, Any],
    ) -> None:
        """Send the message of a row, now, with its number; nothing is written. A second call sends a second message: of
        two with one number the guard runs one, and of two numbers that of the row.

        Args:
            publication: The row's number as the message is to carry it.
            priority: The row's, 1-10.
            has_begun: Whether the job ran before: it goes before all that have not.
            expires: When a worker is to cancel the job, ISO 8601. The message itself never expires: it would vanish
                without a word.
            options: As of Celery's `send_task`; times in them have no effect.

        Raises:
            kombu.exceptions.OperationalError: The broker does not answer or refuses; it may have the message all the
                same.
            kombu.exceptions.EncodeError: The arguments are no JSON.
        """
        own = {"publication": publication, "published_at": int(time.time()), "expires": expires}
        headers = {**(options.get("headers") or {}), **own}
        timeless = {key: value for key, value in options.items() if key not in ("eta", "countdown", "expires")}
        super().send_task(
            name, args, kwargs, **timeless | {"headers": headers, "priority": self.wire_priority(priority + has_begun)}
        )

    def wire_priority(self, priority: int) -> int:
        """A row's priority (1-10, 10 first) as the broker wants it: Redis serves 0 first. 11 is for what has begun."""
        return max(10 - priority, 0) if self.settings.broker_kind.is_lowest_first else priority

    def live_workers(self) -> "list[Row]":
        """The heartbeat rows of workers heard of within LEASE_TIMEOUT_S."""
        return self.store.workers(heard_within_s=self.settings.lease_timeout_s)

    def load_capabilities(self) -> None:
        """Find all task types, once."""
        if not self._is_loaded:
            self._is_loaded = True
            capabilities.load_built_in()
            capabilities.load_installed()


def _warn_of_waiting(exc: BaseException, wait_s: float) -> None:
    logger.warning("the job database does not answer (%s); trying again in %.1f s", type(exc).__name__, wait_s)


def _for_people(exc: SettingsError) -> Exception:
    """The error itself; in a Celery command Click's, which ends it with the message instead of a traceback."""
    if "click" in sys.modules:
        import click

        if click.get_current_context(silent=True) is not None:
            return click.ClickException(str(exc))
    return exc


def result_backend(**options: Any) -> "JobBackend":
    """The job table as a result backend; it is our app's for a process without one, too, whose `AsyncResult(id)` finds
    our settings.
    """
    from tasks.results import JobBackend

    is_ours = isinstance(options["app"], MediaTasks)
    return JobBackend(**(options if is_ours else options | {"app": app}))


def on_import_modules(**_: Any) -> None:
    """Celery's worker and commands import what they need now."""
    app.load_capabilities()


def on_celeryd_init(**_: Any) -> None:
    """A worker starts: what only workers need is loaded now."""
    from tasks import logs

    logs.connect(app.settings.log_format)
    if app.settings.mirror:
        app.steps["worker"].add("tasks.upkeep:Upkeep")
        if app.settings.broadcast_type == "mqtt":
            app.steps["worker"].add("tasks.broadcast:Broadcast")


def on_worker_process_init(**_: Any) -> None:
    """A pool begins; a child of one sets its signal handlers after this, so that ours has to wait for its first job."""
    from billiard import current_process

    from tasks.stop import shield_child

    if not current_process().daemon:  # the pools threads and solo run their jobs in the main process
        return

    def on_first_job(**_: Any) -> None:
        signals.task_prerun.disconnect(on_first_job)
        shield_child(app)

    signals.task_prerun.connect(on_first_job, weak=False)


tasks.broker.register()
TRANSPORT_ALIASES.update(dict.fromkeys(REDIS.schemes, "tasks.redis_transport:Transport"))
TRANSPORT_ALIASES.update(dict.fromkeys(("amqp", "pyamqp"), "tasks.amqp_transport:Transport"))
TRANSPORT_ALIASES["amqps"] = "tasks.amqp_transport:SSLTransport"
app = MediaTasks("media_tasks", set_as_current=False, config_source=CONFIGURATION)
signals.import_modules.connect(on_import_modules, sender=app, dispatch_uid="media_tasks.import_modules", weak=False)
signals.celeryd_init.connect(on_celeryd_init, dispatch_uid="media_tasks.celeryd_init", weak=False)
signals.worker_process_init.connect(on_worker_process_init, dispatch_uid="media_tasks.worker_process_init", weak=False)
