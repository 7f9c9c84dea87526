"""Jobs for unit tests, in the states that they need: claimed by somebody, resting, older than they are."""

import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery.app.trace import build_tracer
from sqlalchemy import update

from db.models import task_queue, worker_leases
from db.records import Claim, Heartbeat, Liveness, NewJob, now

ELSEWHERE = "another host"


class Clock:
    """Stands in for the module `time` where a test puts it."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def pass_s(self, seconds: float) -> None:
        self._ahead_s += seconds


def new_job(job_id: str, **values: Any) -> NewJob:
    values = {"task_type": "add", "queue": "add", "parameters": {}, **values}
    return NewJob(job_id=job_id, **{"message": {"args": [], "kwargs": values["parameters"], "options": {}}, **values})


def claim(
    store: Any,
    job: NewJob,
    worker_id: str = "w1",
    *,
    host_id: str = ELSEWHERE,
    liveness: Liveness = Liveness.ALIVE,
    **values: Any,
) -> Claim:
    """A claim as the guard makes it for a first delivery; `liveness` is that of who holds the job already."""
    lease = f"lease of {worker_id}"
    store.renew_lease(lease, worker_id, host_id)
    defaults = {"publication": 1, "max_deaths": 3, "lease": lease, "judge": lambda _: liveness}
    return store.claim(job.job_id, unknown=lambda: job, worker_id=worker_id, **{**defaults, **values})


def leave_lock(app: Any, lease: str) -> None:
    """The lock file of a worker that was killed: there, and held by nobody."""
    path = Path(app.settings.server_dir) / "leases" / lease
    path.parent.mkdir(exist_ok=True)
    path.touch()


def claimed_by(app: Any, job: Any, worker_id: str = "dead", *, host_id: str | None = None) -> int:
    """Have a worker claim a queued job, on this host unless told; its attempt. Nobody holds that worker's lock."""
    row = app.store.job(job.id)
    if host_id is None:
        leave_lock(app, f"lease of {worker_id}")
        host_id = app.leases.host_id
    return claim(app.store, new_job(job.id), worker_id, host_id=host_id, publication=row["publication"]).attempt


def change(app: Any, job: Any, **values: Any) -> None:
    """Change columns of a job's row."""
    with app.store.database.transaction() as connection:
        connection.execute(update(task_queue).where(task_queue.c.job_id == job.id).values(**values))


def silent_for(app: Any, seconds: float, worker_id: str) -> None:
    """Have a worker not have renewed its lease for so long."""
    renewed_at = now() - timedelta(seconds=seconds)
    with app.store.database.transaction() as connection:
        leases = update(worker_leases).where(worker_leases.c.worker_id == worker_id)
        connection.execute(leases.values(renewed_at=renewed_at))


def beat_of(worker_id: str, **values: Any) -> Heartbeat:
    defaults: dict[str, Any] = {"hostname": "h", "pid": 1, "capabilities": ["add"], "concurrency": 1, "status": "idle"}
    return Heartbeat(worker_id=worker_id, **{**defaults, "started_at": now(), **values})


def messages(producer: Any, queue: str) -> list[Any]:
    """Take all messages of a queue, the first to be served first."""
    taken = []
    with producer.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_declare(queue, durable=True)
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            taken.append(message)
    return taken


def publications(producer: Any, queue: str) -> list[tuple[str, int]]:
    """The job and the publication of each message of a queue."""
    return [(message.headers["id"], message.headers["publication"]) for message in messages(producer, queue)]


def run(task: Any, job_id: str, *args: Any, **headers: Any) -> Any:
    """Run a task as a pool child does; its result, or the name of the state that it ended in."""
    tracer = build_tracer(task.name, task, app=task.app)
    request = {"id": job_id, "task": task.name, "retries": 0, "delivery_info": {"routing_key": task.name}, **headers}
    outcome = tracer(job_id, list(args), {}, request=request)
    return outcome.retval if outcome.info is None else outcome.info.state


def run_message(producer: Any, task: Any) -> Any:
    """Run the one message of a task's queue."""
    (message,) = messages(producer, task.name)
    args, kwargs, embedded = message.payload
    assert not kwargs
    headers = {name: value for name, value in {**message.headers, **embedded}.items() if name not in ("id", "task")}
    return run(task, message.headers["id"], *args, **headers)


def mend(findings: Iterable[Any]) -> list[str]:
    """Mend what was found; the subjects."""
    found = list(findings)
    for finding in found:
        finding.mend()
    return [finding.subject for finding in found]
