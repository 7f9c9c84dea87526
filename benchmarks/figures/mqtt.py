"""What MQTT costs the jobs, and how soon a subscriber knows: of a completion, and of a worker's death.

The cost is a ratio to the same worker with BROADCAST_TYPE=noop, with a Mosquitto that takes all events, with none, and
with a frozen one, in its two states: frozen just before each run, which is over before the keepalive is, so that the
worker takes it for alive; and frozen for all rounds, so that the worker has lost its connection and gets no other one.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.figures.resize import finish_jobs, fresh
from benchmarks.measure import Options, Peer, Row, interleaved, percentile_row, ratio_row, skipped
from benchmarks.photos import photos
from benchmarks.workers import HAS_CPU_CLOCKS, NO_CPU_CLOCKS, TOPICS, cpu_s, settings, worker
from tests.services import HOST, PrivateMosquitto, ServiceMissing, free_port
from tests.tooling.waiting import eventually
from tests.tooling.worker import Worker

SIZE_PX = 400
STATES = {
    "up": "up",
    "down": "down",
    "frozen": "frozen just before each run, so taken for alive",
    "silent": "frozen for all rounds, so lost and tried again",
}
LOST_WITHIN_S = 30.0
COST, COST_TARGET = "image_resize to 400 px, Mosquitto {}, against BROADCAST_TYPE=noop", "≥ 0.98"
SEEN, SEEN_TARGET = "`completed` seen by a subscriber, {}: p99", "≤ 100 ms"
OWN, OWN_TARGET = "CPU of the jobs' own processes, Mosquitto up, against BROADCAST_TYPE=noop", "≤ 1.01"
WILL, WILL_TARGET = "a worker's death seen by a subscriber, kill -9", "≤ 1 s"
JOBS_ONE_BY_ONE, JOBS_UNDER_LOAD = "jobs one after the other", "while both cores resize"

Run = Callable[[list[str]], float]


def measure(options: Options) -> Iterator[Row]:
    try:
        broker, frozen, silent = PrivateMosquitto(), PrivateMosquitto(), PrivateMosquitto()
    except ServiceMissing as exc:
        for figure, target in _figures():
            yield skipped(figure, target, str(exc))
        return
    with ExitStack() as stack:
        for server in (broker, frozen, silent):
            stack.callback(server.remove)
            server.start()
        yield from _costs(options, broker, frozen, silent)
        yield _seen_one_by_one(options, broker)
        yield _will(options, broker)


def _figures() -> Iterator[tuple[str, str]]:
    for state in STATES.values():
        yield COST.format(state), COST_TARGET
    yield OWN, OWN_TARGET
    for load in (JOBS_UNDER_LOAD, JOBS_ONE_BY_ONE):
        yield SEEN.format(load), SEEN_TARGET
    yield WILL, WILL_TARGET


def _costs(
    options: Options, broker: PrivateMosquitto, frozen: PrivateMosquitto, silent: PrivateMosquitto
) -> Iterator[Row]:
    images, _ = photos(options)
    images = images * (8 if options.is_quick else 12)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_resizing(options, name, **environment))
            for name, environment in {
                "noop": {"BROADCAST_TYPE": "noop"},
                "up": _told_to(broker.port),
                "down": _told_to(free_port()),
                "frozen": _told_to(frozen.port),
                "silent": _told_to(silent.port),
            }.items()
        }
        runs: dict[str, Run] = {**workers, "frozen": partial(_while_frozen, frozen, workers["frozen"])}
        for run in runs.values():
            run(images[:8])
        silent.pause()
        workers["silent"].wait_for_log("is lost", LOST_WITHIN_S)
        noop, up = workers["noop"], workers["up"]
        noop.own_cpu_ms, up.own_cpu_ms = [], []
        rates = interleaved({name: partial(_rested, run, images) for name, run in runs.items()}, options.rounds(5, 21))
        own_cpu_ms = ([*up.own_cpu_ms], [*noop.own_cpu_ms])
        with Subscriber(broker.port) as subscriber:
            for _ in range(options.rounds(2, 5)):
                up(images)
            delays_ms = subscriber.delays_ms(len(images) * options.rounds(2, 5))
    for name, state in STATES.items():
        yield ratio_row(COST.format(state), COST_TARGET, rates[name], rates["noop"], unit="images/s", against="noop")
    if HAS_CPU_CLOCKS:
        yield ratio_row(OWN, OWN_TARGET, *own_cpu_ms, unit="ms an image", against="noop")
    else:
        yield skipped(OWN, OWN_TARGET, NO_CPU_CLOCKS)
    yield _seen(JOBS_UNDER_LOAD, delays_ms)


class _Resizing:
    """A worker and its producer: call it with images, and it tells how many it did in a second.

    `own_cpu_ms` has the CPU time that the pool children took for an image, of each call so far.
    """

    def __init__(self, running: Worker, producer: Peer, outputs: Path) -> None:
        self._running, self._producer, self._outputs = running, producer, outputs
        self.own_cpu_ms: list[float] = []

    def wait_for_log(self, text: str, timeout_s: float) -> None:
        self._running.wait_for_log(text, timeout_s)

    def __call__(self, images: list[str]) -> float:
        before = cpu_s(self._running.child_pids())
        rate = float(self._producer.run(finish_jobs, images, fresh(self._outputs), SIZE_PX, True))
        self.own_cpu_ms.append(1000 * (cpu_s(self._running.child_pids()) - before) / len(images))
        return rate


@contextmanager
def _resizing(options: Options, name: str, **more: str) -> Iterator[_Resizing]:
    environment = settings(options.folder / f"mqtt-{name}", **more)
    with worker("tasks", options, environment, queues="image_resize") as running, Peer(environment) as producer:
        yield _Resizing(running, producer, options.folder / f"mqtt-{name}-outputs")


def _rested(run: Run, images: list[str]) -> float:
    """A run after a second of rest, in which the events of the one before are told."""
    time.sleep(1)
    return run(images)


def _while_frozen(broker: PrivateMosquitto, run: Run, images: list[str]) -> float:
    broker.pause()
    try:
        return run(images)
    finally:
        broker.resume()


def _seen_one_by_one(options: Options, broker: PrivateMosquitto) -> Row:
    count = 100 if options.is_quick else 400
    environment = settings(options.folder / "mqtt-one-by-one", **_told_to(broker.port))
    with (
        worker("benchmarks.apps.recorded", options, environment, queues="tell_job_time"),
        Peer(environment) as producer,
        Subscriber(broker.port) as subscriber,
    ):
        producer.run(_run_one_by_one, count)
        return _seen(JOBS_ONE_BY_ONE, subscriber.delays_ms(count))


def _run_one_by_one(count: int) -> None:
    """The jobs last differently long, so that they end anywhere between two looks."""
    from benchmarks.apps.recorded import tell_job_time

    chance = random.Random(1)  # noqa: S311 (no secret)
    for _ in range(count):
        tell_job_time.delay(sleep_s=chance.uniform(0.05, 0.15)).get(timeout=10)


def _seen(load: str, delays_ms: list[float]) -> Row:
    return percentile_row(SEEN.format(load), SEEN_TARGET, delays_ms, unit="ms", note="after the row's time; ")


def _will(options: Options, broker: PrivateMosquitto) -> Row:
    times_s = [_until_gone_s(options, broker, f"mqtt-{number}") for number in range(options.rounds(3, 10))]
    return Row(
        figure=WILL,
        target=WILL_TARGET,
        measured=f"**{max(times_s):.2f} s**",
        detail=f"from the signal to the empty payload, the worst of {len(times_s)} kills; from {min(times_s):.2f} s on",
        value=max(times_s),
    )


def _until_gone_s(options: Options, broker: PrivateMosquitto, name: str) -> float:
    environment = settings(options.folder / name, **_told_to(broker.port), WORKER_ID=name)
    with (
        Subscriber(broker.port) as subscriber,
        worker("benchmarks.apps.recorded", options, environment, queues="tell_job_time") as victim,
    ):
        eventually(lambda: subscriber.capabilities.get(name), 20, f"{name} shows its capability")
        killed_at = time.time()
        victim.kill9()
        eventually(lambda: name in subscriber.gone_at, 30, f"{name} is gone")
    return subscriber.gone_at[name] - killed_at


def _told_to(port: int) -> dict[str, str]:
    return {"MQTT_BROKER": HOST, "MQTT_PORT": str(port)}


class Subscriber(AbstractContextManager["Subscriber"]):
    """Hears all topics, and keeps when."""

    def __init__(self, port: int) -> None:
        self.capabilities: dict[str, bytes] = {}
        self.gone_at: dict[str, float] = {}
        self._delays_ms: list[float] = []
        self._is_subscribed = False
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{TOPICS}/#", qos=1)
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.connect(HOST, port)
        self._client.loop_start()
        eventually(lambda: self._is_subscribed, 10, "subscribed")

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def delays_ms(self, count: int) -> list[float]:
        """From the time of a completed row to its event, of each of so many jobs."""
        eventually(lambda: len(self._delays_ms) >= count, 30, lambda: f"{len(self._delays_ms)} of {count} completions")
        return self._delays_ms

    def _on_subscribe(self, *_: object) -> None:
        self._is_subscribed = True

    def _on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        at = time.time()
        if message.topic != f"{TOPICS}/events":
            worker_id = message.topic.rpartition("/")[2]
            self.capabilities[worker_id] = message.payload
            if not message.payload:
                self.gone_at[worker_id] = at
            return
        event = json.loads(message.payload)
        if event["event_type"] == "completed":
            self._delays_ms.append(1000 * at - event["timestamp"])
