"""Durations and times as people type them: 90, 90s, 10m, 2h, 1d; a time is so long ago, or ISO text."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from tasks.cli.app import ParamType

_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(ParamType):
    """Seconds above 0, for as long as a pause can last; a number without a unit is of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from tasks.control import LONGEST_PAUSE_S

        text = str(value).strip()
        seconds = _seconds_of(f"{text}s" if text[-1:].isdigit() else text)
        if seconds is None or not 0 < seconds <= LONGEST_PAUSE_S:
            longest = f"{LONGEST_PAUSE_S / _SECONDS['d']:.0f}d"
            self.fail(f"{value!r} is no duration such as 90, 90s, 10m, 2h or 1d, up to {longest}", param, ctx)
        return seconds


class Patience(click.FloatRange):
    """Seconds above 0 to wait at most."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):  # which is in every range, since it is neither above nor below anything
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


class Since(ParamType):
    """A time: ISO text (local, unless it says its zone), or how long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        text = str(value).strip()
        try:
            if (seconds := _seconds_of(text)) is not None:
                return datetime.now(UTC) - timedelta(seconds=seconds)
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time such as 10m, 2h, 1d or 2026-03-01T14:30", param, ctx)


def _seconds_of(text: str) -> float | None:
    """The seconds of a number with its unit; None if it is none."""
    match = _DURATION.fullmatch(text.lower())
    return float(match[1]) * _SECONDS[match[2]] if match else None
