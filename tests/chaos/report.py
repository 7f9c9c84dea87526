"""The report: outcomes in, a table, JSON and the stories of offending jobs out."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.chaos.crew import KILLED

if TYPE_CHECKING:
    from tests.chaos.scenario import Outcome

VERDICTS = ("lost", "duplicated", "stuck", "wrong")
LOG_TAIL_LINES = 400
CLOCK = "%H:%M:%S.%f"


def table_of(outcomes: Sequence["Outcome"]) -> Table:
    table = Table(title="Chaos: every job ends once")
    for name in (
        "combination",
        "jobs",
        "kills: child, worker, main",
        "other blows",
        *VERDICTS,
        "excused",
        "recovery: median, worst",
        "duration",
        "seed",
    ):
        table.add_column(name, justify="left" if name == "combination" else "right")
    for outcome in outcomes:
        kinds = Counter(blow.kind for blow in outcome.blows)
        kills = [kinds.pop(kind, 0) for kind in KILLED]
        recoveries = [recovery.seconds for recovery in outcome.audit.recoveries]
        table.add_row(
            outcome.combination,
            str(outcome.jobs),
            f"{sum(kills)}: {', '.join(map(str, kills))}",
            str(sum(kinds.values())),
            *(str(outcome.audit.count(verdict)) for verdict in VERDICTS),
            str(len(outcome.audit.excused)),
            f"{statistics.median(recoveries):.1f} s, {max(recoveries):.1f} s" if recoveries else "-",
            f"{outcome.duration_s:.0f} s",
            str(outcome.seed),
        )
    return table


def print_outcomes(outcomes: Sequence["Outcome"]) -> None:
    """The table, and under it what it leaves out."""
    console = Console(width=180)
    console.print(table_of(outcomes))
    for outcome in outcomes:
        print(details_of(outcome))


def details_of(outcome: "Outcome") -> str:
    kinds = Counter(blow.kind for blow in outcome.blows)
    lines = [f"{outcome.combination}: " + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))]
    lines.append(f"  events: {dict(outcome.audit.events)}; {outcome.refusals} calls of the producer were refused")
    if slowest := sorted(outcome.audit.recoveries, key=lambda recovery: -recovery.seconds)[:3]:
        lines.append(
            "  slowest recoveries: "
            + ", ".join(f"{each.seconds:.1f} s ({each.kind}, {each.job_id})" for each in slowest)
        )
    lines += [f"  note: {note}" for note in outcome.notes]
    lines += [f"  exit: {text}" for text in outcome.exits]
    lines += [f"  excused: {text}" for text in outcome.audit.excused]
    lines += [f"  {finding.verdict.upper()} {finding.job_id} {finding.text}" for finding in outcome.audit.findings[:40]]
    if outcome.directory is not None:
        again = f"CHAOS_SEED={outcome.seed}, or --seed {outcome.seed}"
        lines.append(f"  stories.txt, logs and files: {outcome.directory}; again: {again}")
    return "\n".join(lines)


def as_json(outcomes: Sequence["Outcome"]) -> str:
    return json.dumps(
        [
            {
                "combination": outcome.combination,
                "seed": outcome.seed,
                "jobs": outcome.jobs,
                "blows": Counter(blow.kind for blow in outcome.blows),
                **{verdict: outcome.audit.count(verdict) for verdict in VERDICTS},
                "excused": len(outcome.audit.excused),
                "refusals": outcome.refusals,
                "exits": list(outcome.exits),
                "recoveries_s": [round(recovery.seconds, 3) for recovery in outcome.audit.recoveries],
                "duration_s": round(outcome.duration_s, 1),
                "findings": [vars(finding) for finding in outcome.audit.findings],
                "directory": str(outcome.directory) if outcome.directory else None,
            }
            for outcome in outcomes
        ],
        indent=1,
    )


def write_stories(outcome: "Outcome", app: Any, path: Path, logs: Path) -> None:
    """The blows, and of each offending job and of the slowest ones all that is known; and the ends of all logs."""
    slowest = sorted(outcome.audit.recoveries, key=lambda recovery: -recovery.seconds)[:5]
    offending = [finding.job_id for finding in outcome.audit.findings if finding.job_id]
    with path.open("w") as file:
        print(details_of(outcome), "\n\nblows:", file=file)
        for blow in sorted(outcome.blows, key=lambda blow: blow.at):
            until = f" until {blow.until:{CLOCK}}" if blow.until else ""
            print(f"  {blow.at:{CLOCK}}{until} {blow.kind} {blow.worker} {blow.note}", file=file)
        for job_id in dict.fromkeys([*offending, *(each.job_id for each in slowest)]):
            print("\n".join(_story_of(job_id, outcome, app, logs)), file=file)
    for log_path in sorted(logs.glob("*.log")):
        tail = log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        log_path.with_suffix(".tail").write_text("\n".join(tail))


def _story_of(job_id: str, outcome: "Outcome", app: Any, logs: Path) -> Iterator[str]:
    yield f"\n--- {job_id}"
    yield from (f"{found.verdict}: {found.text}" for found in outcome.audit.findings if found.job_id == job_id)
    row = app.store.job(job_id)
    yield f"row: {dict(row) if row else None}"
    for log in app.store.logs(job_id):
        what = f"{log['sequence']} {log['created_at']:{CLOCK}} {log['event_type']} {log['worker_id'] or ''}"
        yield f"  {what} {log['message'] or ''} {log['details'] or ''}"
    for path in sorted(logs.glob("worker-*.log")):
        lines = path.read_text(errors="replace").splitlines()
        yield from (f"  {path.name}: {line}" for line in lines if job_id in line)
