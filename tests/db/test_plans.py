"""With a million rows none of the statements that run for a job, or in a list, may read the whole table."""

import re
from contextlib import contextmanager
from unittest import mock

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Engine

from db.prepared import DriverStatement
from db.records import Failure, Fence, Liveness, Status, now
from tests.db.conftest import claim, new_job, running

FAILURE = Failure(error_type="E", error_message="m")
ROWS = 20_000

CALLS = {
    "claim": lambda store, job, attempt: claim(store, job),
    "claim of a paused queue": lambda store, job, attempt: claim_paused(store),
    "take over": lambda store, job, attempt: claim(store, job, "worker-2", liveness=Liveness.DEAD),
    "owns": lambda store, job, attempt: store.owns(job.job_id, attempt),
    "progress": lambda store, job, attempt: store.progress(job.job_id, attempt, percent=1.0),
    "complete": lambda store, job, attempt: store.complete(job.job_id, attempt, {}),
    "end": lambda store, job, attempt: store.end(job.job_id, Status.FAILED, FAILURE, fence=Fence(attempt=attempt)),
    "requeue": lambda store, job, attempt: store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1),
    "replay": lambda store, job, attempt: store.replay(job.job_id),
    "close": lambda store, job, attempt: store.close(job.job_id, attempt, reason="dead"),
    "rest": lambda store, job, attempt: store.rest(job.job_id, 1),
    "enqueue unique": lambda store, job, attempt: store.enqueue_unique(new_job(unique_key="k")),
    "enqueue the same": lambda store, job, attempt: [store.enqueue_unique(new_job(unique_key="k")) for _ in range(2)],
    "living": lambda store, job, attempt: store.living("k"),
    "take due": lambda store, job, attempt: store.take_due(100),
    "next due": lambda store, job, attempt: store.next_due_s(),
    "published": lambda store, job, attempt: store.published(now()),
    "published in": lambda store, job, attempt: store.published_in("image_resize", now(), limit=100),
    "newest running": lambda store, job, attempt: store.newest_running("image_resize"),
    "newest row": lambda store, job, attempt: store.newest(),
    "queued in": lambda store, job, attempt: store.queued_in("image_resize", limit=100),
    "republish": lambda store, job, attempt: store.republish(job.job_id, 1, "lost"),
    "expired": lambda store, job, attempt: store.expired(),
    "settle": lambda store, job, attempt: store.settle(job.job_id),
    "unsettled": lambda store, job, attempt: store.unsettled(now()),
    "held by": lambda store, job, attempt: store.held_by("worker-1", "lease of worker-1"),
    "held by nobody": lambda store, job, attempt: store.held_by_nobody(for_s=15.0),
    "cancelled under": lambda store, job, attempt: store.cancelled_under("worker-1", "lease of worker-1"),
    "forget lease": lambda store, job, attempt: store.forget_lease("lease of worker-1"),
    "cancelled of": lambda store, job, attempt: store.cancelled_of([job.job_id, "other"]),
    "failed member": lambda store, job, attempt: store.failed_member("g"),
    "jobs ahead": lambda store, job, attempt: store.jobs_ahead("image_resize", 5, 1000),
    "chord": lambda store, job, attempt: store.chord_parts("g", 1),
    "job": lambda store, job, attempt: store.job(job.job_id),
    "jobs by id": lambda store, job, attempt: store.jobs_by_id([job.job_id, "other"]),
    "logs": lambda store, job, attempt: store.logs(job.job_id),
    "newest": lambda store, job, attempt: store.jobs(),
    "by status": lambda store, job, attempt: store.jobs(status=Status.FAILED),
    "by task": lambda store, job, attempt: store.jobs(task_type="video_probe"),
    "by status and task": lambda store, job, attempt: store.jobs(status=Status.FAILED, task_type="video_probe"),
    "by beginning": lambda store, job, attempt: store.jobs(id_prefix="job-1", limit=2),
    "worker status": lambda store, job, attempt: view(store, "SELECT * FROM v_worker_status"),
    "claim order": lambda store, job, attempt: view(
        store,
        "SELECT job_id FROM task_queue WHERE status = 'queued' AND queue = 'image_resize'"
        " ORDER BY priority DESC, id LIMIT 1",
    ),
    "active": lambda store, job, attempt: view(
        store, "SELECT * FROM v_active_tasks WHERE status IN ('claimed', 'running')"
    ),
}


# Counts what is queued, in an index that holds nothing else.
COUNTS_QUEUED = {"published"}
# What these look for stands in few rows, which have an index of their own.
INDEXES = {
    "take due": "idx_task_queue_due",
    "next due": "idx_task_queue_due",
    "expired": "idx_task_queue_expiring",
    "unsettled": "idx_task_queue_sequel",
    "living": "idx_task_queue_unique",
    "held by": "idx_task_queue_worker",
}


def claim_paused(store):
    job = new_job()
    store.enqueue(job)
    store.pause(job.queue)
    claim(store, job)


def view(store, statement):
    with store.database.reading() as connection:
        connection.exec_driver_sql(statement).fetchall()


@pytest.fixture
def full_store(store):
    """A store with many rows, most of them completed, as they come to be."""
    number = (
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})"
        if store.database.is_sqlite
        else f"WITH n AS (SELECT * FROM generate_series(1, {ROWS}) AS i)"
    )
    columns = (
        "job_id, task_type, queue, parameters, status, claimed_by, group_id, in_chord, created_at, updated_at,"
        " published_at, completed_at"
    )
    at = f"{'' if store.database.is_sqlite else 'timestamptz '}'2026-01-01 00:00:00.000000'"
    with store.database.transaction() as connection:
        connection.execute(
            text(
                f"INSERT INTO task_queue ({columns}) {number} SELECT 'old-' || i, 'image_resize', 'image_resize',"
                f" '{{}}', CASE WHEN i % 3 = 0 THEN 'queued' ELSE 'completed' END, 'w' || (i % 50), 'g' || (i % 500),"
                f" true, {at}, {at}, {at}, CASE WHEN i % 3 = 0 THEN NULL ELSE {at} END FROM n"
            )
        )
    if not store.database.is_sqlite:
        with store.database.reading() as connection:
            connection.execute(text("VACUUM ANALYZE task_queue"))
    return store


@pytest.mark.parametrize("name", CALLS)
def test_no_statement_of_the_store_reads_the_whole_table(full_store, name):
    for statement, plan in plans_of(full_store, name):
        assert not reads_everything(plan, statement, counts_queued=name in COUNTS_QUEUED), f"{statement}\n{plan}"


@pytest.mark.parametrize("name", INDEXES)
def test_what_is_looked_for_all_the_time_is_found_in_its_index(full_store, name):
    plans = [plan for statement, plan in plans_of(full_store, name) if "task_queue" in statement]

    assert plans
    for plan in plans:
        assert INDEXES[name] in plan


def plans_of(store, name):
    """The statements of a call, each with its plan."""
    job, attempt = running(store, group_id="g", in_chord=True)
    with executed_by() as executed:
        CALLS[name](store, job, attempt)

    assert executed
    return [
        (statement, plan_of(store.database, statement, parameters))
        for statement, parameters in executed
        if not statement.startswith(("INSERT", "BEGIN", "COMMIT"))
    ]


@contextmanager
def executed_by():
    """What drivers get in this block: the statements, each with its parameters."""
    executed, parameters_of = [], DriverStatement.parameters

    def record(_connection, _cursor, statement, parameters, _context, is_many):
        executed.append((statement, parameters[0] if is_many and parameters else parameters))

    def recorded(statement, bound):
        executed.append((statement.sql, parameters_of(statement, bound)))
        return executed[-1][1]

    event.listen(Engine, "before_cursor_execute", record)
    try:
        with mock.patch.object(DriverStatement, "parameters", recorded):
            yield executed
    finally:
        event.remove(Engine, "before_cursor_execute", record)


def test_a_statement_that_does_is_noticed(full_store):
    statement = "SELECT count(*) FROM task_queue WHERE stage = 'x'"

    assert reads_everything(plan_of(full_store.database, statement, ()), statement)


def plan_of(database, statement, parameters):
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
    with database.reading() as connection:
        rows = connection.exec_driver_sql(explain + statement, parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


def reads_everything(plan, statement, *, counts_queued=False):
    """A scan in the order of the key that ends at a LIMIT reads what it returns."""
    if counts_queued:
        plan = plan.replace("SCAN task_queue USING COVERING INDEX idx_task_queue_claiming", "")
    is_cut = "LIMIT" in statement and "WHERE" not in statement
    return bool(re.search(r"SCAN (task_queue|q)\b|Seq Scan on task_queue", plan)) and not is_cut
