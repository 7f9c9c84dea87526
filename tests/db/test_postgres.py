"""PostgreSQL: restarts, lost sessions, forks, and what people read when it can't be used."""

import socket
import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import make_url, text

from db import schema
from db.engine import patiently
from db.errors import DatabaseUnavailable, DatabaseUnusable, is_transient
from db.records import Decision, Liveness, now
from db.store import Store
from tests import services
from tests.db.conftest import claim, new_job, open_database, row_of
from tests.db.processes import in_processes
from tests.tooling.waiting import eventually


@pytest.fixture
def store(upgraded_postgres_url):
    store = Store(open_database(upgraded_postgres_url))
    yield store
    store.database.close()


OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def end_sessions(url):
    """The server ends all sessions of the database, as a restart does."""
    other = open_database(url)
    with other.reading() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend(pid) {OTHERS}"))
        eventually(lambda: connection.execute(text(f"SELECT count(*) {OTHERS}")).scalar() == 0, 10)
    other.close()


def test_times_are_read_in_utc_whatever_zone_the_server_has(upgraded_postgres_url):
    url = make_url(upgraded_postgres_url).update_query_dict({"options": "-c TimeZone=Asia/Tokyo"})
    store = Store(open_database(url.render_as_string(hide_password=False)))
    job = new_job(run_after_utc=now())
    attempt = claim(store, job).attempt

    store.requeue(job.job_id, attempt=attempt, event="retry", retry_count=1, delay_s=60.0)

    due_at = row_of(store, job)["run_after_utc"]
    assert (due_at.utcoffset(), 55 < (due_at - now()).total_seconds() <= 60) == (timedelta(0), True)
    assert store.logs(job.job_id)[-1]["details"]["run_after_utc"] == due_at.isoformat()
    store.database.close()


class TestRestarts:
    def test_a_session_that_ended_while_idle_is_replaced_without_an_error(self, store, upgraded_postgres_url):
        store.enqueue(new_job("pg-before"))
        end_sessions(upgraded_postgres_url)

        for _ in range(3):
            assert store.job("pg-before") is not None

    def test_patience_outlasts_a_restart(self, private_postgres):
        server = private_postgres()
        store = Store(open_database(server.url))
        schema.upgrade(store.database)
        jobs, waits, claims = [new_job() for _ in range(200)], [], []
        for job in jobs:
            store.enqueue(job)
        is_down = threading.Event()

        def claim_all():
            for job in jobs:
                claims.append(
                    patiently(lambda job=job: claim(store, job), on_wait=lambda exc, _wait_s: waits.append(exc))
                )
                if len(claims) == 10:
                    is_down.wait(20)

        worker = threading.Thread(target=claim_all)
        worker.start()
        eventually(lambda: len(claims) >= 10, 10)
        server.kill9()
        is_down.set()
        eventually(lambda: waits, 10)
        server.start()
        worker.join(30)

        assert [(claimed.decision, claimed.attempt) for claimed in claims] == [(Decision.RUN, 1)] * len(jobs)
        assert waits
        assert all(isinstance(exc, DatabaseUnavailable) for exc in waits)
        assert {row_of(store, job)["deaths"] for job in jobs} == {0}
        store.database.close()

    def test_a_session_lost_in_a_transaction_is_a_transient_error(self, store, upgraded_postgres_url):
        def write_while_it_ends():
            with store.database.transaction() as connection:
                connection.execute(text("SELECT 1"))
                end_sessions(upgraded_postgres_url)
                connection.execute(text("SELECT 1"))

        with pytest.raises(DatabaseUnavailable) as error:
            write_while_it_ends()

        assert is_transient(error.value)
        assert store.enqueue(new_job())


class TestErrors:
    def test_a_server_that_does_not_answer_is_waited_for_and_its_password_not_told(self):
        store = Store(open_database(f"postgresql+psycopg://me:secret@127.0.0.1:{services.free_port()}/jobs"))

        with pytest.raises(DatabaseUnavailable, match=r"me:\*\*\*@127\.0\.0\.1:\d+/jobs does not answer") as error:
            store.jobs()

        assert "secret" not in str(error.value)

    def test_a_server_that_takes_a_connection_and_says_nothing_is_waited_for(self):
        """As one whose machine is overloaded or frozen."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            url = f"postgresql://me@127.0.0.1:{port}/jobs?connect_timeout=2"
            database = open_database(url)
            with pytest.raises(DatabaseUnavailable, match="does not answer") as error:
                Store(database).counts()
            database.close()

        assert is_transient(error.value)

    def test_an_unknown_database_is_final_and_can_be_created(self, upgraded_postgres_url):
        unknown = make_url(upgraded_postgres_url).set(database="unknown")
        store = Store(open_database(unknown.render_as_string(hide_password=False)))

        with pytest.raises(DatabaseUnusable, match=r"/unknown is not there .*; create it \(createdb\), then run"):
            patiently(store.jobs, on_wait=lambda *_: pytest.fail("it waited"))

    def test_a_lost_table_is_final(self, fresh_postgres_url):
        database = open_database(fresh_postgres_url)
        schema.upgrade(database)
        store = Store(database)
        store.jobs()
        with database.transaction() as connection:
            connection.execute(text("DROP TABLE task_logs"))

        with pytest.raises(DatabaseUnusable, match=r"lacks a table of media-tasks .*db upgrade"):
            store.logs("a")
        database.close()

    def test_a_mistake_in_a_statement_stays_what_it_is(self, store):
        with pytest.raises(Exception, match="syntax error") as error, store.database.reading() as connection:
            connection.execute(text("SELEKT"))

        assert not is_transient(error.value)

    def test_locks_that_wait_for_each_other_are_transient(self, store):
        store.save_group("lock-a", None)
        store.save_group("lock-b", None)
        lock = text("SELECT 1 FROM task_groups WHERE group_id = :id FOR UPDATE")
        both, errors = threading.Barrier(2), []

        def take(first, second):
            try:
                with store.database.transaction() as connection:
                    connection.execute(lock, {"id": first})
                    both.wait(10)
                    connection.execute(lock, {"id": second})
            except DatabaseUnavailable as exc:
                errors.append(exc)

        threads = [threading.Thread(target=take, args=pair) for pair in (("lock-a", "lock-b"), ("lock-b", "lock-a"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(errors) == 1
        assert "deadlock" in str(errors[0])


class TestProcesses:
    def test_children_forked_while_threads_write_all_answer(self, store):
        is_over = threading.Event()

        def write(number):
            index = 0
            while not is_over.is_set():
                store.enqueue(new_job(f"pg-thread-{number}-{index}"))
                index += 1

        threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(40):
                in_processes(1, lambda _n, number=number: store.enqueue(new_job(f"pg-child-{number}")), timeout_s=20)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()

        assert len(store.jobs(id_prefix="pg-child-", limit=1000)) == 40

    def test_a_child_leaves_the_parents_session_alone(self, store):
        def session():
            with store.database.reading() as connection:
                return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()

        mine = session()

        assert in_processes(2, lambda _number: session() != mine) == [True, True]
        assert session() == mine

    def test_threads_do_not_wait_for_each_other(self, store):
        def sleep():
            with store.database.reading() as connection:
                connection.execute(text("SELECT pg_sleep(0.5)"))

        threads = [threading.Thread(target=sleep) for _ in range(4)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert time.monotonic() - began < 1.5

    def test_hot_writes_are_one_statement_each(self, store):
        """Each is one round trip: no BEGIN, no COMMIT, no ping."""
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        job, statements = new_job("pg-hot"), []
        store.jobs(limit=1)
        event.listen(Engine, "before_cursor_execute", record := lambda *args: statements.append(args[2]))
        try:
            store.enqueue(job)
            claimed = store.claim(
                job.job_id,
                unknown=lambda: job,
                publication=1,
                worker_id="worker-1",
                lease="lease",
                judge=lambda _: Liveness.ALIVE,
                max_deaths=3,
            )
            store.complete(job.job_id, claimed.attempt, {})
        finally:
            event.remove(Engine, "before_cursor_execute", record)

        assert claimed.decision is Decision.RUN
        assert len(statements) == 3
        assert all(statement.startswith("WITH changed AS") for statement in statements)
