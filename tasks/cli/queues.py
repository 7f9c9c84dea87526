"""`celery -A tasks queues list | pause | resume | purge`: what waits in a queue, who serves it, and whether it may."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tasks.cli.app import with_app
from tasks.cli.text import clock, console_for, counted, cut, echo_json, line, table_for
from tasks.cli.times import Duration

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.control import Queue


@click.group()
def queues() -> None:
    """Look at queues; pause, resume or empty one."""


@queues.command("list")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
@with_app
def list_queues(app: "MediaTasks", ctx: click.Context, is_json: bool) -> None:
    """All queues that are known, served, paused or have jobs: what waits, what runs, who serves them."""
    from tasks import control

    known = control.queues(app=app)
    if is_json:
        echo_json(asdict(queue) for queue in known)
    else:
        _print_table(ctx, known)


@queues.command("pause")
@click.argument("queue")
@click.option("--reason", default="", help="Shown wherever somebody asks why jobs wait.")
@click.option("--for", "for_s", type=Duration(), help="90, 90s, 10m, 2h, 1d. Without it: until `queues resume`.")
@with_app
def pause_queue(app: "MediaTasks", queue: str, reason: str, for_s: float | None) -> None:
    """Have no worker take jobs from QUEUE; running jobs go on. A pause outlives workers and restarts."""
    from tasks import control

    control.pause(queue, reason, for_s=for_s, app=app)
    state = control.queue_named(queue, app=app)
    until = f" until {clock(state.paused_until)}" if state.paused_until else ""
    why = f": {reason}" if reason else ""
    click.echo(line(f"{queue}: paused{until}{why}; {counted(state.queued, 'job')} queued, {state.running:,} running"))


@queues.command("resume")
@click.argument("queue")
@with_app
def resume_queue(app: "MediaTasks", queue: str) -> None:
    """End the pause of QUEUE."""
    from tasks import control

    state = control.queue_named(queue, app=app)
    done = "resumed" if control.resume(queue, app=app) else "was not paused"
    served = "" if state.workers else f", and no live worker serves it: celery -A tasks worker -Q {queue}"
    click.echo(line(f"{queue}: {done}; {counted(state.queued, 'job')} queued{served}"))


@queues.command("purge")
@click.argument("queue")
@click.option("--yes", "is_sure", is_flag=True, help="Don't ask.")
@with_app
def purge_queue(app: "MediaTasks", queue: str, is_sure: bool) -> None:
    """Cancel all jobs that wait in QUEUE, whatever they wait for; running jobs go on."""
    from tasks import control

    queued = control.queue_named(queue, app=app).queued
    if queued and not is_sure:
        waiting = f"{counted(queued, 'queued job')} of {queue}"
        if not sys.stdin.isatty():
            raise click.ClickException(f"this cancels {waiting}; where nobody can be asked, add --yes")
        click.confirm(line(f"Cancel {waiting}?"), abort=True, err=True)
    cancelled = control.purge(queue, app=app)
    click.echo(line(f"{queue}: {counted(cancelled, 'job')} cancelled"))


def _print_table(ctx: click.Context, known: Sequence["Queue"]) -> None:
    console = console_for(ctx)
    table = table_for(console)
    table.add_column("queue", no_wrap=True)
    for name in ("queued", "running"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("workers")
    table.add_column("paused")
    for queue in known:
        table.add_row(
            cut(queue.name),
            f"{queue.queued:,}",
            f"{queue.running:,}",
            cut(", ".join(queue.workers)),
            cut(_pause(queue)),
        )
    console.print(table, markup=False)


def _pause(queue: "Queue") -> str:
    """Whether it is paused, until when and why."""
    if not queue.is_paused:
        return ""
    until = f"until {clock(queue.paused_until)}" if queue.paused_until else "yes"
    return f"{until}: {queue.reason}" if queue.reason else until
