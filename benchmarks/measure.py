"""How things are compared: side by side in the same minutes, as ratios, by the median over rounds."""

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

Contender = Callable[..., float]
"""Does the work once and returns its rate, or its time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for on the command line. `folder` is scratch space on a real disk; it goes at the end."""

    is_quick: bool
    repeats: int | None
    photos: Path | None
    folder: Path

    def rounds(self, quick: int, full: int) -> int:
        """How many rounds to run: `--repeat`, or what the figure needs."""
        return self.repeats or (quick if self.is_quick else full)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `value` is the plain number, for `--json`; None if it was skipped."""

    figure: str
    target: str
    measured: str
    detail: str = ""
    value: float | None = None


def skipped(figure: str, target: str, reason: str) -> Row:
    return Row(figure=figure, target=target, measured=f"skipped: {reason}")


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run A B C, A B C, ...; every second round backwards, so that none always follows the same other."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in names:
            results[name].append(contenders[name]())
    return results


def ratio_row(
    figure: str, target: str, ours: Sequence[float], theirs: Sequence[float], *, unit: str, against: str
) -> Row:
    """Ours over theirs, round by round: the median ratio and its extremes, then the medians themselves."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    value = statistics.median(ratios)
    return Row(
        figure=figure,
        target=target,
        measured=f"**{value:.2f}** ({min(ratios):.2f}-{max(ratios):.2f})",
        detail=f"{_short(statistics.median(ours))} {unit} against {_short(statistics.median(theirs))} of {against}; "
        f"{len(ratios)} rounds",
        value=value,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def percentile_row(
    figure: str, target: str, values: Sequence[float], *, unit: str, digits: int = 0, note: str = ""
) -> Row:
    """The 99th percentile of what so many jobs took, then the median and the extremes; `digits` after the point."""
    nearly_all = percentile(values, 99)
    half, least, most = (f"{value:.{digits}f}" for value in (percentile(values, 50), min(values), max(values)))
    return Row(
        figure=figure,
        target=target,
        measured=f"**{nearly_all:.{digits}f} {unit}**",
        detail=f"{note}p50 {half} {unit}, {least}-{most} {unit}, {len(values)} jobs",
        value=nearly_all,
    )


class Peer(AbstractContextManager["Peer"]):
    """A process of its own, with an environment of its own, that runs functions one after the other.

    Producers stand in one each, since the settings of `tasks` are read once per process. `shared` (a value of
    multiprocessing) is `Peer.shared` there.
    """

    shared: ClassVar[Any] = None

    def __init__(self, environment: Mapping[str, str] | None = None, *, shared: Any = None) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_begin, initargs=(dict(environment or {}), shared)
        )

    def start(self, function: Callable[..., Any], *args: Any) -> Any:
        """Begin; the future has the result."""
        return self._pool.submit(function, *args)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.start(function, *args).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _begin(environment: dict[str, str], shared: Any) -> None:
    os.environ.update(environment)
    Peer.shared = shared


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
