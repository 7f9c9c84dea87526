"""The audit: jobs, rows, logs, events, files, broker after the storm. In: what was submitted and dealt. Out: findings.

A job may end otherwise than planned only where the blows explain it: three deaths that were all dealt, or a disk that
was full at each attempt. Such jobs are excused, and counted as that.

How often a body ran is read from the notes that it leaves, and held against its attempts: the store fences a second
completion, so that its log would not show a body that ran twice.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.sinks.topics import TOLD
from tests.acceptance.deployment import lines
from tests.chaos import chronicle
from tests.chaos.chronicle import Attempt, Chronicle
from tests.chaos.crew import DEADLY, KILLED, Blow
from tests.chaos.material import Material
from tests.chaos.subscriber import Subscriber
from tests.chaos.workload import Job

# A process that is about to die may still claim, and a row may be written a moment after its time was taken.
SLACK = timedelta(seconds=5)
# A change is told so long after it was made at most: a relay that is stopped gives way after LEASE_TIMEOUT_S.
TOLD_WITHIN = timedelta(seconds=20)
# What a job that is to be retried returns: how often it ran, if nothing kills it.
RUNS_OF_RETRY = 2
# An outage of MQTT during which no job is claimed proves nothing if it is short: other blows come at the same time.
LONG_OUTAGES_S = 20.0


@dataclass(frozen=True)
class Finding:
    """A fault; `verdict` is lost, duplicated, stuck or wrong."""

    verdict: str
    text: str
    job_id: str = ""


@dataclass(frozen=True)
class Recovery:
    """A killed attempt's job, claimed again after so many seconds."""

    seconds: float
    kind: str
    job_id: str


@dataclass
class Audit:
    """Collects findings about the jobs of a run."""

    app: Any
    material: Material
    blows: Sequence[Blow]
    findings: list[Finding] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    claims: list[datetime] = field(default_factory=list)
    missed: int = 0

    def jobs(self, jobs: Sequence[Job]) -> None:
        """Look at every job that was accepted, and at what is left of abandoned chords."""
        store = self.app.store
        rows = {row["job_id"]: row for row in store.jobs_by_id([job.job_id for job in jobs])}
        results = {job_id: row["result_data"] for job_id, row in rows.items()}
        for job in jobs:
            row = rows.get(job.job_id)
            if row is None:
                self._runs(job, Chronicle())
                if not job.is_abandoned:
                    self._find("lost", "it was accepted and has no row", job)
                continue
            told = chronicle.read(row, self._logs.get(job.job_id, []))
            self.events += told.events
            self.claims += [attempt.claimed_at for attempt in told.attempts]
            self._read(job, row, told)
            self._runs(job, told)
            if not job.is_abandoned:
                self._judge(job, row, told, results)
            self._outputs(job, must_be_there=row["status"] == "completed")
        known = {job.job_id for job in jobs}
        for row in store.jobs(limit=10 * len(jobs) + 1000):
            if row["job_id"] not in known:
                self._find("duplicated", f"a job of {row['task_type']} that nobody submitted: {row['job_id']}")

    def files(self, roots: Iterable[Path], jobs: Sequence[Job]) -> None:
        """Nothing may lie about but the outputs of jobs."""
        known = {path for job in jobs for path in (*self._outputs_of(job), job.notes)}
        for root in roots:
            for path in root.rglob("*"):
                if path.is_file() and path not in known:
                    self._find("wrong", f"a file that is no output was left: {path}")

    def told(self, subscriber: Subscriber) -> None:
        """What a subscriber heard of each job must be its log, whole and in order, but for its own absences."""
        for job_id in {*self._logs, *subscriber.changes}:
            logs = self._logs.get(job_id, [])
            logged = {change_of(log): log["created_at"] for log in logs}
            heard = subscriber.changes.get(job_id, [])
            missed = [change for change in logged if change not in heard]
            excused = [change for change in missed if self._is_missed_by_absence(logged[change], subscriber)]
            self.missed += len(excused)
            unheard = [change for change in missed if change not in excused]
            untrue = [change for change in heard if change not in logged]
            if unheard or untrue:
                text = f"a subscriber did not hear {unheard}, and heard {untrue} that is not in its log"
                self.findings.append(Finding("wrong", text, job_id))

    def is_told(self, subscriber: Subscriber) -> bool:
        """Whether the subscriber has heard all that it can have heard."""
        logs = [log for logs in self._read_logs().values() for log in logs]
        return all(
            change_of(log) in subscriber.changes.get(log["job_id"], [])
            or self._is_missed_by_absence(log["created_at"], subscriber)
            for log in logs
        )

    @staticmethod
    def _is_missed_by_absence(at: datetime, subscriber: Subscriber) -> bool:
        return any(left - TOLD_WITHIN <= at <= back for left, back in subscriber.absences)

    def outages_of_mqtt(self) -> str:
        """How many jobs were claimed while the MQTT broker was away; none in a long time is a fault."""
        spans = [(blow.at, blow.until) for blow in self.blows if blow.kind.startswith("mqtt ") and blow.until]
        away_s = sum((until - at).total_seconds() for at, until in spans)
        claims = sum(any(at <= claim <= until for at, until in spans) for claim in self.claims)
        text = f"{claims} jobs were claimed within the {away_s:.0f} s for which the MQTT broker was away"
        if claims == 0 and away_s > LONG_OUTAGES_S:
            self.complain(text)
        return text

    def messages(self, remains: dict[str, int]) -> None:
        for queue, number in remains.items():
            self._find("wrong", f"the broker still has {number} messages in {queue}")

    def kills(self, planned: int) -> None:
        """A storm that killed less than it was to kill proves less."""
        dealt = sum(blow.kind in KILLED for blow in self.blows)
        if dealt < planned:
            self.complain(f"{planned} kill -9 were planned, {dealt} were dealt")

    def complain(self, text: str) -> None:
        self._find("wrong", text)

    def count(self, verdict: str) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)

    # One job

    def _runs(self, job: Job, told: Chronicle) -> None:
        """A body notes that it runs: once in each attempt that started, but for those that were killed before."""
        if job.notes is None:
            return
        runs, started = len(lines(job.notes)), told.events["started"]
        unharmed = sum(self._is_unharmed(attempt) for attempt in told.attempts)
        if runs > started:
            self._find("duplicated", f"attempts that started: {started}; its body ran {runs} times", job)
        elif runs < unharmed:
            self._find("lost", f"attempts that nothing killed: {unharmed}; its body ran {runs} times", job)

    def _is_unharmed(self, attempt: Attempt) -> bool:
        """Whether its body must have run. Jobs that kill their own workers note it first."""
        return attempt.end in ("completed", "retry") or (attempt.end == "lost" and not self._blows(DEADLY, attempt))

    def _read(self, job: Job, row: Any, told: Chronicle) -> None:
        """What must hold for any job, whatever became of it."""
        for fault in told.faults:
            self._find("wrong", fault, job)
        if row["status"] not in chronicle.TERMINAL:
            self._find("stuck", f"it is {row['status']}", job)
        if told.events["completed"] > 1:
            self._find("duplicated", f"it completed {told.events['completed']} times", job)
        for attempt, following in zip(told.attempts, [*told.attempts[1:], None], strict=False):  # a job may have none
            if attempt.end == "lost":
                self._died(job, attempt, following)
            elif attempt.end == "released" and not self._blows({"worker terminated"}, attempt):
                self._find(
                    "wrong", f"attempt {attempt.number} was released, and {attempt.worker} was not terminated", job
                )

    def _died(self, job: Job, attempt: Attempt, following: Attempt | None) -> None:
        if job.kind == "killer":
            return
        blows = self._blows(DEADLY, attempt)
        if not blows:
            self._find("wrong", f"attempt {attempt.number} on {attempt.worker} counts as dead; nothing killed it", job)
        elif following is not None:
            during = [blow for blow in blows if blow.at >= attempt.claimed_at]
            blow = during[0] if during else blows[-1]
            self.recoveries.append(Recovery((following.claimed_at - blow.at).total_seconds(), blow.kind, job.job_id))

    def _blows(self, kinds: Iterable[str], attempt: Attempt) -> list[Blow]:
        """What hit this attempt's worker while it ran."""
        begin, end = attempt.claimed_at - SLACK, attempt.ended_at or attempt.claimed_at
        return [
            blow
            for blow in self.blows
            if blow.worker == attempt.worker
            and blow.kind in kinds
            and blow.at <= end + SLACK
            and (blow.until or blow.at) >= begin
        ]

    def _judge(self, job: Job, row: Any, told: Chronicle, results: dict[str, Any]) -> None:
        """Whether it became what it had to become."""
        status = row["status"]
        if job.error is not None:
            if (status, row["error_type"]) != ("failed", job.error):
                self._find("wrong", f"it is {status}, {row['error_type']}, where {job.error} was planted", job)
        elif status in ("failed", "cancelled"):
            if self._is_excused(row, told):
                self.excused.append(f"{job.job_id}: {row['error_type']}: {row['error_message']}")
            else:
                self._find("lost", f"it {status}: {row['error_type']}: {row['error_message']}", job)
        elif status == "completed":
            self._completed(job, row, told, results)

    def _is_excused(self, row: Any, told: Chronicle) -> bool:
        if row["error_type"] == "WorkerLost":
            lost = [attempt for attempt in told.attempts if attempt.end == "lost"]
            return len(lost) >= 3 and all(self._blows(DEADLY, attempt) for attempt in lost)
        if row["error_type"] == "DiskFull":
            full = [(blow.at, blow.until) for blow in self.blows if blow.kind == "disk full"]
            tried = [attempt for attempt in told.attempts if attempt.end in ("retry", "failed")]
            return bool(tried) and all(_is_within(attempt, full) for attempt in tried)
        return False

    def _completed(self, job: Job, row: Any, told: Chronicle, results: dict[str, Any]) -> None:
        result = row["result_data"]
        if job.recipe is not None and result != (
            right := self.material.yield_of(job.recipe, self.app).result_at(job.output)
        ):
            self._find("wrong", f"its result is {result}; it should be {right}", job)
        if job.kind == "retry":
            runs, deaths = len(lines(job.notes)), told.events["lost"] + told.events["released"]
            if result not in range(RUNS_OF_RETRY, min(runs, RUNS_OF_RETRY + deaths) + 1):
                self._find("wrong", f"its result is {result}; it ran {runs} times, and {deaths} attempts died", job)
        if job.kind == "body" and result != [results[member] for member in job.members]:
            self._find("wrong", f"the body of the chord was given {result}", job)
        if "countdown" in job.options and told.attempts:
            waited_s = (told.attempts[0].claimed_at - row["created_at"]).total_seconds()
            if waited_s < job.options["countdown"] - 0.1:
                self._find("wrong", f"it ran {waited_s:.2f} s after its creation, before its time", job)

    def _outputs(self, job: Job, *, must_be_there: bool) -> None:
        """An output is whole wherever there is one: an attempt that died may have written it before."""
        for path, content in self._outputs_of(job).items():
            if not path.exists():
                if must_be_there:
                    self._find("lost", f"it is completed, and {path} is not there", job)
            elif content is None:
                self._find("wrong", f"{path} was made of a broken input", job)
            elif path.read_bytes() != content:
                self._find("wrong", f"{path} differs from what the same function makes here", job)

    def _outputs_of(self, job: Job) -> dict[Path, bytes | None]:
        """The bytes of each; None where there must be no output."""
        if job.recipe is not None:
            return dict(self.material.yield_of(job.recipe, self.app).files_at(job.output))
        return {job.output: None} if job.output is not None else {}

    @cached_property
    def _logs(self) -> dict[str, list[Any]]:
        return self._read_logs()

    def _read_logs(self) -> dict[str, list[Any]]:
        """All log rows of jobs, in order."""
        from sqlalchemy import select

        from db.models import task_logs

        c = task_logs.c
        logs = defaultdict(list)
        for log in self.app.store._rows(select(task_logs).where(c.job_id.is_not(None)).order_by(c.job_id, c.sequence)):
            logs[log["job_id"]].append(log)
        return dict(logs)

    def _find(self, verdict: str, text: str, job: Job | None = None) -> None:
        self.findings.append(Finding(verdict, text, job.job_id if job is not None else ""))


def change_of(log: Any) -> tuple[int, str]:
    """A log row as a subscriber hears it."""
    return log["sequence"], TOLD[log["event_type"]].event_type


def _is_within(attempt: Attempt, spans: Iterable[tuple[datetime, datetime | None]]) -> bool:
    begin, end = attempt.claimed_at, attempt.ended_at or attempt.claimed_at
    return any(at <= end and (until is None or until >= begin) for at, until in spans)
