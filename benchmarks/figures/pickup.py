"""An idle worker: how soon it begins a job (publish to the body's first line), and what it costs while it waits."""

import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import Options, Peer, Row, percentile, skipped
from benchmarks.workers import HAS_CPU_CLOCKS, NO_CPU_CLOCKS, cpu_s, settings, worker
from tests.services import HOST, PrivateMosquitto, ServiceMissing
from tests.tooling.waiting import eventually
from tests.tooling.worker import Worker

PAUSE_S = 0.04
"""Between two jobs, so that the worker is idle again."""


def measure(options: Options) -> list[Row]:
    count = 100 if options.is_quick else 400
    broker = {"BENCH_BROKER": f"sqlite:///{options.folder / 'broker.db'}"}
    with worker("benchmarks.apps.plain", options, broker), Peer(broker) as producer:
        alone = producer.run(_latencies_ms_of_tasks, count, str(options.folder))
    with ExitStack() as stack:
        mqtt = _told_to_mosquitto(stack)
        recorded = settings(options.folder / "recorded", **mqtt)
        running = stack.enter_context(worker("benchmarks.apps.recorded", options, recorded, queues="tell_job_time"))
        producer = stack.enter_context(Peer(recorded))
        of_jobs = producer.run(_latencies_ms_of_jobs, count)
        idle = _idle_row(running, 5.0 if options.is_quick else 30.0, "and tells MQTT" if mqtt else "without MQTT")
    return [_row("the embedded broker alone", alone), _row("a job with its row", of_jobs), idle]


def _told_to_mosquitto(stack: ExitStack) -> dict[str, str]:
    """The settings of a worker that tells a Mosquitto of its own; none where there is no Mosquitto."""
    try:
        broker = PrivateMosquitto()
    except ServiceMissing:
        return {}
    stack.callback(broker.remove)
    broker.start()
    return {"MQTT_BROKER": HOST, "MQTT_PORT": str(broker.port)}


def _row(what: str, latencies_ms: list[float]) -> Row:
    half, nearly_all = percentile(latencies_ms, 50), percentile(latencies_ms, 99)
    return Row(
        figure=f"pick-up by an idle worker, {what}: p50 / p99",
        target="≤ 5 ms / 25 ms",
        measured=f"**{half:.1f} ms / {nearly_all:.1f} ms**",
        detail=f"from the call of `.delay()`, {len(latencies_ms)} jobs; "
        f"{min(latencies_ms):.1f}-{max(latencies_ms):.1f} ms",
        value=half,
    )


def _idle_row(running: Worker, seconds: float, what: str) -> Row:
    figure, target = f"CPU of an idle worker, prefork 2, that has all duties {what}", "≤ 1 %"
    if not HAS_CPU_CLOCKS:
        return skipped(figure, target, NO_CPU_CLOCKS)
    time.sleep(1)
    before = cpu_s([running.pid, *running.child_pids()])
    time.sleep(seconds)
    percent = 100 * (cpu_s([running.pid, *running.child_pids()]) - before) / seconds
    return Row(
        figure=figure,
        target=target,
        measured=f"**{percent:.2f} %** of a core",
        detail=f"user + system time of main and children over {seconds:.0f} s",
        value=percent,
    )


def _latencies_ms_of_tasks(count: int, folder: str) -> list[float]:
    from benchmarks.apps.plain import tell_time

    def once(number: int) -> float:
        path = Path(folder) / f"began-{number}"
        published_ns = time.time_ns()
        tell_time.delay(str(path))
        time.sleep(PAUSE_S)
        eventually(path.exists)
        return (int(path.read_text()) - published_ns) / 1e6

    return [once(number) for number in range(count + 10)][10:]


def _latencies_ms_of_jobs(count: int) -> list[float]:
    from benchmarks.apps.recorded import tell_job_time

    def once() -> float:
        published_ns = time.time_ns()
        result = tell_job_time.delay()
        time.sleep(PAUSE_S)
        return (result.get(timeout=10)["began_ns"] - published_ns) / 1e6

    return [once() for _ in range(count + 10)][10:]
