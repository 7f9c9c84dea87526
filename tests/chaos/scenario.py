"""A scenario: one combination of broker and database, its workers, its work and its havoc, from start to verdict."""

import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db import schema
from tests.acceptance.deployment import Deployment, deployed
from tests.chaos import servers
from tests.chaos.audit import Audit
from tests.chaos.crew import POOL_CHILDREN, Blow, Crew
from tests.chaos.disk import SmallDisk
from tests.chaos.havoc import Havoc
from tests.chaos.material import Material
from tests.chaos.producer import Producer
from tests.chaos.subscriber import Subscriber
from tests.chaos.workload import QUEUES, Workload
from tests.tooling.waiting import eventually

COMBINATIONS = ("embedded", "rabbitmq", "redis")
SETTLED_WITHIN_S = 180.0
DRAINED_WITHIN_S = 45.0
# Work comes at about half of what two cores can do, so that most blows hit somebody at work and nothing piles up.
SECONDS_PER_JOB, SECONDS_PER_KILL = 0.22, 4.0
SETTINGS = {"SHUTDOWN_GRACE_S": 4}
# How notes begin that say what a storm goes without.
NO_MQTT, NO_FULL_DISK = "no MQTT broker is told", "no disk gets full"


@dataclass(frozen=True)
class Size:
    """How much of it."""

    jobs: int = 2000
    kills: int = 60
    workers: int = 3
    hosts: int = 1
    minutes: float | None = None

    @property
    def seconds(self) -> float:
        if self.minutes is not None:
            return self.minutes * 60
        return max(self.jobs * SECONDS_PER_JOB, self.kills * SECONDS_PER_KILL)


@dataclass(frozen=True)
class Outcome:
    """What a scenario came to; `directory` is there only if something was found."""

    combination: str
    seed: int
    jobs: int
    duration_s: float
    audit: Audit
    blows: Sequence[Blow]
    refusals: int
    exits: Sequence[str]
    notes: Sequence[str]
    directory: Path | None

    @property
    def is_clean(self) -> bool:
        return not self.audit.findings


class Scenario:
    """Call `run` once.

    Args:
        combination: One of COMBINATIONS.
        keep: Keep the directory also if nothing was found.
        say: Told what happens, one line each.
    """

    def __init__(
        self, combination: str, seed: int, size: Size, *, keep: bool = False, say: Callable[[str], Any] = print
    ) -> None:
        self._combination, self._seed, self._size, self._say = combination, seed, size, say
        self._is_kept = keep
        self._directory = Path(tempfile.mkdtemp(prefix="mt-chaos-")).resolve()
        self._server_dir = self._directory / "server"
        self._logs = self._directory / "logs"
        self._notes: list[str] = []

    def run(self) -> Outcome:
        """Run it; the directory with logs and files is kept if anything was found, or raised.

        Raises:
            tests.services.ServiceMissing: A server's program is not installed.
        """
        begin = time.monotonic()
        for directory in (self._server_dir, self._logs, self._directory / "out", self._directory / "notes"):
            directory.mkdir()
        try:
            with ExitStack() as stack:
                outcome = self._run_with(stack, begin)
        except servers.services.ServiceMissing:
            shutil.rmtree(self._directory)
            raise
        if outcome.directory is None:
            shutil.rmtree(self._directory)
        return outcome

    def _run_with(self, stack: ExitStack, begin: float) -> Outcome:
        parts = self._servers()
        mqtt = self._mqtt()
        if mqtt is not None:
            parts["mqtt"] = mqtt
        for part in parts.values():
            stack.callback(part.remove)
            part.start()
        disk = self._disk(stack)
        env = {**SETTINGS, **{name: value for part in parts.values() for name, value in part.env.items()}}
        deployment = stack.enter_context(deployed(self._server_dir, self._logs, env))
        if "DATABASE_URL" in env:
            schema.upgrade(deployment.app.store.database)
        material = Material(self._directory)
        material.make()
        workload = self._workload(material, disk)
        hosts = [self._server_dir, *(self._directory / f"host-{number}" for number in range(2, self._size.hosts + 1))]
        for host in hosts[1:]:
            host.mkdir()
        crew = Crew(deployment, self._size.workers, hosts)
        havoc = self._havoc(crew, parts, disk)
        stack.callback(crew.stop_watching)
        subscriber = self._subscriber(stack, deployment, mqtt)
        crew.start()
        producer = Producer(deployment.app, workload)
        self._storm(producer, havoc)
        audit = Audit(deployment.app, material, crew.blows)
        self._settle(audit, deployment, crew, producer, parts["broker"], subscriber)
        audit.jobs(producer.jobs)
        if subscriber is not None:
            audit.told(subscriber)
            heard = f"a subscriber heard {subscriber.heard:,} changes in {subscriber.messages:,} messages"
            heard += f" and missed {audit.missed:,} while it was away"
            self._note(f"{heard}; {audit.outages_of_mqtt()}")
        roots = [self._directory / "out", self._directory / "notes", *([disk.path] if disk else [])]
        audit.files(roots, producer.jobs)
        audit.kills(self._size.kills)
        for error in havoc.errors:
            audit.complain(f"havoc itself failed: {error}")
        for crash in crew.crashes:
            audit.complain(crash)
        for refusal in producer.refusals:
            if not refusal.is_clear:
                audit.complain(f"the producer was told {refusal.error}")
        if producer.unsent:
            audit.complain(
                f"{producer.unsent} orders could not be submitted; the last refusal: {producer.refusals[-1:]}"
            )
        outcome = Outcome(
            combination=self._combination,
            seed=self._seed,
            jobs=len(producer.jobs),
            duration_s=time.monotonic() - begin,
            audit=audit,
            blows=crew.blows,
            refusals=len(producer.refusals),
            exits=crew.exits,
            notes=self._notes,
            directory=self._directory if audit.findings or self._is_kept else None,
        )
        if outcome.directory is not None:
            self._keep(outcome, parts, deployment, producer)
        return outcome

    # The stages

    def _servers(self) -> dict[str, servers.Server]:
        if self._combination == "embedded":
            return {
                "broker": servers.EmbeddedBroker(self._server_dir),
                "database": servers.SqliteDatabase(self._server_dir),
            }
        broker = servers.RabbitmqBroker(QUEUES) if self._combination == "rabbitmq" else servers.RedisBroker()
        return {"broker": broker, "database": servers.PostgresDatabase()}

    def _mqtt(self) -> servers.Mosquitto | None:
        try:
            return servers.Mosquitto()
        except servers.services.ServiceMissing as exc:
            self._note(f"{NO_MQTT}: {exc}")
            return None

    def _subscriber(
        self, stack: ExitStack, deployment: Deployment, mqtt: servers.Mosquitto | None
    ) -> Subscriber | None:
        if mqtt is None:
            return None
        subscriber = Subscriber(mqtt.port, deployment.app.settings.mqtt_topic)
        stack.callback(subscriber.close)
        return subscriber

    def _disk(self, stack: ExitStack) -> SmallDisk | None:
        disk = SmallDisk(self._directory / "small")
        stack.callback(disk.unmount)
        disk.mount()
        if disk.why_not:
            self._note(f"{NO_FULL_DISK}: {disk.why_not}")
            return None
        return disk

    def _workload(self, material: Material, disk: SmallDisk | None) -> Workload:
        return Workload(
            material,
            random.Random(f"{self._seed} work"),  # noqa: S311 (no secret)
            jobs=self._size.jobs,
            seconds=self._size.seconds,
            outputs=self._directory / "out",
            notes=self._directory / "notes",
            small_disk=disk.path if disk else None,
        )

    def _havoc(self, crew: Crew, parts: dict[str, servers.Server], disk: SmallDisk | None) -> Havoc:
        chance = random.Random(f"{self._seed} havoc")  # noqa: S311 (no secret)
        havoc = Havoc(crew, parts, disk, chance, kills=self._size.kills, seconds=self._size.seconds)
        what = f"seed {self._seed}, {self._size.jobs} jobs in {self._size.seconds:.0f} s"
        self._say(f"{self._combination}: {what}; files in {self._directory}")
        for planned in havoc.schedule:
            self._say(f"  {planned}")
        return havoc

    def _storm(self, producer: Producer, havoc: Havoc) -> None:
        havoc_thread = threading.Thread(target=havoc.run, name="havoc")
        producer.start()
        havoc_thread.start()
        havoc_thread.join()
        producer.join(timeout=self._size.seconds + 60)
        producer.give_up()
        producer.join(timeout=30)

    def _settle(
        self,
        audit: Audit,
        deployment: Deployment,
        crew: Crew,
        producer: Producer,
        broker: servers.Server,
        subscriber: Subscriber | None,
    ) -> None:
        """Wait until all has ended and been cleaned up, each within its time; then let the workers go."""
        store, patiently = deployment.app.store, deployment.app.patiently
        self._say(f"{self._combination}: the storm is over, {len(producer.jobs)} jobs were accepted")
        with _complaining(audit):  # each job that has not ended is found by itself
            eventually(
                lambda: not patiently(store.queue_counts),
                SETTLED_WITHIN_S,
                lambda: f"unfinished: {store.queue_counts()}",
                interval_s=0.1,
            )
        names = {post.name for post in crew.posts}
        with suppress(AssertionError):
            eventually(lambda: not broker.remains(QUEUES), DRAINED_WITHIN_S, interval_s=0.5)
        audit.messages(broker.remains(QUEUES))
        with _complaining(audit):
            eventually(
                lambda: sorted(holder.worker_id for holder in store.holders()) == sorted(names),
                DRAINED_WITHIN_S,
                lambda: f"leases of {sorted(holder.worker_id for holder in store.holders())}, workers {sorted(names)}",
            )
        with _complaining(audit):
            eventually(
                lambda: not store.unsettled(_later()),
                DRAINED_WITHIN_S,
                lambda: f"untold ends: {store.unsettled(_later())}",
            )
        if subscriber is not None:
            self._settle_mqtt(audit, deployment, crew, subscriber)
        crew.stop_watching()
        for complaint in crew.dismiss():
            audit.complain(complaint)
        if subscriber is not None and (left := shown_workers(deployment)):
            audit.complain(f"topics are left after the workers stopped in order: {left}")
        if left := store.holders():
            audit.complain(f"leases are left after the workers stopped in order: {left}")

    def _settle_mqtt(self, audit: Audit, deployment: Deployment, crew: Crew, subscriber: Subscriber) -> None:
        """Wait until every change is told, and every worker shown as it is: alive and idle."""
        idle = {post.name: POOL_CHILDREN for post in crew.posts}
        with _complaining(audit):
            eventually(
                lambda: shown_workers(deployment) == idle,
                DRAINED_WITHIN_S,
                lambda: f"free slots as MQTT has them: {shown_workers(deployment)}; workers: {idle}",
                interval_s=0.5,
            )
        with _complaining(audit):
            eventually(
                lambda: audit.is_told(subscriber),
                DRAINED_WITHIN_S,
                "a subscriber has heard every change",
                interval_s=0.5,
            )

    # When something was found

    def _keep(
        self, outcome: Outcome, parts: dict[str, servers.Server], deployment: Deployment, producer: Producer
    ) -> None:
        from tests.chaos import report

        for role, part in parts.items():
            (self._logs / f"{role}.log").write_text(part.log)
        refusals = [f"{refusal.at:{report.CLOCK}} {refusal.trace}" for refusal in producer.refusals]
        (self._directory / "refusals.txt").write_text("\n".join(refusals))
        report.write_stories(outcome, deployment.app, self._directory / "stories.txt", self._logs)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._say(f"{self._combination}: {text}")


@contextmanager
def _complaining(audit: Audit) -> Iterator[None]:
    try:
        yield
    except AssertionError as exc:
        audit.complain(str(exc))


def shown_workers(deployment: Deployment) -> dict[str, int]:
    """{worker: free slots} as a new subscriber to the capability topics sees them."""
    from tasks.cli.mqtt_connection import Connection

    settings = deployment.app.settings
    with Connection(settings) as connection:
        messages = connection.retained(f"{settings.capability_topic_prefix}/+")
    shown = [json.loads(message.payload) for message in messages if message.payload]
    return {worker["worker_id"]: worker["idle_count"] for worker in shown}


def _later() -> Any:
    from datetime import timedelta

    from db.records import now

    return now() + timedelta(hours=1)
