"""Groups and chords in the tables, and what follows from the end of a job that is part of a canvas."""

from datetime import datetime
from typing import Any

from sqlalchemy import select, update

from db import statements
from db.models import task_groups, task_queue
from db.records import ChordParts, Row, Sequel, now
from db.statements import UNSUCCESSFUL, is_one_of, of_job
from db.store.base import Part


class Canvases(Part):
    """Members are counted by their rows; who finds the last one fires the chord."""

    def save_group(self, group_id: str, members: Any) -> None:
        """Keep the ids of a group's members, for `GroupResult.restore`."""
        self._upsert_group(group_id, {"members": members})

    def group(self, group_id: str) -> Any:
        """The members, as they were saved; None if they never were, or are forgotten."""
        with self._reading() as connection:
            statement = select(task_groups.c.members).where(task_groups.c.group_id == group_id)
            return connection.execute(statement).scalar()

    def forget_group(self, group_id: str) -> None:
        """Forget who its members are. Their rows stay, and a chord goes on counting them."""
        self._upsert_group(group_id, {"members": None})

    def set_chord_size(self, group_id: str, size: int) -> None:
        """How many members a chord has; known before the last one is sent."""
        self._upsert_group(group_id, {"size": size})

    def _upsert_group(self, group_id: str, values: dict[str, Any]) -> None:
        statement = (
            self._insert(task_groups)
            .values(group_id=group_id, created_at=now(), **values)
            .on_conflict_do_update(index_elements=["group_id"], set_=values)
        )
        with self._changing() as connection:
            connection.execute(statement)

    def chord_parts(self, group_id: str, size: int | None) -> ChordParts:
        """Count a chord's ended members. The one call that finds all completed, or the first that finds one failed,
        gets `is_mine`: an atomic update, so the body is published once, however often members are delivered.

        Call it after the member's end is committed: whoever ends last then sees all the others.
        """
        bound = {"b_group_id": group_id}
        with self._reading() as connection:
            chord = connection.execute(statements.CHORD, bound).one()
            if not chord.is_failed:
                total = size if chord.size is None else chord.size
                if chord.is_running or total is None:
                    return ChordParts(is_mine=False, is_failed=False)
                if connection.execute(statements.CHORD_COMPLETED, bound).scalar_one() < total:
                    return ChordParts(is_mine=False, is_failed=False)
        is_mine = self._fire(group_id)
        if chord.is_failed:
            return ChordParts(is_mine, is_failed=True)
        with self._reading() as connection:
            results = tuple(connection.execute(statements.CHORD_RESULTS, bound).scalars())
        return ChordParts(is_mine, is_failed=False, results=results)

    def _fire(self, group_id: str) -> bool:
        """Whether this call is the one that fires the chord, the first of all."""
        with self._writing("fire", group_id) as (connection, at, earlier):
            firing = (
                self._insert(task_groups)
                .values(group_id=group_id, created_at=at, fired_at=at)
                .on_conflict_do_update(
                    index_elements=["group_id"], set_={"fired_at": at}, where=task_groups.c.fired_at.is_(None)
                )
                .returning(task_groups.c.fired_at)
            )
            if connection.execute(firing).scalar() is not None:
                return True
            if not earlier:
                return False
            fired = select(task_groups.c.fired_at).where(task_groups.c.group_id == group_id)
            return connection.execute(fired).scalar() in earlier

    def failed_member(self, group_id: str) -> Row | None:
        """The member that failed or was cancelled first: the reason why its chord fails."""
        with self._reading() as connection:
            statement = (
                select(task_queue)
                .where(task_queue.c.group_id == group_id, task_queue.c.in_chord, is_one_of(UNSUCCESSFUL))
                .order_by(task_queue.c.completed_at, task_queue.c.id)
                .limit(1)
            )
            return connection.execute(statement).mappings().one_or_none()

    # What follows from an end: told right after it; the reconciler tells what a death left untold

    def settle(self, job_id: str) -> None:
        """What follows from the end of this job has been told."""
        with self._changing() as connection:
            statement = update(task_queue).where(of_job, task_queue.c.sequel == Sequel.DUE).values(sequel=Sequel.TOLD)
            connection.execute(statement, {"b_job_id": job_id})

    def unsettled(self, before: datetime, limit: int = 100) -> list[Row]:
        """Jobs that ended before this time, whose chords, chains and errbacks may not have heard of it."""
        statement = (
            select(task_queue)
            .where(task_queue.c.sequel == Sequel.DUE, task_queue.c.completed_at < before)
            .order_by(task_queue.c.completed_at)
            .limit(limit)
        )
        return self._rows(statement)
