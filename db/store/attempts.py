"""One job's way through its row: claimed, closed or requeued, ended; each a single atomic change."""

from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, update

from db import statements
from db.models import task_queue, worker_leases
from db.records import (
    UNFENCED,
    Claim,
    Closed,
    Decision,
    Event,
    Failure,
    Fence,
    Holder,
    Liveness,
    NewJob,
    Publication,
    Row,
    Status,
    now,
)
from db.statements import ACTIVE, RETURNED, UNFINISHED, is_one_of, of_attempt, of_job
from db.store.base import Part, failure_columns, log, log_failure, publication_at, standing_of, text

Judge = Callable[[Holder], Liveness]


class Attempts(Part):
    """What becomes of a message: an attempt, and its end."""

    def claim(
        self,
        job_id: str,
        *,
        unknown: Callable[[], NewJob],
        publication: int,
        worker_id: str,
        lease: str | None,
        judge: Judge,
        max_deaths: int,
    ) -> Claim:
        """Claim the job for one attempt, in one atomic step: queued -> claimed + running.

        A row that is running already is taken over if its holder is dead: that attempt is closed and counts as a death,
        and from `max_deaths` on the claim is POISON: claimed, to be failed by the caller. A job without a row (its
        message came from another Celery client) gets one first. A job of a paused queue goes to rest.

        Args:
            unknown: Makes the row of a message that has none; called only then.
            judge: Tells from the holder's lease whether it lives. While that is UNCERTAIN the claim is, and changes
                nothing: it may be repeated.
        """
        with self._writing("claim", job_id, publication, worker_id) as (connection, at, earlier):
            bound = {
                "b_job_id": job_id,
                "b_publication": publication,
                "b_worker": worker_id,
                "b_lease": lease,
                "b_now": at,
            }
            row = statements.CLAIM.execute(connection, bound)
            if row is None and standing_of(connection, job_id) is None:
                self._insert_job(connection, unknown(), worker_id, at, publication)
                row = statements.CLAIM.execute(connection, bound)
            if row is not None:
                return _running(row.attempt, row.deaths, max_deaths)
            standing = connection.execute(statements.STANDING, bound).mappings().one()
            if (decision := _decision(standing, publication)) is not None:
                return Claim(decision)
            if standing["status"] == Status.QUEUED:
                self.rest(job_id, publication)
                return Claim(Decision.PAUSED)
            if standing["claimed_at"] in earlier:
                return _running(standing["attempt"], standing["deaths"], max_deaths)
            return self._take_over(connection, standing, bound, judge, max_deaths)

    def _take_over(
        self,
        connection: Connection,
        standing: Row,
        bound: dict[str, Any],
        judge: Judge,
        max_deaths: int,
    ) -> Claim:
        """Close an attempt whose holder is dead, and claim the job anew."""
        holder = standing["claimed_by"]
        liveness = self._liveness(connection, standing["lease"], judge)
        if liveness is not Liveness.DEAD:
            is_alive = liveness is Liveness.ALIVE
            return Claim(Decision.HELD if is_alive else Decision.UNCERTAIN, holder=holder)
        with self.database.transaction():
            closed = _close(connection, bound, standing["attempt"], Event.LOST, "its worker died", is_death=True)
            if closed is None:
                return Claim(Decision.HELD, holder=holder)
            row = statements.CLAIM.execute(connection, bound)
            if row is None:
                self.rest(bound["b_job_id"], closed.publication)
                return Claim(Decision.PAUSED)
        return _running(row.attempt, row.deaths, max_deaths, holder)

    def _liveness(self, connection: Connection, lease: str | None, judge: Judge) -> Liveness:
        """Whether the holder lives: as far as is known, without a lease (an eager run); no more, if it has no row."""
        if lease is None:
            return Liveness.ALIVE
        holders = self._holders(connection, worker_leases.c.lease == lease)
        return judge(holders[0]) if holders else Liveness.DEAD

    def close(
        self,
        job_id: str,
        attempt: int,
        *,
        event: Event = Event.LOST,
        reason: str,
        is_death: bool = True,
    ) -> Closed | None:
        """End an attempt whose process is dead or gives the job back: running -> queued; None if it is not running.

        The job rests, and is published anew by the dispatcher.
        """
        key = ("close", job_id, attempt)
        with self._writing(*key) as (connection, at, earlier), self.database.transaction():
            bound = {"b_job_id": job_id, "b_now": at}
            closed = _close(connection, bound, attempt, event, reason, is_death=is_death, due_at=self._clock())
            if closed is None and earlier:
                standing = standing_of(connection, job_id)
                if standing is not None and standing["updated_at"] in earlier:
                    return Closed(standing["attempt"], standing["publication"], standing["deaths"])
            return closed

    def requeue(
        self,
        job_id: str,
        *,
        attempt: int,
        event: Event,
        retry_count: int,
        run_after_utc: datetime | None = None,
        delay_s: float = 0.0,
        failure: Failure | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> Publication | None:
        """End `attempt` and queue the job again under the next publication; None if it came too late.

        With `run_after_utc`, or a `delay_s` above 0 (from now, by the database's clock), it rests until then. Else its
        message is the caller's to send, and counts as lost if the caller dies before: the reconciler publishes the job
        again. `changed` are columns of what runs from now on: other arguments, another task.
        """
        is_resting = run_after_utc is not None or delay_s > 0
        with self._writing("requeue", job_id, attempt) as (connection, at, earlier), self.database.transaction():
            row = connection.execute(
                update(task_queue)
                .where(of_attempt)
                .values(
                    status=Status.QUEUED,
                    publication=task_queue.c.publication + 1,
                    retry_count=retry_count,
                    run_after_utc=self._clock(-delay_s) if delay_s > 0 else run_after_utc,
                    published_at=None if is_resting else at,
                    progress=0.0,
                    stage=None,
                    updated_at=at,
                    sequence=task_queue.c.sequence + 1,
                    **failure_columns(failure),
                    **(changed or {}),
                )
                .returning(*RETURNED, task_queue.c.run_after_utc),
                {"b_job_id": job_id, "b_attempt": attempt},
            ).one_or_none()
            if row is None:
                return publication_at(connection, job_id, earlier, is_resting, has_begun=True)
            due_at = row.run_after_utc
            details = {"retry_count": retry_count, "run_after_utc": due_at and due_at.isoformat()}
            log_failure(connection, job_id, row.sequence, event, row.claimed_by, at, failure, details)
            return Publication(row.publication, row.priority, is_resting, has_begun=True)

    def rest(self, job_id: str, publication: int, *, delay_s: float = 0.0) -> bool:
        """Let a queued job rest until `delay_s` from now: its message could not be sent, or came to a paused queue."""
        resting = statements.REST.values(run_after_utc=self._clock(-delay_s))
        with self._changing() as connection:
            return connection.execute(resting, {"b_job_id": job_id, "b_publication": publication}).rowcount == 1

    def owns(self, job_id: str, attempt: int) -> bool:
        """The fencing check: whether `attempt` is still the running one."""
        with self._reading() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt}
            return statements.OWNS.first(connection, bound) is not None

    def progress(self, job_id: str, attempt: int, *, percent: float, stage: str | None = None) -> bool:
        """Write how far the attempt is, 0-100; it never falls. Not a transition: no log row, no sequence number."""
        with self._changing() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt, "b_progress": percent, "b_now": now()}
            return connection.execute(statements.PROGRESS, bound | {"b_stage": text(stage, 255)}).rowcount == 1

    def complete(self, job_id: str, attempt: int, result: Any) -> bool:
        """running -> completed. False if this attempt no longer owns the job; True again when it is repeated."""
        with self._changing() as connection:
            bound = {"b_job_id": job_id, "b_attempt": attempt, "b_result": result, "b_now": now(), "b_worker": None}
            if statements.COMPLETE.execute(connection, bound) is not None:
                return True
            return _has_ended(connection, job_id, Status.COMPLETED, attempt)

    def end(
        self,
        job_id: str,
        status: Status,
        failure: Failure,
        *,
        fence: Fence = UNFENCED,
        unknown: Callable[[], NewJob] | None = None,
        was_sent: bool = True,
    ) -> bool:
        """Any unfinished status -> failed or cancelled.

        False if it came too late, or there is no such job; True again when it is repeated by the attempt, or after a
        lost connection.

        Args:
            unknown: Makes the row of a job that has none, which gets one, ended. Not that of an attempt: it had a row,
                and if that is gone, so is its job.
            was_sent: Whether that job had a message. One that waited for another job is never `published_at` a time.
        """
        key = ("end", job_id, status.value, fence.attempt, fence.publication)
        with self._writing(*key) as (connection, at, earlier), self.database.transaction():
            ending = (
                update(task_queue)
                .where(of_job, *_holds(fence))
                .values(
                    status=status,
                    completed_at=at,
                    updated_at=at,
                    sequel=statements.SEQUEL_DUE,
                    sequence=task_queue.c.sequence + 1,
                    **failure_columns(failure),
                )
                .returning(*RETURNED)
            )
            row = connection.execute(ending, {"b_job_id": job_id}).one_or_none()
            if row is None and unknown is not None and fence.attempt is None:
                self._insert_job(connection, unknown(), None, at, fence.publication or 1, was_sent=was_sent)
                row = connection.execute(ending, {"b_job_id": job_id}).one_or_none()
            if row is None:
                return _has_ended(connection, job_id, status, fence.attempt, earlier)
            log_failure(connection, job_id, row.sequence, Event(status), row.claimed_by, at, failure, {})
            return True


def _holds(fence: Fence) -> Iterator[ColumnElement[bool]]:
    """The fence, in SQL."""
    if fence.attempt is not None:
        yield task_queue.c.attempt == fence.attempt
        yield is_one_of(ACTIVE)  # one that has queued its job again has nothing more to end
    elif fence.publication is not None:
        yield task_queue.c.publication == fence.publication
        yield is_one_of(UNFINISHED if fence.may_run else [Status.QUEUED])
    else:
        yield is_one_of(UNFINISHED)


def _has_ended(
    connection: Connection, job_id: str, status: Status, attempt: int | None, at: Collection[datetime] = ()
) -> bool:
    """Whether the job was ended in this way by this attempt, or at one of these times."""
    standing = standing_of(connection, job_id) if attempt is not None or at else None
    if standing is None or standing["status"] != status:
        return False
    return standing["attempt"] == attempt or standing["completed_at"] in at


def _running(attempt: int, deaths: int, max_deaths: int, holder: str | None = None) -> Claim:
    decision = Decision.POISON if deaths >= max_deaths else Decision.RUN
    return Claim(decision, attempt=attempt, deaths=deaths, holder=holder)


def _decision(standing: Row, publication: int) -> Decision | None:
    """What a message of this publication is to a row that could not be claimed; None if it is the row's own."""
    status = Status(standing["status"])
    if status.is_terminal:
        return Decision(status.value)
    return None if standing["publication"] == publication else Decision.STALE


def _close(
    connection: Connection,
    bound: dict[str, Any],
    attempt: int,
    event: Event,
    reason: str,
    *,
    is_death: bool,
    due_at: Any = None,
) -> Closed | None:
    statement = statements.CLOSE
    if due_at is not None:  # it rests
        statement = statement.values(**statements.RESTING, run_after_utc=due_at)
    row = connection.execute(statement, bound | {"b_attempt": attempt, "b_deaths": int(is_death)}).one_or_none()
    if row is None:
        return None
    details = {"attempt": attempt, "deaths": row.deaths}
    log(connection, row.job_id, row.sequence, event, row.claimed_by, bound["b_now"], reason, details)
    return Closed(row.attempt, row.publication, row.deaths)
