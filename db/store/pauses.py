"""Queues that are paused: durable, with a reason and, if wanted, an end. Nothing of a paused queue is claimed."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import ColumnElement, delete, or_, select

from db.models import queue_pauses
from db.records import Row, now
from db.store.base import Part, text


class Pauses(Part):
    """Set, end and list pauses."""

    def pause(self, queue: str, *, reason: str = "", until: datetime | None = None) -> None:
        """Pause a queue, or change the reason and the end of its pause."""
        values = {"reason": text(reason), "paused_at": now(), "paused_until": until}
        statement = self._insert(queue_pauses).values(queue=queue, **values)
        with self._changing() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["queue"], set_=values))

    def resume(self, queue: str) -> bool:
        """End a pause; False if there was none."""
        with self._changing() as connection:
            return connection.execute(delete(queue_pauses).where(queue_pauses.c.queue == queue)).rowcount == 1

    def paused(self) -> list[Row]:
        """The pauses in force."""
        return self._rows(select(queue_pauses).where(_in_force()).order_by(queue_pauses.c.queue))

    def paused_queues(self) -> Collection[str]:
        """The names of the queues whose pauses are in force."""
        return {row["queue"] for row in self.paused()}

    def forget_ended_pauses(self) -> None:
        """Remove the rows of pauses whose time is over."""
        with self._changing() as connection:
            connection.execute(delete(queue_pauses).where(~_in_force()))


def _in_force() -> ColumnElement[bool]:
    return or_(queue_pauses.c.paused_until.is_(None), queue_pauses.c.paused_until > now())
