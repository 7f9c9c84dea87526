"""The embedded broker alone: how fast a worker drains no-op tasks, against Redis and RabbitMQ.

The worker is stopped while its queue is filled, so only the draining is timed: from the body of the first task to the
body of the last, with a number of no-ops in between. All brokers get the same settings (`benchmarks.apps.plain`).
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.measure import Contender, Options, Peer, Row, interleaved, ratio_row, skipped
from benchmarks.workers import NO_RABBITMQ, NO_REDIS, rabbitmq_server, redis_server, worker
from tests.tooling.waiting import eventually

WITHIN_S = 120.0


def measure(options: Options) -> list[Row]:
    redis, rabbitmq = redis_server(), rabbitmq_server()
    with ExitStack() as stack:
        urls = {"embedded": f"sqlite:///{options.folder / 'broker.db'}"}
        if redis is not None:
            urls["Redis"] = stack.enter_context(redis.database())
        if rabbitmq is not None:
            urls["RabbitMQ"] = stack.enter_context(rabbitmq.vhost())
        rates = _rates(options, stack, urls)

    rows = []
    for name, target, missing in (("Redis", "≥ 1.5", NO_REDIS), ("RabbitMQ", "≥ 0.85", NO_RABBITMQ)):
        figure = f"embedded broker alone, drain of no-op tasks, against {name}"
        if name in rates:
            rows.append(ratio_row(figure, target, rates["embedded"], rates[name], unit="tasks/s", against=name))
        else:
            rows.append(skipped(figure, target, missing))
    return rows


def _rates(options: Options, stack: ExitStack, urls: dict[str, str]) -> dict[str, list[float]]:
    drains = {name: stack.enter_context(_drain(options, url)) for name, url in urls.items()}
    for drain in drains.values():
        drain(100)
    count = 500 if options.is_quick else 2000
    return interleaved({name: lambda drain=drain: drain(count) for name, drain in drains.items()}, options.rounds(3, 7))


@contextmanager
def _drain(options: Options, url: str) -> Iterator[Contender]:
    environment = {"BENCH_BROKER": url}
    with worker("benchmarks.apps.plain", options, environment) as running, Peer(environment) as producer:

        def drain(count: int) -> float:
            pids = [running.pid, *running.child_pids()]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            first, last = (options.folder / name for name in ("first", "last"))
            try:
                producer.run(_publish, count, str(first), str(last))
            finally:
                for pid in reversed(pids):
                    os.kill(pid, signal.SIGCONT)
            eventually(last.exists, WITHIN_S, f"{count} tasks are done")
            eventually(first.exists, WITHIN_S)
            return count / (_told(last) - _told(first)) * 1e9

        yield drain


def _publish(count: int, first: str, last: str) -> None:
    from benchmarks.apps.plain import nothing, tell_time

    tell_time.delay(first)
    for _ in range(count):
        nothing.delay()
    tell_time.delay(last)


def _told(path: Path) -> int:
    told = int(path.read_text())
    path.unlink()
    return told
