"""How a job comes to be queued, on every database."""

from datetime import timedelta, timezone
from uuid import UUID

from db.records import Publication, Sequel, now
from tests.db.conftest import WHEN, claim, events_of, new_job, row_of


class TestEnqueue:
    def test_a_new_job_is_queued_under_its_first_publication(self, store):
        job = new_job(priority=8)
        before = now()

        assert store.enqueue(job) == Publication(1, 8)

        row = row_of(store, job)
        assert (row["status"], row["publication"], row["attempt"], row["deaths"]) == ("queued", 1, 0, 0)
        assert (row["progress"], row["retry_count"], row["claimed_by"]) == (0.0, 0, None)
        assert before <= row["created_at"] == row["updated_at"] == row["published_at"] <= now()
        assert events_of(store, job) == ["created"]

    def test_every_value_of_a_job_is_kept(self, store):
        job = new_job(
            parameters={"width": 800, "names": ["ü", "日本", "\N{SLIGHTLY SMILING FACE}", 'q"\\'], "none": None},
            priority=10,
            max_retries=2,
            retry_count=1,
            run_after_utc=WHEN,
            expires_at=WHEN + timedelta(days=1),
            root_id="root",
            parent_id="parent",
            group_id="group",
            group_index=4,
            in_chord=True,
            sequel=Sequel.PENDING,
            unique_key="resize of in.jpg",
            unique_until=WHEN + timedelta(hours=1),
            message={"args": [1.5, True], "kwargs": {"nested": {"deep": [{}]}}},
        )

        store.enqueue(job)

        row = row_of(store, job)
        columns = set(job.__slots__) - {"delay_s"}  # which is another way to say `run_after_utc`
        assert {name: row[name] for name in columns} == {name: getattr(job, name) for name in columns}

    def test_documents_keep_the_types_that_celery_sends(self, store):
        parameters = {
            "at": WHEN,
            "id": UUID("12345678-1234-5678-1234-567812345678"),
            "big": 2**70,
            "text": "line\n\ttab \u2028 \x00",
        }
        job = new_job(parameters=parameters)

        store.enqueue(job)
        attempt = claim(store, job).attempt
        store.complete(job.job_id, attempt, {"outputs": [parameters]})

        row = row_of(store, job)
        assert row["parameters"] == parameters
        assert row["result_data"] == {"outputs": [parameters]}

    def test_a_known_id_is_left_as_it_is(self, store):
        job = new_job(priority=3)
        store.enqueue(job)

        assert store.enqueue(new_job(job.job_id, priority=9, queue="other")) is None

        row = row_of(store, job)
        assert (row["priority"], row["queue"]) == (3, "image_resize")
        assert events_of(store, job) == ["created"]

    def test_times_come_back_in_utc_whatever_zone_they_went_in_with(self, store):
        job = new_job(run_after_utc=WHEN.astimezone(timezone(timedelta(hours=5, minutes=30))))

        store.enqueue(job)

        row = row_of(store, job)
        assert row["run_after_utc"] == WHEN
        assert row["run_after_utc"].utcoffset() == row["created_at"].utcoffset() == timedelta(0)
        assert store.logs(job.job_id)[0]["created_at"].utcoffset() == timedelta(0)

    def test_after_a_lost_commit_the_same_call_finds_its_own_row(self, store, lose_commit, unavailable):
        job = new_job(priority=7)
        lose_commit()
        with unavailable:
            store.enqueue(job)

        assert store.enqueue(job) == Publication(1, 7)

        assert store.enqueue(job) is None
        assert events_of(store, job) == ["created"]
