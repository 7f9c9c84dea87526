"""Revokes that are written down, and jobs that have no row yet: steps of a chain and bodies of chords, not sent.

In: the ids of jobs that are revoked from Flower, by `AsyncResult.revoke()` or by `app.control`. Out: changed rows, and
Celery's broadcast. Safe to repeat.
"""

from typing import TYPE_CHECKING, Any

from celery.app.control import Control
from celery.canvas import maybe_signature

from db.records import Status
from tasks.rows import message_of_row, request_of_row, unsent

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


class RecordedControl(Control):  # type: ignore[misc, unused-ignore]
    """Celery's remote control, whose revokes are written down: a broadcast reaches only workers that run."""

    app: "MediaTasks"

    def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; also from Flower and `AsyncResult.revoke()`. A running job goes on unless `terminate`."""
        ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
        rows = self.app.store.jobs_by_id(ids) if self.app.has_rows else []
        for job_id in set(ids) - {row["job_id"] for row in rows} if self.app.has_rows else ():
            if (step := step_of(self.app, job_id)) is not None:
                self.app.backend.mark_as_revoked(job_id, "revoked", request=step)
        for row in rows:
            if row["status"] == Status.QUEUED or (kwargs.get("terminate") and not Status(row["status"]).is_terminal):
                fence = None if kwargs.get("terminate") else row["publication"]
                request = request_of_row(row, publication=fence)
                self.app.backend.mark_as_revoked(row["job_id"], "revoked", request=request)
        return super().revoke(task_id, *args, **kwargs)


def step_of(app: "MediaTasks", job_id: str) -> Any:
    """The request of a job that waits, without a row, in the message of the one before it; None if there is none.

    As one that was sent: its predecessor, which knows nothing of this, sends no job that has ended.
    """
    for row in app.store.unfinished_that_name(job_id):
        options = message_of_row(row)["options"]
        chain, body = list(options.get("chain") or ()), options.get("chord")
        steps = [(step, chain[:number]) for number, step in enumerate(chain)] + ([(body, None)] if body else [])
        for step, followers in steps:
            signature = maybe_signature(step, app=app)
            if signature.id == job_id and signature.task in app.tasks:
                request = unsent(
                    signature.task, signature.args, signature.kwargs, {**signature.options, "chain": followers}
                )
                request.is_unsent = False
                return request
    return None
