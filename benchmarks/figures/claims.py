"""One reservation in the broker, and one claim by the guard, in a long queue and in a short one.

Rows are put there by SQL of this module's own, since a million publishes would take half an hour. Each timed operation
takes the oldest; what it took is replaced, untimed, so that the queues stay as long as they are.
"""

import json
import sqlite3
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.measure import Options, Row, interleaved, percentile
from db.engine import Database
from db.records import Liveness, NewJob
from db.store import Store
from tasks.broker.messages import MessageStore

SHORT = 1_000


def measure(options: Options) -> list[Row]:
    long = 100_000 if options.is_quick else 1_000_000
    sizes = (long, SHORT)
    return [
        *_rows("reserve in the broker", {size: _reserving(options.folder, size) for size in sizes}, options),
        *_rows("claim by the guard", {size: _claiming(options.folder, size) for size in sizes}, options),
    ]


def _rows(what: str, operations: dict[int, Iterator[float]], options: Options) -> list[Row]:
    """Blocks of 100 in turn."""
    times_ms: dict[int, list[float]] = {size: [] for size in operations}

    def block(size: int) -> float:
        times_ms[size] += [1000 * next(operations[size]) for _ in range(100)]
        return times_ms[size][-1]

    for size in operations:
        block(size)
        times_ms[size].clear()
    interleaved({str(size): lambda size=size: block(size) for size in operations}, options.rounds(10, 30))
    long = max(operations)
    nearly_all = {size: percentile(times, 99) for size, times in times_ms.items()}
    half = {size: percentile(times, 50) for size, times in times_ms.items()}
    ratio = half[long] / half[SHORT]
    return [
        Row(
            figure=f"{what} with {long:,} rows queued: p99",
            target="≤ 1 ms",
            measured=f"**{nearly_all[long]:.2f} ms**",
            detail=f"p50 {half[long]:.2f}, longest {max(times_ms[long]):.1f} ms; {len(times_ms[long])} times",
            value=nearly_all[long],
        ),
        Row(
            figure=f"{what} with {long:,} rows against {SHORT:,}: p50",
            target="≤ 1.5",
            measured=f"**{ratio:.2f}**",
            detail=f"{half[long]:.2f} against {half[SHORT]:.2f} ms; "
            f"p99 {nearly_all[long]:.2f} against {nearly_all[SHORT]:.2f} ms",
            value=ratio,
        ),
    ]


def _reserving(folder: Path, size: int) -> Iterator[float]:
    path = folder / f"broker-{size}.db"
    store = MessageStore(path, queue_strategy={})
    store.open()
    envelope, body = json.dumps({"headers": {"x": "y" * 400}, "properties": {}}), "z" * 300
    _fill(
        path,
        f"""INSERT INTO messages (queue, priority, "order", envelope, body, correlation_id)
        SELECT 'image_resize', 5, 0, ?, ?, lower(hex(randomblob(16))) FROM {_numbers(size)}""",
        (envelope, body),
    )
    while True:
        begun = time.perf_counter()
        (delivery,) = store.reserve("image_resize", "bench", 1)
        yield time.perf_counter() - begun
        store.ack([delivery.id], "bench")
        store.put(["image_resize"], envelope, body, priority=5)


def _claiming(folder: Path, size: int) -> Iterator[float]:
    path = folder / f"jobs-{size}.db"
    store = Store(Database(f"sqlite:///{path}"))
    store.enqueue(_job("template"))
    with closing(sqlite3.connect(path)) as database:
        columns = ", ".join(name for _, name, *_ in database.execute("PRAGMA table_info(task_queue)"))
    copied = columns.removeprefix("id, job_id, ")
    _fill(
        path,
        f"""INSERT INTO task_queue (job_id, {copied})
        SELECT lower(hex(randomblob(16))), {copied} FROM task_queue, {_numbers(size)} WHERE id = 1""",
    )
    _fill(
        path,
        """INSERT INTO task_logs (job_id, sequence, event_type, created_at)
        SELECT job_id, 1, 'created', created_at FROM task_queue WHERE id > 1""",
    )
    with closing(sqlite3.connect(path)) as database:
        ids = database.execute("SELECT job_id FROM task_queue WHERE id > 1 ORDER BY id LIMIT 20000").fetchall()
    oldest = deque(job_id for (job_id,) in ids)
    for number in count():
        job_id = oldest.popleft()
        begun = time.perf_counter()
        claim = store.claim(
            job_id,
            unknown=partial(_job, job_id),
            publication=1,
            worker_id="bench",
            lease="bench",
            judge=lambda _: Liveness.ALIVE,
            max_deaths=3,
        )
        yield time.perf_counter() - begun
        store.complete(job_id, claim.attempt, {})
        oldest.append(f"job-{number}")
        store.enqueue(_job(oldest[-1]))


def _job(job_id: str) -> NewJob:
    parameters = {"input": "/photos/in.jpg", "output": "/photos/out.jpg", "width": 400}
    message = {"args": [], "kwargs": parameters, "options": {"queue": "image_resize", "task_id": job_id}}
    return NewJob(job_id=job_id, task_type="image_resize", queue="image_resize", parameters=parameters, message=message)


def _fill(path: Path, statement: str, parameters: tuple[object, ...] = ()) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA cache_size = -500000")
        database.execute(statement, parameters)


def _numbers(size: int) -> str:
    """A table of so many rows."""
    following = f"SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {size}"
    return f"(WITH RECURSIVE number(n) AS ({following}) SELECT n FROM number)"
