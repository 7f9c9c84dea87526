"""What commands print: text that a terminal can take, times of day, tables, and JSON.

In: values of rows, and what file names and errors hold. Out: one line for each, whatever stands in them.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

UNLIMITED_COLUMNS = 10_000
LONGEST_CELL = 200


def console_for(ctx: click.Context, *, stderr: bool = False) -> "Console":
    """A console as wide as the terminal; without one, lines are never cut or folded, unless COLUMNS is set."""
    import os

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    is_limited = stream.isatty() or "COLUMNS" in os.environ
    no_color = True if ctx.find_root().obj.no_color else None
    return Console(
        stderr=stderr, width=None if is_limited else UNLIMITED_COLUMNS, no_color=no_color, highlight=False, emoji=False
    )


def table_for(console: "Console") -> "Table":
    """A table without columns yet: ruled on a terminal, bare in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    box = SIMPLE_HEAD if console.width < UNLIMITED_COLUMNS else None
    return Table(box=box, show_edge=False, pad_edge=False, padding=(0, 1 if box else 2, 0, 0))


def printable(text: str) -> str:
    """`text` on one line, without what could steer a terminal: file names may hold newlines and escape codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str) -> "Text":
    """Free text on one line: where there is no room, its end gives way to an ellipsis."""
    from rich.text import Text

    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def abridged(text: str) -> str:
    """Free text of a length that a table bears without a terminal, too: what gives way is its middle, since a reason
    begins with its kind and ends with its remedy.
    """
    half = LONGEST_CELL // 2
    return text if len(text) <= LONGEST_CELL else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[1 - half :]}"


def line(*parts: str) -> str:
    """What is not empty of a line's parts, printable."""
    return printable("  ".join(filter(None, parts)).rstrip())


def remark(text: str) -> None:
    """Say something apart from the output."""
    click.echo(printable(text), err=True)


def counted(number: int, noun: str) -> str:
    """`1 job`, `1,200 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(at: datetime) -> str:
    """The time of day, here; with its date unless that is today."""
    here = at.astimezone()
    is_today = here.date() == datetime.now().astimezone().date()
    return f"{here:%H:%M:%S}" if is_today else f"{here:%m-%d %H:%M}"


def shown(value: Any) -> str:
    """A column's value, in full."""
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="milliseconds")
    return json.dumps(value, default=_plain) if isinstance(value, (dict, list)) else printable(str(value))


def as_json(row: Mapping[str, Any]) -> str:
    """One JSON object, times as ISO text."""
    return json.dumps(dict(row), default=_plain)


def echo_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    for row in rows:
        click.echo(as_json(row))


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
