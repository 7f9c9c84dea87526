"""`db ...` on a SQLite file that a live worker uses, and on PostgreSQL."""

import sqlite3
from contextlib import closing

import pytest

from tests.tooling.waiting import eventually

EIGHT_PRAGMAS = {
    "journal_mode": "wal",
    "foreign_keys": "1",
    "busy_timeout": "5000",
    "synchronous": "1",
    "cache_size": "-10000",
    "mmap_size": "268435456",
    "auto_vacuum": "2",
    "temp_store": "2",
}


@pytest.fixture
def busy(celery, run_worker, photo):
    """`celery`, with a live worker that has done a job."""
    run_worker("--concurrency=1")
    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout", 30)
    assert done.returncode == 0, done.stderr
    return celery


def pairs(text):
    return dict(line.split(None, 1) for line in text.splitlines())


def test_a_file_that_a_worker_uses_can_be_counted_checked_cleaned_and_copied(busy, server_dir, photo, tmp_path):
    # What is in it
    counted = pairs(busy("db", "stats").stdout)
    assert counted["image_resize"] == "completed 1"
    assert (counted["task_queue"], counted["worker_heartbeats"]) == ("1", "1")
    assert int(counted["file_bytes"].replace(",", "")) > 0

    # How it is set
    assert pairs(busy("db", "pragmas").stdout) == EIGHT_PRAGMAS

    # Cleaning does not disturb the worker
    assert busy("db", "checkpoint").stdout.endswith(" left in the log\n")
    assert busy("db", "vacuum").stdout.count(" bytes") == 2

    # A copy of now: everything that is in the file, and nothing that comes later
    copied = busy("db", "backup", "copy.db")
    assert copied.returncode == 0, copied.stderr
    later = busy("submit", "image_resize", photo, "later.webp", "--width", 80, "--wait", "--timeout", 30)
    assert later.returncode == 0, later.stderr
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT status, progress FROM task_queue").fetchall() == [("completed", 100.0)]
        changes = copy.execute("SELECT event_type FROM task_logs WHERE job_id IS NOT NULL ORDER BY sequence").fetchall()
        assert [event for (event,) in changes] == ["created", "claimed", "started", "completed"]
        assert {name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'view'")} >= {
            "v_active_tasks",
            "v_worker_status",
            "v_task_stats",
        }


def test_a_restored_backup_is_the_job_table_again(celery, run_worker, server_dir, photo, tmp_path):
    # Given a job that waits, and a backup
    submitted = celery("submit", "image_resize", photo, "out.webp", "--width", 80)
    assert celery("db", "backup", "copy.db").returncode == 0

    # When the file is lost and the backup put in its place
    for path in server_dir.glob("media_store.db*"):
        path.unlink()
    (tmp_path / "copy.db").rename(server_dir / "media_store.db")

    # Then the job is there, and a worker does it
    run_worker("--concurrency=1")
    eventually((tmp_path / "out.webp").exists, 30)
    shown = celery("jobs", "show", submitted.stdout.strip())
    assert "image_resize" in shown.stdout


@pytest.mark.parametrize(
    ("target", "said"),
    [("there.db", "exists already"), ("no/such/folder/copy.db", "can't be written"), (".", "is a directory")],
)
def test_a_backup_never_overwrites_and_says_why_it_cannot_be_written(celery, tmp_path, target, said):
    (tmp_path / "there.db").write_text("mine")

    done = celery("db", "backup", target)

    assert done.returncode != 0
    assert said in done.error
    assert (tmp_path / "there.db").read_text() == "mine"


def test_a_file_that_is_no_database_is_named_in_one_line(celery, server_dir):
    (server_dir / "media_store.db").write_text("this is no database, but text that is long enough" * 30)

    for command in (("db", "stats"), ("db", "pragmas"), ("jobs", "list")):
        done = celery(*command)
        assert done.returncode == 1
        assert "file is not a database" in done.error


def test_upgrade_makes_a_sqlite_file_and_may_be_repeated(celery, server_dir):
    first, second = celery("db", "upgrade"), celery("db", "upgrade")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"{server_dir}/media_store.db: schema none -> 1_" in first.stdout
    assert "as before" in second.stdout


def test_postgresql_waits_for_upgrade_and_then_holds_the_jobs(celery, run_worker, fresh_postgres_url, photo, tmp_path):
    env = {"DATABASE_URL": fresh_postgres_url}
    before = celery("jobs", "list", env=env)
    assert before.returncode == 1
    assert "run: celery -A tasks db upgrade" in before.error

    made, again = celery("db", "upgrade", env=env), celery("db", "upgrade", env=env)
    assert "schema none -> 1_" in made.stdout, made.stderr
    assert "as before" in again.stdout, again.stderr

    run_worker("--concurrency=1", env=env)
    done = celery("submit", "image_resize", photo, "out.webp", "--width", 80, "--wait", "--timeout", 30, env=env)
    assert done.returncode == 0, done.stderr
    assert "image_resize             completed 1" in celery("db", "stats", env=env).stdout
    assert " completed " in celery("jobs", "list", env=env).stdout
    for command, remedy in {"pragmas": "SHOW ALL", "vacuum": "autovacuum", "checkpoint": "by itself"}.items():
        refused = celery("db", command, env=env)
        assert (refused.returncode, remedy in refused.error) == (1, True)
    refused = celery("db", "backup", tmp_path / "copy.db", env=env)
    assert "pg_dump" in refused.error
    assert not (tmp_path / "copy.db").exists()


def test_the_password_of_a_database_is_never_printed(celery):
    env = {"DATABASE_URL": "postgresql://me:s3cret@127.0.0.1:1/jobs"}

    done = celery("db", "upgrade", env=env)

    assert done.returncode == 1
    assert "does not answer" in done.error
    assert "s3cret" not in done.stderr + done.stdout
