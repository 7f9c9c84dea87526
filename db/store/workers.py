"""Workers: their heartbeats, which show them, and their leases, which are the truth about who holds an attempt."""

from collections.abc import Collection
from typing import Final
from uuid import uuid4

from sqlalchemy import ColumnElement, delete, exists, or_, select, update

from db.models import duties, task_queue, worker_heartbeats, worker_leases
from db.records import GONE, Event, Heartbeat, Holder, Row, Status, WorkerStatus, now
from db.statements import ACTIVE, is_one_of
from db.store.base import Part, log, text

IDENTITY: Final = "identity"


class Workers(Part):
    """Heartbeats, leases, and the duties that one worker at a time has."""

    def heartbeat(self, beat: Heartbeat) -> None:
        """Show a worker; its row is made at the first beat."""
        values = {name: getattr(beat, name) for name in beat.__slots__} | {"last_heartbeat": self._clock()}
        values["capabilities"], values["current_tasks"] = list(beat.capabilities), list(beat.current_tasks)
        values["reserved_tasks"] = list(beat.reserved_tasks)
        values["strategy"] = text(beat.strategy, 255)
        statement = self._insert(worker_heartbeats).values(values)
        with self._changing() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["worker_id"], set_=values))

    def log_worker(self, worker_id: str | None, event: Event, message: str) -> None:
        """A change that belongs to no job: a worker's start or stop, a message that could not be read."""
        with self._changing() as connection:
            log(connection, None, 0, event, worker_id, now(), message)

    def workers(self, *, heard_within_s: float | None = None) -> list[Row]:
        """The worker_heartbeats rows; only those alive if `heard_within_s` is given."""
        statement = select(worker_heartbeats).order_by(worker_heartbeats.c.worker_id)
        if heard_within_s is not None:
            statement = statement.where(
                worker_heartbeats.c.last_heartbeat >= self._clock(heard_within_s),
                worker_heartbeats.c.status.not_in(GONE),
            )
        return self._rows(statement)

    def worker_lost(self, worker_id: str, lease: str) -> None:
        """Show that the worker of this lease has died, unless another one of its name has shown itself since."""
        c = worker_heartbeats.c
        with self._changing() as connection:
            statement = update(worker_heartbeats).where(
                c.worker_id == worker_id, c.lease == lease, c.status != WorkerStatus.STOPPED
            )
            connection.execute(statement.values(status=WorkerStatus.LOST, current_tasks=[], reserved_tasks=[]))

    # Leases

    def renew_lease(self, lease: str, worker_id: str, host_id: str) -> None:
        """Say that the holder lives; its row is made at the first call."""
        values = {"lease": lease, "worker_id": worker_id, "host_id": host_id, "renewed_at": self._clock()}
        statement = self._insert(worker_leases).values(values)
        with self._changing() as connection:
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["lease"], set_={"renewed_at": statement.excluded.renewed_at}
                )
            )

    def holders(self, *, worker_id: str | None = None) -> list[Holder]:
        """All leases whose rows are there, of the living and the dead; only those of one worker, if it is named."""
        where = [worker_leases.c.worker_id == worker_id] if worker_id is not None else []
        with self._reading() as connection:
            return self._holders(connection, *where)

    def held_by(self, worker_id: str, lease: str) -> list[Row]:
        """The rows whose running attempt this worker's lease holds."""
        return self._under(worker_id, lease, is_one_of(ACTIVE))

    def held_by_nobody(self, *, for_s: float) -> list[Row]:
        """The rows whose attempt has run for so long under a lease whose row is gone. A worker that lives makes it
        again when it renews.
        """
        c = task_queue.c
        is_gone = ~exists().where(worker_leases.c.lease == c.lease)
        old = c.claimed_at <= self._clock(for_s)
        return self._rows(select(task_queue).where(is_one_of(ACTIVE), c.lease.is_not(None), is_gone, old))

    def cancelled_under(self, worker_id: str, lease: str) -> list[Row]:
        """The rows that were cancelled while this worker's lease held their attempt."""
        return self._under(worker_id, lease, task_queue.c.status == Status.CANCELLED)

    def _under(self, worker_id: str, lease: str, standing: ColumnElement[bool]) -> list[Row]:
        c = task_queue.c
        return self._rows(select(task_queue).where(c.claimed_by == worker_id, standing, c.lease == lease))

    def cancelled_of(self, job_ids: Collection[str]) -> set[str]:
        """Which of these jobs are cancelled."""
        c = task_queue.c
        statement = select(c.job_id).where(c.job_id.in_(job_ids), c.status == Status.CANCELLED)
        with self._reading() as connection:
            return set(connection.execute(statement).scalars())

    def forget_lease(self, lease: str) -> bool:
        """Remove a lease that is given back or dead; False if it is kept, since it still holds an attempt."""
        holds = exists().where(
            task_queue.c.claimed_by == worker_leases.c.worker_id, is_one_of(ACTIVE), task_queue.c.lease == lease
        )
        with self._changing() as connection:
            return connection.execute(delete(worker_leases).where(worker_leases.c.lease == lease, ~holds)).rowcount == 1

    # Duties

    def duty_holder(self, name: str) -> str | None:
        """The lease of who has this duty."""
        with self._reading() as connection:
            return connection.execute(select(duties.c.holder).where(duties.c.name == name)).scalar()

    def take_duty(self, name: str, lease: str, *, after: str | None) -> bool:
        """Take over a duty from the holder `after`, who is dead or nobody; of several callers one gets it."""
        values = {"holder": lease, "since": now()}
        statement = (
            self._insert(duties)
            .values(name=name, **values)
            .on_conflict_do_update(
                index_elements=["name"],
                set_=values,
                where=or_(duties.c.holder.is_not_distinct_from(after), duties.c.holder == lease),
            )
            .returning(duties.c.holder)
        )
        with self._changing() as connection:
            return connection.execute(statement).scalar() == lease

    def leave_duty(self, name: str, lease: str) -> None:
        """Give a duty back, for whoever asks next; nothing if another lease holds it. Its `position` stays."""
        with self._changing() as connection:
            statement = update(duties).where(duties.c.name == name, duties.c.holder == lease)
            connection.execute(statement.values(holder=None))

    def identity(self) -> str:
        """Names these tables, so that a connection can be recognised as one to them; kept among the duties."""
        with self._writing("identity") as (connection, at, _):
            new = self._insert(duties).values(name=IDENTITY, holder=uuid4().hex, since=at)
            connection.execute(new.on_conflict_do_nothing(index_elements=["name"]))
            return str(connection.execute(select(duties.c.holder).where(duties.c.name == IDENTITY)).scalar_one())
