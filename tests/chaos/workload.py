"""The work: a plan of orders (one submission each, of a job or of a chord) by a seed, and what each job must become."""

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from celery import chord

from tests.chaos.material import BROKEN, Material, Recipe

QUEUES = ("image_resize", "image_conversion", "image_renditions", "recover", "kill_its_worker", "note_parts")
# One of so many jobs. What kills its worker costs every worker a child three times: few are enough.
CHORD_WIDTHS_PX = (320, 640, 1280)
BROKEN_EVERY, RETRY_EVERY, CHORD_EVERY, KILLER_EVERY = 20, 30, 40, 250


@dataclass
class Job:
    """One job: how it is called, and what it must come to."""

    kind: str
    task: str
    kwargs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    recipe: Recipe | None = None
    output: Path | None = None
    notes: Path | None = None
    members: tuple[str, ...] = ()
    is_abandoned: bool = False
    accepted_at: datetime | None = None
    job_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def signature(self, app: Any) -> Any:
        return app.tasks[self.task].signature(kwargs=self.kwargs).set(task_id=self.job_id, **self.options)


@dataclass
class Order:
    """One call of the producer, due `at_s` seconds after the start."""

    at_s: float
    jobs: list[Job]

    @property
    def is_chord(self) -> bool:
        return len(self.jobs) > 1

    def submit(self, app: Any) -> None:
        """Raises what the producer's application would see."""
        signatures = [job.signature(app) for job in self.jobs]
        if self.is_chord:
            chord(signatures[:-1], signatures[-1]).apply_async()
        else:
            signatures[0].apply_async()


class Workload:
    """So many jobs within so many seconds.

    Args:
        outputs: Where outputs are written, into directories that the jobs make.
        notes: A directory for what tasks note.
        small_disk: Where a few of them are written, on a disk that gets full; None if there is none.
    """

    def __init__(
        self,
        material: Material,
        chance: random.Random,
        *,
        jobs: int,
        seconds: float,
        outputs: Path,
        notes: Path,
        small_disk: Path | None,
    ) -> None:
        self._material = material
        self._chance = chance
        self._jobs, self._seconds = jobs, seconds
        self._outputs, self._notes_dir, self._small_disk = outputs, notes, small_disk
        self._made = 0
        self.orders = self._planned()

    def again(self, order: Order) -> Order:
        """A chord that was refused half-way is abandoned by its caller, who makes another one."""
        for job in order.jobs:
            job.is_abandoned = True
        *members, body = [self._anew(job) for job in order.jobs]
        return Order(order.at_s, _chorded(members, body))

    def _planned(self) -> list[Order]:
        groups = list(self._groups())
        places = sorted(self._chance.uniform(0, self._seconds) for _ in groups)
        return [Order(at_s, jobs) for at_s, jobs in zip(places, groups, strict=True)]

    def _groups(self) -> Iterator[list[Job]]:
        left = self._jobs
        groups = [[self._killer()] for _ in range(max(1, self._jobs // KILLER_EVERY))]
        groups += [
            [self._broken(name)] for name, _ in zip(self._names(), range(self._jobs // BROKEN_EVERY), strict=False)
        ]
        groups += [[self._recovering()] for _ in range(max(1, self._jobs // RETRY_EVERY))]
        groups += [self._chord() for _ in range(max(1, self._jobs // CHORD_EVERY))]
        left -= sum(map(len, groups))
        groups += [[self._image()] for _ in range(max(left, 0))]
        self._chance.shuffle(groups)
        yield from groups

    @staticmethod
    def _names() -> Iterator[str]:
        while True:
            yield from BROKEN

    def _path(self, suffix: str, folder: Path | None = None) -> Path:
        self._made += 1
        return (folder or self._outputs) / f"{self._made % 10}" / f"{self._made:05}{suffix}"

    def _notes(self) -> Path:
        """A file in which task bodies leave lines; they don't make its directory."""
        self._made += 1
        return self._notes_dir / f"{self._made:05}.runs"

    def _image(self) -> Job:
        chance, options = self._chance, {}
        if chance.random() < 0.15:
            options = {"priority": chance.randint(1, 10)}
        elif chance.random() < 0.08:
            options = {"countdown": chance.uniform(0.5, 8.0)}
        is_small = self._small_disk is not None and chance.random() < 0.1
        recipe = self._material.resize(chance.choice(self._material.photos), 320, ".jpg") if is_small else None
        return self._of(recipe or self._material.draw(chance), "image", options, self._small_disk if is_small else None)

    def _of(self, recipe: Recipe, kind: str, options: dict[str, Any], folder: Path | None = None) -> Job:
        output = self._path(recipe.suffix, folder)
        return Job(kind, recipe.task, recipe.call(output), options, recipe=recipe, output=output)

    def _broken(self, name: str) -> Job:
        output = self._path(".webp")
        kwargs = {"input": str(self._material.broken(name)), "output": str(output), "width": 640}
        return Job("broken", "image_resize", kwargs, error=BROKEN[name], output=output)

    def _killer(self) -> Job:
        notes = self._notes()
        return Job("killer", "kill_its_worker", {"file": str(notes)}, error="WorkerLost", notes=notes)

    def _recovering(self) -> Job:
        notes = self._notes()
        return Job("retry", "recover", {"file": str(notes)}, notes=notes)

    def _chord(self) -> list[Job]:
        photo = self._chance.choice(self._material.photos)
        members = [self._of(self._material.resize(photo, width, ".jpg"), "member", {}) for width in CHORD_WIDTHS_PX]
        notes = self._notes()
        return _chorded(members, Job("body", "note_parts", {"file": str(notes)}, notes=notes))

    def _anew(self, job: Job) -> Job:
        fresh = replace(job, is_abandoned=False, job_id=str(uuid.uuid4()))
        if job.recipe is not None:
            fresh.output = self._path(job.recipe.suffix)
            fresh.kwargs = job.recipe.call(fresh.output)
        else:
            fresh.notes = self._notes()
            fresh.kwargs = {"file": str(fresh.notes)}
        return fresh


def _chorded(members: list[Job], body: Job) -> list[Job]:
    body.members = tuple(job.job_id for job in members)
    return [*members, body]
