"""Retained capability topics against the workers that the job table knows. In: both. Out: where they disagree.

Nothing in a topic or its payload tells of which deployment its worker is. Another one, with a job table of its own, may
stand below the same prefix of the same MQTT broker: so a topic that no worker here explains is only reported, with the
command that clears it. Workers don't look for such topics. They may read none (see docker/mosquitto/acl), and need not:
the last will clears the topic of a dead worker, and what is left all the same expires after three heartbeats.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from tasks.cli.text import remark

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


@dataclass(frozen=True, slots=True)
class Known:
    """A worker as the job table has it. `is_settled`: alive for long enough to have shown itself."""

    worker_id: str
    status: str
    is_dead: bool
    heard_at: datetime
    is_alive: bool
    is_settled: bool


def retained_doubts(app: "MediaTasks") -> Iterator[tuple[str, str]]:
    """Topics, and what may be wrong with each; nothing with BROADCAST_TYPE=noop.

    Workers are read before and after the topics: one that comes or goes meanwhile is no disagreement.
    """
    if app.settings.broadcast_type == "noop":
        return
    before = _known(app)
    topics = _retained(app)
    if topics is None:
        return
    after = _known(app)
    yield from _unexplained(topics, before, after)
    heartbeat_s = app.settings.mqtt_heartbeat_interval_s
    for topic, worker in sorted(after.items()):
        if topic not in topics and worker.is_alive and topic in before and before[topic].is_settled:
            again = f"it is shown again within {heartbeat_s:g} s (MQTT_HEARTBEAT_INTERVAL)"
            yield topic, f"worker {worker.worker_id} is alive and not shown; if it tells this MQTT broker, {again}"


def _unexplained(
    topics: list[str], before: Mapping[str, Known], after: Mapping[str, Known]
) -> Iterator[tuple[str, str]]:
    for topic in topics:
        if not any(topic in known and known[topic].is_alive for known in (before, after)):
            remedy = f"celery -A tasks mqtt cleanup {shlex.quote(topic)}"
            yield topic, f"{_gone(after.get(topic))}; unless another deployment has a worker of this name: {remedy}"


def _gone(worker: Known | None) -> str:
    from db.records import GONE

    if worker is None:
        return "the job table knows no such worker"
    status = "dead" if worker.is_dead else worker.status if worker.status in GONE else "silent"
    return f"worker {worker.worker_id} is {status}, last heard of at {worker.heard_at:%Y-%m-%d %H:%M:%S} UTC"


def _retained(app: "MediaTasks") -> list[str] | None:
    """The topics of workers that hold something; None, with one line that says why, if they can't be read."""
    from tasks.cli.mqtt_connection import Connection
    from tasks.errors import SettingsError

    try:
        with Connection(app.settings) as connection:
            messages = connection.retained(f"{app.settings.capability_topic_prefix}/+")
    except (click.ClickException, SettingsError) as exc:
        remark(f"retained topics are left out: {exc.message if isinstance(exc, click.ClickException) else exc}")
        return None
    return sorted({message.topic for message in messages if message.payload})


def _known(app: "MediaTasks") -> dict[str, Known]:
    """{topic: its worker}"""
    from db.records import now
    from tasks.reconciler import SETTLED_AFTER_S
    from tasks.sinks.topics import capability_topic

    dead = {holder.lease for holder in app.store.holders() if app.leases.seems_dead(holder)}
    alive = {worker["worker_id"] for worker in app.live_workers() if worker["lease"] not in dead}
    settled_since = now() - timedelta(seconds=SETTLED_AFTER_S)
    known: dict[str, Known] = {}
    for row in app.store.workers():
        is_alive = row["worker_id"] in alive
        known[capability_topic(app.settings.capability_topic_prefix, row["worker_id"])] = Known(
            worker_id=row["worker_id"],
            status=row["status"],
            is_dead=row["lease"] in dead,
            heard_at=row["last_heartbeat"],
            is_alive=is_alive,
            is_settled=is_alive and row["started_at"] < settled_since,
        )
    return known
