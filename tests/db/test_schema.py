"""What the migrations make is what the models say, under the names that others rely on; upgrades harm nobody."""

import importlib.resources
import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from db import schema, views
from db.models import metadata
from db.store import Store
from tasks.errors import DatabaseNotReady
from tests.db.conftest import KINDS, new_job, open_database, raw_sqlite
from tests.db.processes import in_processes

# The contract that SQL tools and dashboards read.
COLUMNS = {
    "task_queue": """id job_id task_type queue parameters priority status progress stage claimed_by claimed_at
        started_at completed_at created_at updated_at run_after_utc expires_at published_at retry_count max_retries
        publication attempt deaths deliveries root_id parent_id group_id unique_key result_data error_type
        error_message""",
    "worker_heartbeats": """worker_id hostname pid capabilities strategy concurrency status current_tasks
        tasks_processed tasks_failed started_at last_heartbeat""",
    "task_logs": "job_id worker_id event_type message details created_at",
}
INDEXES = {
    "task_queue": "idx_task_queue_claiming idx_task_queue_worker idx_task_queue_created",
    "worker_heartbeats": "idx_worker_heartbeat",
    "task_logs": "idx_task_logs_task idx_task_logs_worker",
}
VIEWS = {
    "v_active_tasks": """job_id task_type queue status priority progress stage claimed_by publication attempt deaths
        retry_count created_at run_after_utc started_at waited_s running_s""",
    "v_worker_status": """worker_id hostname pid status capabilities concurrency tasks_processed tasks_failed
        started_at last_heartbeat silent_s active_tasks""",
    "v_task_stats": "task_type status jobs retries deaths avg_wait_s avg_run_s max_run_s",
}


def script_directory():
    config = Config()
    config.set_main_option("script_location", "db:migrations")
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def set_version(database, version):
    with database.transaction() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = :version"), {"version": version})
    database.close()


def tables_of(database):
    with database.reading() as connection:
        found = inspect(connection)
        return {*found.get_table_names(), *found.get_view_names()}


class TestContract:
    def test_the_migrations_make_what_the_models_say(self, database):
        with database.reading() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            differences = compare_metadata(context, metadata)

        # Alembic can't read SQLite's index of an expression; the next test does.
        unread = (schema.VERSION_TABLE, "idx_task_queue_claiming") if database.is_sqlite else (schema.VERSION_TABLE,)
        assert [diff for diff in differences if not any(name in str(diff) for name in unread)] == []

    def test_the_claiming_index_is_in_claim_order(self, database):
        with database.reading() as connection:
            catalogue = (
                "SELECT sql FROM sqlite_master WHERE name = 'idx_task_queue_claiming'"
                if database.is_sqlite
                else "SELECT indexdef FROM pg_indexes WHERE indexname = 'idx_task_queue_claiming'"
            )
            definition = connection.exec_driver_sql(catalogue).scalar_one()

        assert "(queue, priority DESC, id, published_at)" in definition
        assert "'queued'" in definition

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_index_of_the_migrations_is_the_one_of_the_models(self, request, kind):
        """To its last condition: Alembic compares neither the order in an index nor the rows that it holds."""

        def indexes(database):
            catalogue = (
                "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
                if database.is_sqlite
                else "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
            )
            with database.reading() as connection:
                rows = connection.exec_driver_sql(catalogue).all()
            return {name: sql for name, sql in rows if not name.startswith(schema.VERSION_TABLE)}

        fixtures = {
            "sqlite": ("upgraded_sqlite_path", "sqlite_path"),
            "postgresql": ("upgraded_postgres_url", "fresh_postgres_url"),
        }
        migrated, made = (open_database(request.getfixturevalue(name)) for name in fixtures[kind])
        try:
            with made.transaction() as connection:
                metadata.create_all(connection)
            assert indexes(migrated) == indexes(made)
            assert "idx_task_queue_due" in indexes(made)
        finally:
            migrated.close()
            made.close()

    @pytest.mark.parametrize("table", COLUMNS)
    def test_tables_have_the_columns_of_the_contract(self, database, table):
        with database.reading() as connection:
            columns = {column["name"] for column in inspect(connection).get_columns(table)}

        assert set(COLUMNS[table].split()) <= columns

    @pytest.mark.parametrize("table", INDEXES)
    @pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
    def test_tables_have_the_indexes_of_the_contract(self, database, table):
        with database.reading() as connection:
            catalogue = (
                f"SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = '{table}'"
                if database.is_sqlite
                else f"SELECT indexname FROM pg_indexes WHERE tablename = '{table}'"
            )
            indexes = set(connection.exec_driver_sql(catalogue).scalars())

        assert set(INDEXES[table].split()) <= indexes

    def test_views_have_the_columns_of_the_contract(self, database):
        assert set(VIEWS) == set(views.NAMES)
        with database.reading() as connection:
            found = {name: list(connection.exec_driver_sql(f"SELECT * FROM {name} LIMIT 0").keys()) for name in VIEWS}

        assert found == {name: columns.split() for name, columns in VIEWS.items()}

    def test_head_is_the_last_migration_and_there_is_one_line_of_them(self):
        assert script_directory().get_heads() == [schema.HEAD]

    def test_migrations_are_part_of_the_package(self):
        assert importlib.resources.files("db").joinpath("migrations", "env.py").is_file()

    def test_no_migration_has_a_downgrade(self):
        """An older release reads a newer minor version; the way back over a major one is a backup."""
        assert not [script for script in script_directory().walk_revisions() if hasattr(script.module, "downgrade")]


class TestUpgrade:
    def test_it_can_be_repeated(self, empty_database):
        schema.upgrade(empty_database)
        Store(empty_database).enqueue(new_job("kept"))

        schema.upgrade(empty_database)

        assert schema.current_version(empty_database) == schema.HEAD
        assert Store(empty_database).job("kept") is not None

    def test_eight_processes_at_once_make_one_schema(self, empty_database):
        in_processes(8, lambda _number: schema.upgrade(empty_database))

        assert schema.current_version(empty_database) == schema.HEAD
        assert tables_of(empty_database) == {*metadata.tables, *VIEWS, schema.VERSION_TABLE}

    def test_eight_processes_that_enqueue_at_once_make_their_own_sqlite_file(self, sqlite_path):
        store = Store(open_database(sqlite_path))

        in_processes(8, lambda number: store.enqueue(new_job(f"job-of-{number}")))

        assert len(store.jobs()) == 8
        store.database.close()

    def test_postgresql_without_a_schema_says_what_to_run(self, fresh_postgres_url):
        database = open_database(fresh_postgres_url)

        with pytest.raises(DatabaseNotReady, match="no schema; run: celery -A tasks db upgrade"):
            Store(database).enqueue(new_job())

        assert tables_of(database) == set()
        schema.upgrade(database)
        assert Store(database).enqueue(new_job())
        database.close()

    def test_an_older_postgresql_schema_says_what_to_run(self, fresh_postgres_url):
        database = open_database(fresh_postgres_url)
        schema.upgrade(database)
        set_version(database, "0_9")

        with pytest.raises(DatabaseNotReady, match=r"schema 0_9, older than .*; run: celery -A tasks db upgrade"):
            Store(database).jobs()
        database.close()

    @pytest.mark.parametrize("call", [schema.upgrade, schema.ensure_schema, lambda database: Store(database).jobs()])
    def test_a_newer_major_schema_is_refused(self, empty_database, call):
        schema.upgrade(empty_database)
        set_version(empty_database, "2_0")

        with pytest.raises(DatabaseNotReady, match=r"schema 2_0, newer than this release's 1_\d+; install the newer"):
            call(empty_database)

    def test_a_newer_minor_schema_is_used_and_left_alone(self, empty_database):
        schema.upgrade(empty_database)
        set_version(empty_database, "1_999")

        schema.upgrade(empty_database)
        Store(empty_database).enqueue(new_job("works"))

        assert schema.current_version(empty_database) == "1_999"

    def test_a_version_that_is_none_is_refused(self, empty_database):
        schema.upgrade(empty_database)
        set_version(empty_database, "abc")

        with pytest.raises(DatabaseNotReady, match="'abc', which is no version of media-tasks"):
            Store(empty_database).jobs()

    @pytest.mark.parametrize("is_late", [False, True], ids=["in a table", "in a view"])
    def test_one_that_fails_in_mid_way_leaves_nothing_behind(self, empty_database, monkeypatch, is_late):
        with monkeypatch.context() as broken:
            if is_late:
                broken.setattr(views, "create_statements", lambda _dialect: ["CREATE VIEW v AS SELECT FROM nowhere"])
            else:
                broken.setattr("alembic.op.create_index", fail)
            with pytest.raises(Exception, match=r"nowhere|FROM|broken"):
                schema.upgrade(empty_database)

        assert tables_of(empty_database) == set()
        schema.upgrade(empty_database)
        assert schema.current_version(empty_database) == schema.HEAD


def fail(*_args, **_kwargs):
    raise RuntimeError("broken migration")


class TestSharing:
    """The database may belong to a host application."""

    def test_tables_of_others_survive_untouched(self, empty_database):
        with empty_database.transaction() as connection:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)")
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('host-1')")
            connection.exec_driver_sql("CREATE TABLE media_files (id INTEGER PRIMARY KEY, name TEXT)")
            connection.exec_driver_sql("INSERT INTO media_files VALUES (1, 'a.jpg')")
            connection.exec_driver_sql("CREATE VIEW v_media AS SELECT name FROM media_files")

        schema.upgrade(empty_database)

        with empty_database.reading() as connection:
            assert connection.exec_driver_sql("SELECT * FROM alembic_version").all() == [("host-1",)]
            assert connection.exec_driver_sql("SELECT * FROM v_media").all() == [("a.jpg",)]
            assert connection.exec_driver_sql(f"SELECT * FROM {schema.VERSION_TABLE}").all() == [(schema.HEAD,)]

    def test_a_sqlite_file_keeps_its_user_version(self, sqlite_path):
        with raw_sqlite(sqlite_path) as host:
            host.execute("PRAGMA user_version = 42")
        database = open_database(sqlite_path)

        schema.upgrade(database)

        database.close()
        with raw_sqlite(sqlite_path) as host:
            assert host.execute("PRAGMA user_version").fetchone() == (42,)

    @pytest.mark.parametrize("name", ["task_queue", "v_task_stats"])
    def test_a_foreign_table_of_our_name_is_refused_and_kept(self, empty_database, name):
        with empty_database.transaction() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {name} (id INTEGER PRIMARY KEY)")

        with pytest.raises(DatabaseNotReady, match=f"has {name} of another application; set DATABASE_URL"):
            schema.upgrade(empty_database)

        assert tables_of(empty_database) == {name}

    def test_a_host_that_writes_with_its_own_sqlite_connection_disturbs_nothing(self, sqlite_path):
        store = Store(open_database(sqlite_path))
        store.enqueue(new_job("a"))
        with raw_sqlite(sqlite_path) as host:
            host.execute("CREATE TABLE media_files (id INTEGER PRIMARY KEY, name TEXT)")
            host.execute("INSERT INTO media_files VALUES (1, 'a.jpg')")

        store.enqueue(new_job("b"))

        assert {row["job_id"] for row in store.jobs()} == {"a", "b"}
        store.database.close()
        with raw_sqlite(sqlite_path) as host:
            assert host.execute("SELECT name FROM media_files").fetchall() == [("a.jpg",)]
            assert host.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            with pytest.raises(sqlite3.IntegrityError):
                host.execute("INSERT INTO task_queue (job_id) VALUES ('a')")
