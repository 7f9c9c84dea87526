"""Jobs that do next to nothing, and how long they took: MQTT must not show in that, whatever its broker does."""

import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tests.acceptance.deployment import Deployment

# Of what takes some hundredths of a second; whoever waits for a broker waits longer: paho's own patience is 5 s.
LONGEST_S = 3.0


def run_jobs(deployment: Deployment, count: int = 20) -> float:
    """Jobs are run as if there were no MQTT, none is blocked; how long all took."""
    started = time.monotonic()
    jobs = [deployment.task.add.delay(number, 1) for number in range(count)]
    for job in jobs:
        assert job.get(timeout=20)
    passed_s = time.monotonic() - started
    check_none_was_blocked(deployment, jobs)
    return passed_s


def check_none_was_blocked(deployment: Deployment, jobs: Iterable[Any]) -> None:
    """By the rows of jobs that have all completed: each ran through at once, and while one waited, others began and
    ended.
    """
    rows = [deployment.row(job) for job in jobs]
    for row in rows:
        ran_s = (row["completed_at"] - row["started_at"]).total_seconds()
        assert 0 <= ran_s < LONGEST_S, f"{row['job_id']} ran for {ran_s:.1f} s"
    for name in ("started_at", "completed_at"):
        steps = sorted(row[step] for row in rows for step in ("created_at", name))
        longest_s = max((later - earlier).total_seconds() for earlier, later in pairwise(steps))
        assert longest_s < LONGEST_S, f"for {longest_s:.1f} s no job had its {name}"
