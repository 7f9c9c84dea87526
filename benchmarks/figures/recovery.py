"""How soon a running job runs again after a kill -9 of its pool child, or of its worker while another one lives."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.measure import Options, Peer, Row, skipped
from benchmarks.workers import NO_RABBITMQ, NO_REDIS, rabbitmq_server, redis_server, settings, worker
from tests.tooling.waiting import eventually

TARGETS_S = {"embedded": 3, "RabbitMQ": 5, "Redis": 30}


def measure(options: Options) -> Iterator[Row]:
    for broker, target_s in TARGETS_S.items():
        with _environment(broker, options) as environment:
            for victim in ("a pool child", "a whole worker"):
                figure, target = f"running again after kill -9 of {victim}, {broker}", f"≤ {target_s} s"
                if environment is None:
                    yield skipped(figure, target, {"RabbitMQ": NO_RABBITMQ, "Redis": NO_REDIS}[broker])
                    continue
                rounds = range(options.rounds(1, 5))
                times_s = [_recovery_s(victim, environment, options, f"{broker}-{victim}-{n}") for n in rounds]
                yield Row(
                    figure=figure,
                    target=target,
                    measured=f"**{median(times_s):.2f} s**",
                    detail=f"from the signal to the body's first line, {min(times_s):.2f}-{max(times_s):.2f} s; "
                    f"{len(times_s)} kills",
                    value=median(times_s),
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
