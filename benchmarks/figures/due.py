"""How late a job begins that was due at a time: an ETA, or a retry with its backoff. From its due time to its claim."""

import random
from datetime import datetime, timedelta

from benchmarks.measure import Options, Peer, Row, percentile_row
from benchmarks.workers import settings, worker


def measure(options: Options) -> list[Row]:
    count = 50 if options.is_quick else 250
    environment = settings(options.folder / "recorded")
    with (
        worker("benchmarks.apps.recorded", options, environment, queues="tell_job_time,fail_once"),
        Peer(environment) as producer,
    ):
        return [
            _row("an ETA, 1-6 s ahead", producer.run(_delays_s_of_etas, count)),
            _row("a retry, 2 s ahead", producer.run(_delays_s_of_retries, count)),
        ]


def _row(what: str, delays_s: list[float]) -> Row:
    figure = f"{what}, against the time it was due: p99"
    return percentile_row(figure, "≤ 1.5 s late", delays_s, unit="s", digits=2)


def _delays_s_of_etas(count: int) -> list[float]:
    from benchmarks.apps.recorded import app, tell_job_time
    from db.records import now

    chance = random.Random(1)  # noqa: S311 (no secret)
    due = [now() + timedelta(seconds=chance.uniform(1.0, 6.0)) for _ in range(count)]
    results = [tell_job_time.apply_async(eta=moment) for moment in due]
    for result in results:
        result.get(timeout=60)
    began = [app.store.job(result.id)["started_at"] for result in results]
    return [(start - moment).total_seconds() for start, moment in zip(began, due, strict=True)]


def _delays_s_of_retries(count: int) -> list[float]:
    from benchmarks.apps.recorded import app, fail_once

    results = [fail_once.delay() for _ in range(count)]
    for result in results:
        result.get(timeout=60)

    def delay_s(job_id: str) -> float:
        logs = {log["event_type"]: log for log in app.store.logs(job_id)}  # of two, the later one
        due = datetime.fromisoformat(logs["retry"]["details"]["run_after_utc"])
        return (logs["claimed"]["created_at"] - due).total_seconds()

    return [delay_s(result.id) for result in results]
