"""Havoc: a schedule of blows by a seed, and a loop that deals them. In: crew, servers, disk. Out: the crew's blows.

What a blow hits depends on who is alive then; when it comes, its kind and its length depend on the seed alone.
"""

import random
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from tests.chaos.crew import Crew, Post
from tests.chaos.disk import SmallDisk
from tests.chaos.servers import Harm, Hold, Server

FIRST_AFTER_S = 2.0
KILLS = {"kill child": 55, "kill worker": 30, "kill main": 15}
AT_ONCE = 12
LOOK_AGAIN_S = 0.05
# A blow waits for so long for somebody who is at work.
FOR_WORK_S = 2.0
# And so long for anybody who is alive: then something has ended them all.
FOR_ANYBODY_S = 90.0
# A full disk lasts for less than the retries of a job take together.
LONGEST_FULL_S = 2.0
LONG_S = 66.0


@dataclass(frozen=True)
class Planned:
    """One blow to come: seconds after the start, what, how long, and the seed of whom it hits."""

    at_s: float
    kind: str
    lasts_s: float
    seed: int

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind}" + (f" for {self.lasts_s:.1f} s" if self.lasts_s else "")


class Havoc:
    """All that can be done to a combination, and when it is done."""

    def __init__(
        self,
        crew: Crew,
        servers: Mapping[str, Server],
        disk: SmallDisk | None,
        chance: random.Random,
        *,
        kills: int,
        seconds: float,
    ) -> None:
        self._crew = crew
        self._over = threading.Event()
        self._locks: dict[str, threading.Lock] = {}
        self._servers: dict[str, tuple[str, Harm]] = {
            kind: (resource, harm) for resource, server in servers.items() for kind, harm in server.harms.items()
        }
        if disk is not None:
            self._servers["disk full"] = ("disk", disk.fill)
        self._on_workers: dict[str, Callable[[Post, random.Random, Hold], bool | None]] = {
            "kill child": lambda post, chance, _: crew.kill_child(post, chance),
            "kill worker": lambda post, chance, _: crew.kill_worker(post, chance),
            "kill main": lambda post, chance, _: crew.kill_main(post, chance),
            "terminate worker": lambda post, chance, _: crew.terminate(post, chance),
            "stop child": crew.freeze_child,
            "stop worker": crew.freeze_worker,
            "stop main": crew.freeze_main,
        }
        self.errors: list[str] = []
        self.schedule = self._planned(chance, kills, seconds)

    def _planned(self, chance: random.Random, kills: int, seconds: float) -> list[Planned]:
        kinds = chance.choices(list(KILLS), list(KILLS.values()), k=kills)
        others = [*(kind for kind in self._on_workers if kind not in KILLS), *self._servers]
        while len(kinds) < kills + max(len(others), kills * 2 // 3):
            chance.shuffle(others)
            kinds += others
        planned = [self._plan(chance, kind, chance.uniform(FIRST_AFTER_S, seconds)) for kind in kinds]
        return sorted([*planned, *self._long_ones(chance, seconds)], key=lambda blow: blow.at_s)

    def _long_ones(self, chance: random.Random, seconds: float) -> list[Planned]:
        """In a long storm, one after the other: what is away for longer than a silent worker is believed to live."""
        kinds = ["stop worker", *(kind for kind in self._servers if kind.endswith(" frozen"))]
        span = (seconds - FIRST_AFTER_S) / len(kinds)
        if span < LONG_S:
            return []
        begins = [FIRST_AFTER_S + number * span + chance.uniform(0, span - LONG_S) for number in range(len(kinds))]
        return [Planned(at_s, kind, LONG_S, chance.getrandbits(32)) for at_s, kind in zip(begins, kinds, strict=True)]

    @staticmethod
    def _plan(chance: random.Random, kind: str, at_s: float) -> Planned:
        lasts_s = 0.0
        if kind == "disk full":
            lasts_s = chance.uniform(0.5, LONGEST_FULL_S)
        elif kind.startswith("stop ") or kind.endswith((" stopped", " frozen", " locked")):
            lasts_s = chance.uniform(1.0, 8.0)
        return Planned(at_s, kind, lasts_s, chance.getrandbits(32))

    def run(self) -> None:
        """Deal the blows when they are due; returns when the last one is over."""
        start = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE, "havoc") as hands:
            for planned in self.schedule:
                if self._over.wait(max(0.0, planned.at_s - (time.monotonic() - start))):
                    return
                hands.submit(self._deal, planned)

    def stop(self) -> None:
        self._over.set()

    def _deal(self, planned: Planned) -> None:
        def hold() -> None:
            self._over.wait(planned.lasts_s)

        try:
            if planned.kind in self._servers:
                self._harm(planned.kind, hold)
            else:
                self._hit(planned, hold)
        except Exception:
            self.errors.append(f"{planned}:\n{traceback.format_exc()}")

    def _harm(self, kind: str, hold: Hold) -> None:
        resource, harm = self._servers[kind]
        with self._locks.setdefault(resource, threading.Lock()):
            blow = self._crew.blow(kind)
            try:
                harm(hold)
            finally:
                blow.over()

    def _hit(self, planned: Planned, hold: Hold) -> None:
        """Someone alive, however long it takes to find one, so that as many are dealt as were planned. A worker that is
        stopped can be killed meanwhile; all else waits for its turn.
        """
        chance = random.Random(planned.seed)  # noqa: S311 (no secret)
        deal, is_stop = self._on_workers[planned.kind], planned.kind.startswith("stop ")
        began = time.monotonic()
        while not self._over.is_set():
            waited_s = time.monotonic() - began
            post = self._crew.victim(chance)
            if waited_s > FOR_ANYBODY_S:
                self.errors.append(f"{planned}: found nobody to hit")
                return
            if post is not None and (self._crew.is_busy(post) or waited_s > FOR_WORK_S):
                with nullcontext() if is_stop else post.lock:
                    if post.worker.is_alive() and deal(post, chance, hold) is not False:
                        return
            self._over.wait(LOOK_AGAIN_S)
