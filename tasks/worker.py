"""The worker: Celery's own, with its queues chosen by capability and its node named by WORKER_ID."""

import logging
import sys
from typing import TYPE_CHECKING, Any

import click
from celery.apps.worker import Worker
from celery.utils.nodenames import default_nodename, gethostname, nodename
from click.core import ParameterSource
from sqlalchemy.exc import SQLAlchemyError

from tasks import capabilities, engines
from tasks.errors import MediaTasksError, SettingsError
from tasks.settings import worker_name
from tasks.stop import GracefulStop

if TYPE_CHECKING:
    from tasks.celery import MediaTasks

logger = logging.getLogger(__name__)


class MediaWorker(Worker):
    """Serves `-Q`, else WORKER_SUPPORTED_TASKS, else every capability whose engines can be used here."""

    app: "MediaTasks"

    def __init__(self, app: "MediaTasks | None" = None, hostname: str | None = None, **options: Any) -> None:
        app = app or self.app
        if not _is_given("loglevel"):
            options["loglevel"] = app.settings.log_level
        if hostname is None or hostname == default_nodename(None):
            app.worker_id = app.settings.worker_id
            hostname = app.worker_id if "@" in app.worker_id else nodename(app.worker_id, gethostname())
        else:
            try:
                app.worker_id = worker_name("-n", hostname)
            except SettingsError as exc:
                raise click.UsageError(str(exc)) from exc
        super().__init__(app=app, hostname=hostname, **options)

    def on_start(self) -> None:
        """Before the pool forks: take the lease that all attempts of this worker hold.

        A database that is locked or away is waited for.

        Raises:
            SystemExit: The database can't be used, or another worker of this name is alive; said in one line.
        """
        self._stop = GracefulStop(self)
        self._stop.start()
        if self.app.settings.mirror:
            try:
                self.app.patiently(self.app.leases.take)
            except (MediaTasksError, SQLAlchemyError) as exc:
                sys.exit(f"Error: {exc}")
        super().on_start()  # prints the banner
        for name, reason in self._engines.formats.items():
            logger.info("images in %s can't be read and written here: %s", name, reason)

    def install_platform_tweaks(self, worker: Any) -> None:
        """As Celery's, with a graceful stop in the place of its signal handlers."""
        super().install_platform_tweaks(worker)
        self._stop.take_signals()

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """Choose the queues to serve.

        Raises:
            click.UsageError: A name is unknown, or its engine can't be used here.
        """
        self.app.load_capabilities()
        asked = [str(name) for name in include or self.app.settings.worker_supported_tasks]
        source = "-Q" if include else "WORKER_SUPPORTED_TASKS"
        try:
            capabilities.check_strategies(self.app)
            served = self._asked(asked, source) if asked else self._available()
        except SettingsError as exc:
            raise click.UsageError(str(exc)) from exc
        super().setup_queues(served, exclude)

    def _asked(self, asked: list[str], source: str) -> list[str]:
        known = capabilities.names(self.app)
        for name in asked:
            if name not in known:
                hint = capabilities.nearest(name, known)
                if hint or source != "-Q":
                    raise SettingsError(
                        f"{source}: no capability is called {name}{hint or '; known: ' + ', '.join(known)}"
                    )
                logger.warning("-Q %s is no capability's queue; only jobs sent to it by name arrive there", name)
        self._engines = engines.try_engines(self.app.tasks[name] for name in asked if name in known)
        for name in asked:
            if name in known and (lacked := self._engines.lacked_by(self.app.tasks[name])):
                needs = (
                    one if what == engines.NOT_INSTALLED else f"{one}, which {what}" for one, what in lacked.items()
                )
                extra = self.app.tasks[name].extra or "all"
                raise SettingsError(f"{source}: {name} needs {', '.join(needs)}; pip install '.[{extra}]'")
        return asked

    def _available(self) -> list[str]:
        served = []
        names = capabilities.names(self.app)
        self._engines = engines.try_engines(self.app.tasks[name] for name in names)
        for name in names:
            if lacked := self._engines.lacked_by(self.app.tasks[name]):
                reasons = ", ".join(f"{module} {what}" for module, what in lacked.items())
                logger.warning("%s is not served: %s", name, reasons)
            else:
                served.append(name)
        if not served:
            raise SettingsError("this installation can serve no capability; pip install '.[all]'")
        return served


def _is_given(option: str) -> bool:
    """Whether a worker's option stands on its command line, rather than being Celery's default."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(option) is ParameterSource.COMMANDLINE
