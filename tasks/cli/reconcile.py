"""`celery -A tasks reconcile`: where table, broker and retained topics disagree, and mending it by hand."""

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from tasks.cli.app import with_app
from tasks.cli.retained import retained_doubts
from tasks.cli.strays import overdue_jobs, stray_messages, surplus_messages
from tasks.cli.text import as_json, counted, line, remark

if TYPE_CHECKING:
    from tasks.celery import MediaTasks
    from tasks.reconciler import Finding, Reconciler


@click.command()
@click.option("--dry-run", "is_dry", is_flag=True, help="Only print; change nothing.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object a line: part, subject, text, outcome.")
@with_app
def reconcile(app: "MediaTasks", is_dry: bool, is_json: bool) -> None:
    """Find jobs whose worker is dead, whose message is lost, whose end was not told; and mend them.

    Workers do so by themselves every few seconds, one of them at a time; doing it twice does no harm. What no look
    can prove is only said, such as a retained MQTT topic of a worker that the job table does not know as alive; so is
    what needs no mending, such as a message whose job has ended.
    """
    from tasks.reconciler import Reconciler

    reconciler = Reconciler(app)
    counts = {"found": 0, "mended": 0, "failed": 0, "uncertain": 0, "noted": 0}
    mended = set()

    def say(part: str, subject: str, text: str, outcome: str) -> None:
        counts[outcome] += 1
        note = {"uncertain": "not certain: ", "failed": "not mended: "}.get(outcome, "")
        fields = {"part": part, "subject": subject, "text": text, "outcome": outcome}
        click.echo(as_json(fields) if is_json else line(f"{note}{part}: {subject}: {text}"))

    for finding in _findings(app, reconciler):
        outcome = "found" if is_dry else _mended(finding)
        if outcome:
            say(finding.part, finding.subject, finding.text, outcome)
        if outcome == "mended":
            mended.add(finding.subject)
    for part, subject, text in _doubts(app):
        say(part, subject, text, "uncertain")
    for part, subject, text in _notes(app):
        if subject not in mended:  # mending it has left its old message behind
            say(part, subject, text, "noted")
    if not is_json:
        click.echo(_summary(counts, is_dry=is_dry))
    if counts["failed"]:
        raise click.exceptions.Exit(1)


def _findings(app: "MediaTasks", reconciler: "Reconciler") -> Iterator["Finding"]:
    """Every disagreement once. A worker looks through so many jobs of a queue a round; here are the rounds of all."""
    from db.records import now
    from tasks.lost_messages import IN_ONE_LOOK

    seen = set()
    looks = [reconciler.findings]
    looks += [reconciler.lost_messages] * (max(app.store.published(now()).values(), default=0) // IN_ONE_LOOK)
    for look in looks:
        for finding in look():
            if (finding.part, finding.subject) not in seen:
                seen.add((finding.part, finding.subject))
                yield finding


def _mended(finding: "Finding") -> str:
    """`mended` or `failed`; nothing if the disagreement has gone meanwhile."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return "" if finding.mend() is False else "mended"
    except SQLAlchemyError:
        raise
    except Exception as exc:
        remark(f"Error: {finding.subject}: {type(exc).__name__}: {exc}")
        return "failed"


def _doubts(app: "MediaTasks") -> Iterator[tuple[str, str, str]]:
    """What may be wrong and can't be proved by one look; a worker that looks on will tell."""
    yield from _silent_holders(app)
    yield from _short_queues(app)
    for queue, text in surplus_messages(app):
        yield "stray messages", queue, text
    for topic, text in retained_doubts(app):
        yield "retained topics", topic, text


def _notes(app: "MediaTasks") -> Iterator[tuple[str, str, str]]:
    """What needs no mending."""
    for job_id, text in overdue_jobs(app):
        yield "overdue jobs", job_id, text
    for job_id, text in stray_messages(app):
        yield "stray messages", job_id, text


def _silent_holders(app: "MediaTasks") -> Iterator[tuple[str, str, str]]:
    for holder in app.store.holders():
        if app.leases.seems_dead(holder) and not app.leases.is_dead(holder):
            text = f"silent since {holder.renewed_at:%Y-%m-%d %H:%M:%S} UTC; whether it is dead, only a worker can tell"
            yield "dead holders", holder.worker_id, f"{text} that looks for {app.settings.lease_timeout_s:g} s"


def _short_queues(app: "MediaTasks") -> Iterator[tuple[str, str, str]]:
    """Queues with fewer messages than jobs, where the broker can only count."""
    from db.records import now
    from tasks.broker.ledger import ledger_of
    from tasks.lost_messages import LOOK_AGAIN_AFTER_S
    from tasks.reconciler import SETTLED_AFTER_S

    published = app.store.published(now() - timedelta(seconds=SETTLED_AFTER_S))
    if not published or (ledger := ledger_of(app)).names_messages:
        return
    reserved = {job_id for worker in app.live_workers() for job_id in worker["reserved_tasks"]}
    held: dict[str, int] = {}
    for row in app.store.jobs_by_id(sorted(reserved)):
        held[row["queue"]] = held.get(row["queue"], 0) + 1
    ready = ledger.ready(published)
    for queue, jobs in published.items():
        if ready[queue] + held.get(queue, 0) < jobs:
            there = f"{counted(ready[queue], 'message')} left, {held.get(queue, 0):,} reserved"
            again = f"one count proves no loss; a worker counts again after {LOOK_AGAIN_AFTER_S:g} s, and mends it"
            yield "lost messages", queue, f"{counted(jobs, 'job')} published, {there}; {again}"


def _summary(counts: dict[str, int], *, is_dry: bool) -> str:
    what = {"found": "to mend", "mended": "mended", "failed": "not mended", "uncertain": "not certain"}
    what["noted"] = "need no mending"
    said = [f"{count:,} {what[outcome]}" for outcome, count in counts.items() if count]
    changed = "; nothing was changed" if is_dry and said else ""
    return f"{', '.join(said)}{changed}" if said else "nothing to mend"
