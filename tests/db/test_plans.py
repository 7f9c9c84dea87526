"""With a million rows none of the statements that run for a job, or in a list, may read the whole table."""

import re

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Engine

from db.records import Failure, Status
from tests.db.conftest import claim, running

FAILURE = Failure(error_type="E", error_message="m")
ROWS = 20_000

CALLS = {
    "claim": lambda store, job, attempt: claim(store, job),
    "take over": lambda store, job, attempt: claim(store, job, is_redelivered=True),
    "owns": lambda store, job, attempt: store.owns(job.job_id, attempt),
    "progress": lambda store, job, attempt: store.progress(job.job_id, attempt, percent=1.0),
    "complete": lambda store, job, attempt: store.complete(job.job_id, attempt, {}),
    "end": lambda store, job, attempt: store.end(job, Status.FAILED, FAILURE, attempt=attempt),
    "requeue": lambda store, job, attempt: store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1),
    "replay": lambda store, job, attempt: store.replay(job.job_id),
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
    columns = "job_id, task_type, queue, parameters, status, claimed_by, group_id, in_chord, created_at, updated_at"
    at = "'2026-01-01 00:00:00.000000'"
    with store.database.transaction() as connection:
        connection.execute(
            text(
                f"INSERT INTO task_queue ({columns}) {number} SELECT 'old-' || i, 'image_resize', 'image_resize',"
                f" '{{}}', CASE WHEN i % 3 = 0 THEN 'queued' ELSE 'completed' END, 'w' || (i % 50), 'g' || (i % 500),"
                f" true, {at}, {at} FROM n"
            )
        )
    if not store.database.is_sqlite:
        with store.database.reading() as connection:
            connection.execute(text("ANALYZE task_queue"))
    return store


@pytest.mark.parametrize("name", CALLS)
def test_no_statement_of_the_store_reads_the_whole_table(full_store, name):
    job, attempt = running(full_store, group_id="g", in_chord=True)
    executed = []

    def record(_connection, _cursor, statement, parameters, _context, is_many):
        executed.append((statement, parameters[0] if is_many and parameters else parameters))

    event.listen(Engine, "before_cursor_execute", record)
    try:
        CALLS[name](full_store, job, attempt)
    finally:
        event.remove(Engine, "before_cursor_execute", record)

    assert executed
    for statement, parameters in executed:
        if not statement.startswith(("INSERT", "BEGIN", "COMMIT")):
            plan = plan_of(full_store.database, statement, parameters)
            assert not reads_everything(plan, statement), f"{statement}\n{plan}"


def test_a_statement_that_does_is_noticed(full_store):
    statement = "SELECT count(*) FROM task_queue WHERE stage = 'x'"

    assert reads_everything(plan_of(full_store.database, statement, ()), statement)


def plan_of(database, statement, parameters):
    explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
    with database.reading() as connection:
        rows = connection.exec_driver_sql(explain + statement, parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


def reads_everything(plan, statement):
    """A scan in the order of the key that ends at a LIMIT reads what it returns."""
    is_cut = "LIMIT" in statement and "WHERE" not in statement
    return bool(re.search(r"SCAN (task_queue|q)\b|Seq Scan on task_queue", plan)) and not is_cut
