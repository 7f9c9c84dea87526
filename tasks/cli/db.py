"""`celery -A tasks db upgrade | stats | pragmas | checkpoint | vacuum | backup`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tasks.cli.app import with_app

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


@click.group()
def db() -> None:
    """Look after the job database."""


@db.command()
@with_app
def upgrade(app: "MediaTasks") -> None:
    """Make the tables, or bring them up to this release. Safe to repeat."""
    from db import schema

    database = app.store.database
    before = schema.current_version(database)
    schema.upgrade(database)
    after = schema.current_version(database)
    changed = f"schema {after}, as before" if before == after else f"schema {before or 'none'} -> {after}"
    click.echo(f"{database}: {changed}")


@db.command()
@with_app
def stats(app: "MediaTasks") -> None:
    """Jobs by task and status, rows of each table, and the sizes of the file and its log."""
    from db import maintenance

    for task_type, counts in sorted(app.store.counts().items()):
        click.echo(f"{task_type:24} " + "  ".join(f"{status} {jobs:,}" for status, jobs in sorted(counts.items())))
    for name, value in maintenance.sizes(app.store.database).items():
        click.echo(f"{name:24} {value:,}")


@db.command()
@with_app
def pragmas(app: "MediaTasks") -> None:
    """The settings of the SQLite file as they are in force."""
    from db import maintenance

    for name, value in maintenance.pragmas(app.store.database).items():
        click.echo(f"{name:20} {value}")


@db.command()
@with_app
def checkpoint(app: "MediaTasks") -> None:
    """Move the write-ahead log into the SQLite file and empty it."""
    from db import maintenance

    moved, left = maintenance.checkpoint(app.store.database)
    click.echo(f"{moved} pages moved, {left} left in the log" + (" (readers hold them; try again)" if left else ""))


@db.command()
@with_app
def vacuum(app: "MediaTasks") -> None:
    """Give free pages back to the file system."""
    from db import maintenance

    before, after = maintenance.vacuum(app.store.database)
    click.echo(f"{before:,} bytes -> {after:,} bytes")


@db.command()
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@with_app
def backup(app: "MediaTasks", target: Path) -> None:
    """Copy the SQLite file, consistent while workers go on, to TARGET (which must not exist)."""
    from db import maintenance

    size_bytes = maintenance.backup(app.store.database, target)
    click.echo(f"{target}: {size_bytes:,} bytes")
