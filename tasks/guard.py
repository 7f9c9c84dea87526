"""The guard: it decides, by one atomic claim on the job's row, whether a message may run.

In: a delivered message, however often and however late. Out: an attempt with a fencing token; or `Ignore`: a message of
another publication, of a job that has ended, or of one that a living worker holds is acknowledged without effect. What
ends an attempt from outside stands here, too: its process is gone, or is about to be.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from db.records import Claim, Closed, Decision, Event, Holder, Liveness, NewJob, Row, Status
from tasks.errors import JobTimeout, PermanentError, WorkerLost
from tasks.leases import LOOK_EVERY_S, Watch
from tasks.leftovers import remove_temp_files, remove_temp_files_of_row
from tasks.rows import job_of_request, request_of_row

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.job import Job

logger = logging.getLogger(__name__)

# A database that takes longer than this to answer has kept a job from its work.
OUTAGE_S: Final = 1.0

NO_ANSWER: Final = "the database did not answer"
# One attempt whose time went by in an outage says nothing of its job; a third one in a row does: it hangs.
SPARED_AT_MOST: Final = 2
_ENDS_ATTEMPT: Final = frozenset(
    {Event.RETRY, Event.REPLACED, Event.RELEASED, Event.LOST, Event.COMPLETED, Event.FAILED, Event.CANCELLED}
)


def claim(task: "Job", args: Any, kwargs: Mapping[str, Any]) -> None:
    """Take the job for this attempt; its fencing token goes into the request.

    Raises:
        Ignore: The message is to have no effect; or a soft time limit struck before the body began, and the attempt was
            given back.
        WorkerLost: The job was running on too many workers that died.
        Reject: A soft time limit struck while this waited for the database: the job has not begun.
    """
    task.request.asked_at = time.monotonic()
    try:
        answer = _asked(task, args, kwargs)
        if answer.decision in (Decision.RUN, Decision.POISON):
            _begin(task, answer, args, kwargs)
        else:
            _pass_by(task, answer)
    except SoftTimeLimitExceeded as exc:
        if task.request.get("attempt"):
            raise given_back(task, "its soft time limit struck before its body began") from exc
        raise Reject(str(exc), requeue=True) from exc


def _asked(task: "Job", args: Any, kwargs: Mapping[str, Any]) -> Claim:
    """What the row says to this message. A job whose holder's lock can't be seen from here stays with it, and is
    the reconciler's; but one that the broker has lost is watched until it has renewed its lease, or should have.
    """
    app, delivery = task.app, task.request.delivery_info or {}
    if not (delivery.get("redelivered") and app.settings.broker_kind.is_redelivery_a_loss):
        return _ask(task, args, kwargs, app.leases.judge)
    watch = Watch(app.leases, renew_s=app.settings.lease_renew_s)
    while (claim := _ask(task, args, kwargs, watch.judge)).decision is Decision.UNCERTAIN:
        time.sleep(LOOK_EVERY_S)
    return claim


def _ask(task: "Job", args: Any, kwargs: Mapping[str, Any], judge: Callable[[Holder], Liveness]) -> Claim:
    """Claim the row, however long the database takes."""
    request, app = task.request, task.app
    asked_at = time.monotonic()

    def judge_now(holder: Holder) -> Liveness:
        if time.monotonic() - asked_at > OUTAGE_S:  # the holder had to wait for the database as well
            app.leases.interrupted()
        return judge(holder)

    return app.patiently(
        lambda: app.store.claim(
            request.id,
            unknown=lambda: _unknown_job(task, args, kwargs),
            publication=_eager_publication(task) if request.is_eager else request.get("publication") or 1,
            worker_id=app.worker_id,
            lease=app.leases.eager if request.is_eager else app.lease,
            judge=judge_now,
            max_deaths=app.settings.max_deaths,
        )
    )


def _eager_publication(task: "Job") -> int:
    """The publication under which `apply()` runs a job in the caller's process, where no message says it: that of
    its row, if it has one. A retry is such a run inside of the attempt that asks for it, which is ended here.
    """
    store, request = task.app.store, task.request
    row = store.job(request.id)
    if row is None:
        return 1
    mine = (Status.RUNNING, task.app.leases.eager, task.app.worker_id)
    is_own = (row["status"], row["lease"], row["claimed_by"]) == mine
    if is_own and request.retries:
        store.requeue(request.id, attempt=row["attempt"], event=Event.RETRY, retry_count=request.retries)
    return int(row["publication"]) + (is_own and bool(request.retries))


def _unknown_job(task: "Job", args: Any, kwargs: Mapping[str, Any]) -> NewJob:
    """The row of a message that has none: another client's. One of ours that is so old has outlived its job, which
    ended, and was removed.
    """
    sent_at, days = task.request.get("published_at"), task.app.settings.retention_days
    if isinstance(sent_at, (int, float)) and time.time() - sent_at > days * 86400:
        reason = f"its row is gone, and its message is older than RETENTION_DAYS={days:g}; submit it anew"
        logger.warning("%s[%s] not run: %s", task.name, task.request.id, reason)
        raise Ignore(reason)
    return job_of_request(task, task.request, args, kwargs)


def _begin(task: "Job", claim: Claim, args: Any, kwargs: Mapping[str, Any]) -> None:
    task.request.attempt = claim.attempt
    task.request.claimed_at, task.request.waited_before_s = time.monotonic(), task.app.waited_s
    if claim.attempt > 1:  # whoever closed an earlier one may not have been able to clean up after it
        remove_temp_files(task, (args, kwargs), task.request.id, up_to=claim.attempt - 1)
    if claim.decision is Decision.POISON:
        raise poisoned(claim.deaths, task.app.settings.max_deaths)


def _pass_by(task: "Job", claim: Claim) -> NoReturn:
    request, decision = task.request, claim.decision
    if decision is Decision.COMPLETED and request.chord:  # whoever completed it may have died before it told that
        task.backend.on_chord_part_return(request, "SUCCESS", None, is_again=True)
        task.app.store.settle(request.id)
    held = f" by {claim.holder}" if claim.holder else ""
    logger.info("%s[%s] not run: %s%s", task.name, request.id, decision.value, held)
    raise Ignore(decision.value)


def given_back(task: "Job", reason: str) -> Ignore | PermanentError:
    """The attempt ends without fault of the job, which is queued again; an eager run has nobody to be given to."""
    request, close = task.request, task.app.store.close
    if request.is_eager:
        return PermanentError(reason)
    task.app.in_the_end(lambda: close(request.id, request.attempt, event=Event.RELEASED, reason=reason, is_death=False))
    return Ignore("it was given back")


def poisoned(deaths: int, max_deaths: int) -> WorkerLost:
    """The error of a job that was running whenever its workers died."""
    return WorkerLost(
        f"{deaths} workers died while running this job (MAX_DEATHS={max_deaths}); look at its input, then replay it"
    )


def is_spared(app: "MediaTasks", job_id: str) -> bool:
    """Whether an attempt whose time goes by in an outage of the job database is given back, instead of failing the job.

    A body that hangs does so too while the database comes and goes: after SPARED_AT_MOST such attempts in a row the
    limit holds.
    """
    ends = [log["message"] for log in app.store.logs(job_id) if log["event_type"] in _ENDS_ATTEMPT]
    return ends[-SPARED_AT_MOST:] != [NO_ANSWER] * SPARED_AT_MOST


def close_out_of_time(app: "MediaTasks", row: Row, error: JobTimeout) -> None:
    """End the attempt that a row stands at: its process was killed at its time limit, in an outage that let nobody say
    so. The job is given back, or fails with `error` if it was spared too often.
    """
    if is_spared(app, row["job_id"]):
        close_attempt(app, row, NO_ANSWER, is_death=False)
    else:
        _fail_attempt(app, row, error)


def close_eager(app: "MediaTasks", row: Row) -> None:
    """End the attempt that a row stands at, which a process ran by `apply()` that has died: the job fails."""
    _fail_attempt(app, row, WorkerLost("the process that ran it by apply() died; replay it, or call it again"))


def _fail_attempt(app: "MediaTasks", row: Row, error: Exception) -> None:
    """Fail the job of an attempt whose process is gone, unless that attempt runs no more."""
    remove_temp_files_of_row(app, row)
    request = request_of_row(row)
    request.attempt = row["attempt"]
    app.backend.mark_as_failure(row["job_id"], error, request=request)


def close_attempt(app: "MediaTasks", row: Row, reason: str, *, is_death: bool = True) -> Closed | None:
    """End the attempt that a row stands at, since its process is gone, or is about to be: its temp files are removed,
    and the job rests until it is published anew; after one death too many it fails.

    None, and nothing of the row is changed, if that attempt runs no more: so a second call does no harm. A process that
    dies in between leaves a job that rests, and that the next claim fails.
    """
    event = Event.LOST if is_death else Event.RELEASED
    closed = app.store.close(row["job_id"], row["attempt"], event=event, reason=reason, is_death=is_death)
    remove_temp_files_of_row(app, row)
    max_deaths = app.settings.max_deaths
    if closed is not None and is_death and closed.deaths >= max_deaths:
        error = poisoned(closed.deaths, max_deaths)
        logger.error("%s[%s]: %s", row["task_type"], row["job_id"], error)
        app.backend.mark_as_failure(row["job_id"], error, request=request_of_row(row, publication=closed.publication))
    return closed
