"""How soon jobs run again: after a kill -9 of a pool child, or of a worker while another one lives; after the broker
was emptied in mid-run.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Peer, Row, skipped
from benchmarks.photos import photos
from benchmarks.workers import NO_RABBITMQ, NO_REDIS, rabbitmq_server, redis_server, settings, worker
from tests.tooling.waiting import eventually

TARGETS_S = {"embedded": 3, "RabbitMQ": 5, "Redis": 30}
MISSING = {"RabbitMQ": NO_RABBITMQ, "Redis": NO_REDIS}
EMPTIED_TARGET_S = 90
EMPTIED_JOBS, EMPTIED_SIZE_PX = 120, 1600


def measure(options: Options) -> Iterator[Row]:
    yield from _after_kills(options)
    yield from _after_emptying(options)


def _after_kills(options: Options) -> Iterator[Row]:
    for broker, target_s in TARGETS_S.items():
        with _environment(broker, options) as environment:
            for victim in ("a pool child", "a whole worker"):
                figure, target = f"running again after kill -9 of {victim}, {broker}", f"≤ {target_s} s"
                if environment is None:
                    yield skipped(figure, target, MISSING[broker])
                    continue
                rounds = range(options.rounds(1, 5))
                times_s = [_recovery_s(victim, environment, options, f"{broker}-{victim}-{n}") for n in rounds]
                yield Row(
                    figure=figure,
                    target=target,
                    measured=f"**{max(times_s):.2f} s**",
                    detail=f"from the signal to the body's first line, the worst of {len(times_s)} kills; "
                    f"from {min(times_s):.2f} s on",
                    value=max(times_s),
                )


def _after_emptying(options: Options) -> Iterator[Row]:
    images, what = photos(options)
    for broker in TARGETS_S:
        figure = f"all jobs completed after the broker was emptied in mid-run, {broker}"
        target = f"≤ {EMPTIED_TARGET_S} s"
        with _environment(broker, options) as environment:
            if environment is None:
                yield skipped(figure, target, MISSING[broker])
                continue
            with (
                worker("tasks", options, environment, queues="image_resize"),
                Peer(environment) as producer,
            ):
                rounds = range(options.rounds(1, 2))
                found = [producer.run(_emptied, images, str(options.folder / f"{broker}-{n}")) for n in rounds]
        times_s = [each.all_s for each in found]
        lost = " and ".join(str(each.lost) for each in found)
        first_s = min(each.first_s for each in found)
        yield Row(
            figure=figure,
            target=target,
            measured=f"**{max(times_s):.1f} s**",
            detail=f"from the workers being free, the worst of {len(times_s)} runs; {lost} of {EMPTIED_JOBS} resizes "
            f"({what}, to {EMPTIED_SIZE_PX} px) had lost their messages, and the first of them began after "
            f"{first_s:.1f} s",
            value=max(times_s),
        )


@contextmanager
def _environment(broker: str, options: Options) -> Iterator[dict[str, str] | None]:
    folder = options.folder / broker
    with ExitStack() as stack:
        if broker == "embedded":
            yield settings(folder)
        elif (server := rabbitmq_server() if broker == "RabbitMQ" else redis_server()) is None:
            yield None
        else:
            url = stack.enter_context(server.vhost() if broker == "RabbitMQ" else server.database())
            yield settings(folder, CELERY_BROKER_URL=url)


def _recovery_s(victim: str, environment: dict[str, str], options: Options, name: str) -> float:
    """Kill what runs the job; a second worker is there to take over."""
    file = options.folder / name.replace(" ", "-")
    app, queues = "benchmarks.apps.recorded", "stay"
    with ExitStack() as stack:
        producer = stack.enter_context(Peer(environment))
        first = worker(app, options, environment | {"WORKER_ID": f"{file.name}-1"}, queues=queues, concurrency=1)
        victim_worker = stack.enter_context(first)
        producer.run(_submit, str(file))
        eventually(file.exists, 20)
        if victim == "a pool child":
            killed_ns = time.time_ns()
            os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
        else:
            second = worker(app, options, environment | {"WORKER_ID": f"{file.name}-2"}, queues=queues, concurrency=1)
            stack.enter_context(second)
            killed_ns = time.time_ns()
            victim_worker.kill9_everything()
        eventually(lambda: len(_lines(file)) == 2, 120)
    return (int(_lines(file)[1].split()[1]) - killed_ns) / 1e9


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _submit(file: str) -> None:
    from benchmarks.apps.recorded import stay

    stay.delay(file, 60.0)


@dataclass(frozen=True)
class Emptied:
    """From when the workers had nothing left to do: until a lost job began, and until all were completed."""

    first_s: float
    all_s: float
    lost: int


def _emptied(images: list[str], folder: str) -> Emptied:
    """Submit real jobs, empty the broker when a third is done, and wait until every job is completed."""
    from tasks import image_resize
    from tasks.celery import app

    Path(folder).mkdir()
    job_ids = [
        image_resize.delay(
            images[number % len(images)], f"{folder}/{number}.jpg", width=EMPTIED_SIZE_PX, height=EMPTIED_SIZE_PX
        ).id
        for number in range(EMPTIED_JOBS)
    ]

    def completed() -> list[Any]:
        return [row for row in app.store.jobs_by_id(job_ids) if row["status"] == "completed"]

    eventually(lambda: len(completed()) >= EMPTIED_JOBS // 3, 120)
    _empty_broker(app)
    emptied_at = datetime.now(UTC)
    eventually(lambda: len(completed()) == EMPTIED_JOBS, 300, interval_s=0.1)
    rows = completed()
    lost = [row for row in rows if any(log["event_type"] == "republished" for log in app.store.logs(row["job_id"]))]
    kept = [row["completed_at"] for row in rows if row not in lost]
    free_at = max([emptied_at, *kept])
    return Emptied(
        first_s=(min(row["started_at"] for row in lost) - free_at).total_seconds(),
        all_s=(max(row["completed_at"] for row in rows) - free_at).total_seconds(),
        lost=len(lost),
    )


def _empty_broker(app: Any) -> None:
    """Take all messages away, as a server does that comes back without its data."""
    url = app.settings.broker_url
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30)) as connection, connection:
            connection.execute("DELETE FROM messages")
        return
    with app.connection_for_write() as connection, connection.channel() as channel:
        if url.startswith("redis"):
            channel.client.flushdb()
        else:
            channel.queue_purge("image_resize")
