"""The settings of Celery on which the guarantees rest."""

import pytest

from db.models import metadata


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_acks_late", True),
        ("task_reject_on_worker_lost", True),
        ("worker_prefetch_multiplier", 1),
        ("task_serializer", "json"),
        ("result_serializer", "json"),
        ("event_serializer", "json"),
        ("accept_content", ["json"]),
        ("result_accept_content", ["json"]),
        ("worker_max_tasks_per_child", 1000),
        ("worker_max_memory_per_child", 300_000),
        ("worker_cancel_long_running_tasks_on_connection_loss", False),
    ],
)
def test_a_job_is_kept_until_it_has_ended_and_no_pickle_is_read(producer, name, value):
    assert producer.app.conf[name] == value


def test_the_job_table_is_the_only_place_of_results(producer):
    producer.task.add.delay(1, 1)

    with producer.app.store.database.reading() as connection:
        tables = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())

    assert {name for name in tables if not name.startswith("sqlite_")} == {*metadata.tables, "media_tasks_version"}
    assert not [name for name in tables if name.startswith("celery_")]
