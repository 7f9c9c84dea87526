"""How soon a caller that waits in `.get()` sees that its job is completed: the row's completed_at to the return."""

import random
import time

from benchmarks.measure import Options, Peer, Row, percentile_row
from benchmarks.workers import settings, worker


def measure(options: Options) -> list[Row]:
    environment = settings(options.folder / "recorded")
    with (
        worker("benchmarks.apps.recorded", options, environment, queues="tell_job_time"),
        Peer(environment) as producer,
    ):
        delays_ms = producer.run(_delays_ms, 40 if options.is_quick else 200)
    return [percentile_row("`.get()` sees a completion: p99", "≤ 60 ms", delays_ms, unit="ms")]


def _delays_ms(count: int) -> list[float]:
    """The jobs last differently long, so that they end anywhere between two looks."""
    from benchmarks.apps.recorded import app, tell_job_time

    chance = random.Random(1)  # noqa: S311 (no secret)
    delays_ms = []
    for _ in range(count):
        result = tell_job_time.delay(sleep_s=chance.uniform(0.05, 0.15))
        result.get(timeout=10)
        returned = time.time()
        delays_ms.append(1000 * (returned - app.store.job(result.id)["completed_at"].timestamp()))
    return delays_ms
