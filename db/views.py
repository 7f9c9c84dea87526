"""The views that dashboards and people read; their names are a contract. SQL differs only in the arithmetic of time."""

# ruff: noqa: S608 (no value from outside enters these statements)

NAMES = ("v_active_tasks", "v_worker_status", "v_task_stats")

_SECONDS = {
    "sqlite": "((julianday({end}) - julianday({start})) * 86400.0)",
    "postgresql": "extract(epoch from ({end}) - ({start}))",
}
_NOW = {"sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')", "postgresql": "now()"}


def create_statements(dialect: str) -> list[str]:
    """`CREATE VIEW` for each view, in the SQL of `dialect` (sqlite or postgresql)."""
    now = _NOW[dialect]

    def seconds(start: str, end: str) -> str:
        return _SECONDS[dialect].format(start=start, end=end)

    return [
        f"""CREATE VIEW v_active_tasks AS
        SELECT job_id, task_type, queue, status, priority, progress, stage, claimed_by, publication, attempt, deaths,
               retry_count, created_at, run_after_utc, started_at,
               {seconds("created_at", f"coalesce(started_at, {now})")} AS waited_s,
               {seconds("started_at", now)} AS running_s
        FROM task_queue WHERE status IN ('queued', 'claimed', 'running')""",
        f"""CREATE VIEW v_worker_status AS
        SELECT worker_id, hostname, pid, status, capabilities, concurrency, tasks_processed, tasks_failed, started_at,
               last_heartbeat, {seconds("last_heartbeat", now)} AS silent_s,
               (SELECT count(*) FROM task_queue q
                WHERE q.claimed_by = w.worker_id AND q.status IN ('claimed', 'running')) AS active_tasks
        FROM worker_heartbeats w""",
        f"""CREATE VIEW v_task_stats AS
        SELECT task_type, status, count(*) AS jobs, sum(retry_count) AS retries, sum(deaths) AS deaths,
               avg({seconds("created_at", "started_at")}) AS avg_wait_s,
               avg({seconds("started_at", "completed_at")}) AS avg_run_s,
               max({seconds("started_at", "completed_at")}) AS max_run_s
        FROM task_queue GROUP BY task_type, status""",
    ]


def drop_statements() -> list[str]:
    """`DROP VIEW` for each view; done before every upgrade."""
    return [f"DROP VIEW IF EXISTS {name}" for name in NAMES]
