"""What `AsyncResult` says of a row, whoever asks."""

import pytest
from celery import chain, group
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, GroupResult, ResultSet
from kombu.exceptions import EncodeError

from db.records import Failure, Fence, Status
from tasks.errors import LimitExceeded
from tasks.rows import describe
from tests.unit.jobs import claim, new_job


@pytest.fixture
def store(producer):
    return producer.app.store


@pytest.fixture
def job(store):
    new = new_job("job-1", parameters={"x": 1})
    store.enqueue(new)
    return new


@pytest.fixture
def result(producer, job):
    return AsyncResult("job-1", app=producer.app)


def end(store, job, status, exc, attempt=None):
    assert store.end(job.job_id, status, describe(exc), fence=Fence(attempt=attempt))


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {1, 2}, 2**63, -(2**70)], ids=repr)
def test_a_result_that_no_database_holds_is_not_written(producer, store, job, value):
    attempt = claim(store, job).attempt

    with pytest.raises(EncodeError, match=r"the result is (no JSON|a number)"):
        producer.app.backend.mark_as_done("job-1", value, Context(id="job-1", task="add", attempt=attempt))

    assert store.job("job-1")["status"] == "running"


def test_an_unknown_job_is_pending(producer):
    result = AsyncResult("nobody", app=producer.app)

    assert (result.state, result.result, result.ready()) == ("PENDING", None, False)


def test_a_queued_job_is_pending(result):
    assert (result.state, result.ready()) == ("PENDING", False)


def test_a_running_job_is_started_and_shows_its_progress(store, job, result):
    attempt = claim(store, job).attempt
    store.progress("job-1", attempt, percent=25, stage="reading")

    assert (result.state, result.info) == ("STARTED", {"progress": 25, "stage": "reading"})


def test_a_job_that_waits_for_its_retry_is_in_retry_with_its_error(store, job, result):
    attempt = claim(store, job).attempt
    failure = Failure(error_type="OSError", error_message="the network is away", error_module="builtins")
    store.requeue("job-1", attempt=attempt, event="retry", retry_count=1, failure=failure)

    assert (result.state, result.ready()) == ("RETRY", False)
    assert repr(result.result) == "OSError('the network is away')"


def test_a_completed_job_gives_its_result_again_and_again(store, job, result):
    store.complete("job-1", claim(store, job).attempt, {"output": "/out.webp"})

    assert result.get(timeout=1) == {"output": "/out.webp"}
    assert (result.state, result.successful()) == ("SUCCESS", True)
    assert AsyncResult("job-1", app=result.app).get(timeout=1) == {"output": "/out.webp"}
    assert result.date_done is not None


@pytest.mark.parametrize("error", [LimitExceeded("in.tif is too large"), ValueError("no"), KeyError("key")], ids=repr)
def test_get_of_a_failed_job_raises_an_error_of_the_original_class(store, job, result, error):
    end(store, job, Status.FAILED, error, claim(store, job).attempt)

    with pytest.raises(type(error)) as caught:
        result.get(timeout=1)
    assert type(caught.value) is type(error)
    assert result.state == "FAILURE"


class TwoArguments(Exception):
    """An error that can't be made from one message."""

    def __init__(self, file, reason):
        super().__init__(file, reason)


def test_get_raises_something_of_the_message_where_the_class_cannot_be_made(store, job, result):
    end(store, job, Status.FAILED, TwoArguments("in.tif", "too large"))

    with pytest.raises(RuntimeError, match=r"TwoArguments.*in\.tif"):
        result.get(timeout=1)


def test_a_class_in_a_row_is_never_imported_or_called_unless_it_is_an_error(store, job, result):
    store.end(job.job_id, Status.FAILED, Failure(error_type="system", error_message="exit 1", error_module="os"))

    with pytest.raises(RuntimeError, match="system: exit 1"):
        result.get(timeout=1)


def test_get_of_a_cancelled_job_raises_that_it_was_revoked(store, job, result):
    end(store, job, Status.CANCELLED, TaskRevokedError("expired"))

    with pytest.raises(TaskRevokedError, match=r"expired"):
        result.get(timeout=1)
    assert result.state == "REVOKED"


def test_get_gives_up_in_time_and_says_how_far_the_job_is(store, job, result):
    said = "job-1: add is {} after 0.1 s; celery -A tasks jobs explain job-1 says why"

    with pytest.raises(ResultTimeout, match=said.format("queued")):
        result.get(timeout=0.1)
    claim(store, job)
    with pytest.raises(ResultTimeout, match=said.format("running")):
        result.get(timeout=0.1)


def test_get_of_an_unknown_job_gives_up_in_time_and_says_that_it_is_unknown(producer):
    with pytest.raises(ResultTimeout, match=r"^nobody: no job has this id here$"):
        AsyncResult("nobody", app=producer.app).get(timeout=0.1)


def test_a_step_that_is_not_sent_yet_is_not_unknown(producer, caplog, monkeypatch):
    monkeypatch.setattr("tasks.results.UNKNOWN_AFTER_S", 0.0)
    add = producer.app.tasks["add"]
    last = chain(add.s(1, 1), add.s(2)).apply_async()

    with pytest.raises(ResultTimeout, match=rf"^{last.id}: the job before it has not ended$"):
        last.get(timeout=0.1)
    assert "no job has the id" not in caplog.text


def test_who_waits_for_an_id_without_a_row_is_warned_once_and_gets_its_result_all_the_same(
    producer, store, caplog, monkeypatch
):
    monkeypatch.setattr("tasks.results.UNKNOWN_AFTER_S", 0.0)

    def complete_late():  # called once, after the first look
        store.enqueue(new := new_job("late"))
        store.complete("late", claim(store, new).attempt, 42)

    assert AsyncResult("late", app=producer.app).get(timeout=10, on_interval=complete_late) == 42

    assert [record.getMessage() for record in caplog.records if record.name == "tasks.results"] == [
        "no job has the id late here yet; still waiting"
    ]


def test_get_many_gives_up_in_time_and_says_how_far_one_of_the_jobs_is(producer, result):
    def join(*results):
        ResultSet(list(results), app=producer.app).join_native(timeout=0.1)

    with pytest.raises(ResultTimeout, match=r"^2 jobs have not ended in time; one of them: job-1: add is queued after"):
        join(result, AsyncResult("other", app=producer.app))
    with pytest.raises(ResultTimeout, match=r"^job-1: add is queued after 0.1 s; "):
        join(result)


def test_forget_keeps_the_row(store, job, result):
    store.complete("job-1", claim(store, job).attempt, 42)

    result.forget()

    assert store.job("job-1")["result_data"] == 42
    assert AsyncResult("job-1", app=result.app).state == "SUCCESS"


def test_a_saved_group_can_be_restored_and_deleted(producer):
    GroupResult("group-1", [AsyncResult("a", app=producer.app)], app=producer.app).save()

    restored = GroupResult.restore("group-1", app=producer.app)

    assert [member.id for member in restored] == ["a"]
    restored.delete()
    assert GroupResult.restore("group-1", app=producer.app) is None


def test_an_error_is_described_without_a_traceback_if_it_is_no_bug():
    assert describe(LimitExceeded("too large")).details is None
    assert "traceback" in describe(ValueError("a bug")).details


def test_an_error_that_cannot_be_printed_is_described():
    class Mute(ValueError):
        def __str__(self):
            raise RuntimeError("no text")

    described = describe(Mute())

    assert (described.error_type, described.error_message) == ("Mute", "it can't be printed: RuntimeError")


def test_a_long_message_is_cut():
    assert len(describe(ValueError("x" * 100_000)).error_message) <= 4000


def test_a_chord_whose_body_was_not_published_by_a_dying_process_publishes_it_when_a_member_comes_again(producer):
    app = producer.app
    add, total = app.tasks["add"], app.tasks["total"]
    members = group(add.s(1, 1), add.s(2, 2))
    body = total.s()
    body.freeze("body-1")
    for index, value in enumerate((2, 4)):
        new = new_job(f"m{index}", group_id="g1", group_index=index, in_chord=True)
        app.store.enqueue(new)
        app.store.complete(f"m{index}", claim(app.store, new).attempt, value)
    app.store.set_chord_size("g1", len(members.tasks))
    assert app.store.chord_parts("g1", None).is_mine  # ... and this process dies

    member = Context(id="m1", task="add", group="g1", chord=dict(body))
    for _ in range(3):
        app.backend.on_chord_part_return(member, "SUCCESS", None, is_again=True)

    row = app.store.job("body-1")
    assert (row["status"], row["parameters"], row["publication"]) == (Status.QUEUED, {"numbers": [2, 4]}, 1)
    assert [log["event_type"] for log in app.store.logs("body-1")] == ["created"]
