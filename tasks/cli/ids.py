"""The ids of jobs as people type them: whole, or the first characters."""

from typing import TYPE_CHECKING

import click

from tasks.cli.text import printable

if TYPE_CHECKING:
    from db.records import Row
    from db.store import Store

SHOWN_IDS = 5


def job_row(store: "Store", job_id: str) -> "Row":
    """The row of the one job whose id this is, or begins so; ids that we make are written in small letters.

    Raises:
        click.ClickException: There is none, or more than one.
    """
    return store.job(job_id) or _by_prefix(store, job_id)


def _by_prefix(store: "Store", prefix: str) -> "Row":
    found: list[Row] = []
    for typed in (prefix, prefix.lower()) if prefix else ():
        found = found or store.jobs(id_prefix=typed, limit=SHOWN_IDS + 1)
    if len(found) == 1:
        return found[0]
    if not found:
        raise click.ClickException(f"no job's id starts with {prefix!r}; celery -A tasks jobs list shows them")
    ids = [printable(row["job_id"]) for row in found]
    more = ", ..." if len(ids) > SHOWN_IDS else ""
    raise click.ClickException(f"several ids start with {prefix!r}: {', '.join(ids[:SHOWN_IDS])}{more}")
