"""Messages that the broker lost, or holds for nobody."""

import json
import sqlite3
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace

import pytest
from celery import chain
from click.testing import CliRunner
from kombu.exceptions import OperationalError

from db import schema
from db.records import Status, now
from tasks.broker.ledger import ledger_of
from tasks.broker.messages import MessageStore
from tasks.cli import strays
from tasks.cli.reconcile import reconcile
from tasks.errors import CorruptMedia
from tasks.reconciler import Finding, Reconciler
from tasks.rows import describe
from tests.acceptance.deployment import deployed
from tests.unit.jobs import beat_of, change, claimed_by, mend, messages, publications


def settled(app, *jobs):
    """Have jobs been published some time ago."""
    for job in jobs:
        change(app, job, published_at=now() - timedelta(seconds=10))


# Lost messages, embedded broker


def test_exactly_the_jobs_without_a_message_are_published_again(producer, app, reconciler, dispatcher, add):
    lost = add.delay(1, 1)
    messages(producer, "add")
    kept = add.delay(2, 2)
    settled(app, lost, kept)

    assert mend(reconciler.lost_messages()) == [lost.id]

    assert dispatcher.publish_due(10) == 1
    assert sorted(publications(producer, "add")) == sorted([(kept.id, 1), (lost.id, 2)])
    assert producer.events(lost) == ["created", "republished"]


def test_a_lost_message_is_found_although_newer_ones_stand_in_its_queue(producer, app, reconciler, add):
    lost = add.delay(1, 1)
    settled(app, lost)
    messages(producer, "add")
    add.delay(2, 2)

    assert [finding.subject for finding in reconciler.lost_messages()] == [lost.id]


def test_a_message_that_was_sent_just_now_is_not_lost(producer, reconciler, add):
    add.delay(1, 1)
    messages(producer, "add")

    assert list(reconciler.lost_messages()) == []


def test_a_message_that_a_worker_has_reserved_is_not_lost(producer, app, reconciler, add):
    settled(app, add.delay(1, 1))

    with app.connection_for_write() as connection, connection.channel() as channel:
        assert channel.basic_get("add", no_ack=False) is not None
        assert list(reconciler.lost_messages()) == []


def test_a_broker_file_that_was_deleted_is_made_anew_and_filled_from_the_rows(
    producer, app, reconciler, dispatcher, add
):
    jobs = [add.delay(n, n) for n in range(3)]
    settled(app, *jobs)
    assert list(reconciler.lost_messages()) == []
    app.pool.force_close_all()
    for path in producer.server_dir.glob("broker.db*"):
        path.unlink()

    assert mend(reconciler.lost_messages()) == [job.id for job in jobs]

    assert dispatcher.publish_due(10) == 3
    assert publications(producer, "add") == [(job.id, 2) for job in jobs]


def test_a_broker_file_that_was_replaced_while_it_was_read_is_read_anew(producer, app, reconciler, add, tmp_path):
    job = add.delay(1, 1)
    settled(app, job)
    assert list(reconciler.lost_messages()) == []
    app.pool.force_close_all()
    another = MessageStore(tmp_path / "another.db")
    another.open()
    another.close()
    for path in producer.server_dir.glob("broker.db-*"):
        path.unlink()
    (tmp_path / "another.db").rename(producer.server_dir / "broker.db")

    assert [finding.subject for finding in reconciler.lost_messages()] == [job.id]


def test_a_job_that_was_claimed_meanwhile_is_not_published_again(producer, app, reconciler, add):
    job = add.delay(1, 1)
    settled(app, job)
    messages(producer, "add")
    findings = list(reconciler.lost_messages())
    claimed_by(app, job)

    mend(findings)

    assert (producer.row(job)["status"], producer.row(job)["publication"]) == ("running", 1)


# Stray messages, embedded broker


@pytest.fixture
def between_two_looks(monkeypatch):
    """What happens between the two looks: a list of calls."""
    calls = []
    monkeypatch.setattr("tasks.cli.strays.time", SimpleNamespace(sleep=lambda _s: [call() for call in calls]))
    return calls


def test_all_messages_that_no_row_waits_for_are_found_also_those_that_a_worker_has(
    producer, app, add, between_two_looks, monkeypatch
):
    monkeypatch.setattr("tasks.broker.ledger.IN_ONE_LOOK", 2)
    jobs = [add.delay(n, n) for n in range(5)]
    for job in jobs[:4]:
        change(app, job, status="cancelled")

    with app.connection_for_write() as connection, connection.channel() as channel:
        assert channel.basic_get("add", no_ack=False) is not None
        found = list(strays.stray_messages(app))

    assert [job_id for job_id, _ in found] == [job.id for job in jobs[:4]]
    assert publications(producer, "add")[-1] == (jobs[4].id, 1)


def test_a_message_that_is_acknowledged_a_moment_after_its_jobs_end_is_no_stray(producer, app, add, between_two_looks):
    change(app, add.delay(1, 1), status="completed")
    between_two_looks.append(lambda: messages(producer, "add"))

    assert list(strays.stray_messages(app)) == []


def test_messages_of_celerys_own_tasks_have_no_rows_and_are_no_strays(app, between_two_looks):
    app.tasks["celery.backend_cleanup"].apply_async(queue="add")

    assert list(strays.stray_messages(app)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("task", ["a"]), ("task", None), ("id", None), ("publication", "x"), ("publication", float("nan"))],
    ids=range(5),
)
def test_a_message_that_a_worker_refuses_is_a_stray_with_the_reason(app, add, between_two_looks, name, value):
    job = add.delay(1, 1)
    rewrite(app, job, lambda headers: headers | {name: value})

    ((job_id, why),) = strays.stray_messages(app)

    assert job_id == job.id
    assert why.startswith(f"add holds a message of it, and its field '{name}' is ")
    assert why.endswith("; the worker that takes the message refuses it")


@pytest.mark.parametrize("headers", [None, [], ["task"], {}], ids=["none", "empty", "list", "no-task"])
def test_a_message_that_names_no_task_in_its_headers_is_no_stray(app, add, between_two_looks, headers):
    rewrite(app, add.delay(1, 1), lambda _: headers)

    assert list(strays.stray_messages(app)) == []


def rewrite(app, job, changed):
    """Change the headers of a message where it stands."""
    with closing(sqlite3.connect(app.settings.server_dir / "broker.db")) as connection, connection:
        (text,) = connection.execute("SELECT envelope FROM messages WHERE correlation_id = ?", (job.id,)).fetchone()
        envelope = json.loads(text)
        envelope["headers"] = changed(envelope["headers"])
        connection.execute("UPDATE messages SET envelope = ? WHERE correlation_id = ?", (json.dumps(envelope), job.id))


def test_a_job_that_could_not_be_mended_hides_no_stray_message_and_one_that_was_does(
    producer, app, add, between_two_looks, monkeypatch
):
    job = chain(add.s(1, 1), add.s(2))().parent
    app.store.end(job.id, Status.FAILED, describe(CorruptMedia("the file is broken")))
    change(app, job, completed_at=now() - timedelta(seconds=10))
    stray = f"stray messages: {job.id}: add holds a message of it, and it is failed; "

    with monkeypatch.context() as patch:
        patch.setattr(app.backend, "tell", lambda _row: 1 / 0)
        not_mended, noted, summary = reconciled(app)
    assert not_mended.startswith(f"not mended: untold ends: {job.id}: ")
    assert noted.startswith(stray)
    assert summary == "1 not mended, 1 need no mending"

    mended, summary = reconciled(app)
    assert mended.startswith(f"untold ends: {job.id}: ")
    assert summary == "1 mended"


def reconciled(app):
    """What `celery -A tasks reconcile` prints."""
    return CliRunner().invoke(reconcile, obj=SimpleNamespace(app=app, no_color=False)).stdout.splitlines()


def test_a_disagreement_that_has_gone_before_it_is_mended_is_not_mentioned(app, monkeypatch):
    gone = Finding("lost messages", "a job", "it is published again", lambda: False)
    monkeypatch.setattr(Reconciler, "findings", lambda _self: iter([gone]))

    assert reconciled(app) == ["nothing to mend"]


def test_what_could_not_be_mended_ends_the_command_with_code_1(app, monkeypatch):
    def fail():
        raise OperationalError("the broker is away")

    monkeypatch.setattr(Reconciler, "findings", lambda _self: iter([Finding("lost messages", "a job", "again", fail)]))

    done = CliRunner().invoke(reconcile, obj=SimpleNamespace(app=app, no_color=False))

    assert (done.exit_code, done.stdout.splitlines()[-1]) == (1, "1 not mended")
    assert done.stderr == "Error: a job: OperationalError: the broker is away\n"


@pytest.mark.parametrize("is_reserved", [True, False])
def test_a_message_that_a_worker_has_reserved_is_not_missed(app, add, monkeypatch, is_reserved):
    job = add.delay(1, 1)
    settled(app, job)
    app.store.heartbeat(beat_of("w1", reserved_tasks=[job.id] if is_reserved else []))
    monkeypatch.setattr("tasks.broker.ledger.ledger_of", lambda _app: Counting(0))
    monkeypatch.setattr("tasks.lost_messages.ledger_of", lambda _app: Counting(0))

    said = reconciled(app)

    missed = "not certain: lost messages: add: 1 job published, 0 messages left, 0 reserved; "
    assert said == ["nothing to mend"] if is_reserved else said[0].startswith(missed)


def test_a_broker_file_that_can_not_be_read_is_named_and_one_that_is_missing_holds_nothing(producer, app):
    assert list(strays.stray_messages(app)) == []
    (producer.server_dir / "broker.db").write_text("this is no database" * 100)

    with pytest.raises(OperationalError, match=r"broker\.db: it is no SQLite database"):
        list(strays.stray_messages(app))


@pytest.mark.parametrize(("broker", "is_named"), [("", True), ("memory://", False)])
def test_only_the_embedded_broker_names_its_messages(server_dir, tmp_path, broker, is_named):
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": broker} if broker else {}) as deployment:
        assert ledger_of(deployment.app).names_messages is is_named
        assert list(strays.stray_messages(deployment.app)) == []


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_messages_of_all_queues_are_counted_on_one_connection_also_behind_a_queue_that_is_missing(
    request, server_dir, tmp_path, monkeypatch, broker
):
    url = request.getfixturevalue(f"fresh_{broker}_url")
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": url}) as deployment:
        connections, connect = [], deployment.app.connection_for_read
        for n in range(2):
            deployment.task.add.delay(n, n)
        deployment.task.fail.delay()
        ledger = ledger_of(deployment.app)
        monkeypatch.setattr(ledger, "_connect", lambda: connections.append(connect()) or connections[-1])

        assert ledger.ready(["nowhere", "add", "elsewhere", "fail"]) == {
            "nowhere": 0,
            "add": 2,
            "elsewhere": 0,
            "fail": 1,
        }
        assert len(connections) == 1


@pytest.mark.parametrize("submitted_meanwhile", [0, 1, 2])
def test_a_queue_with_more_messages_than_jobs_is_said_of_rows_that_were_read_before_and_after(
    app, add, monkeypatch, submitted_meanwhile
):
    add.delay(1, 1)
    reads, published = [], app.store.published

    class Ledger(Counting):
        def ready(self, queues):
            for n in range(submitted_meanwhile):
                add.delay(n, n)
            return dict.fromkeys(queues, 0) | {"add": 2}

    monkeypatch.setattr("tasks.broker.ledger.ledger_of", lambda _app: Ledger(0))
    monkeypatch.setattr(app.store, "published", lambda before: reads.append(1) or published(before))

    found = list(strays.surplus_messages(app))

    assert [queue for queue, _ in found] == ([] if submitted_meanwhile else ["add"])
    assert all(text.startswith("2 messages ready, 1 job published; ") for _, text in found)
    assert len(reads) == 2  # however many queues there are


# Overdue jobs


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_only_jobs_that_rest_beyond_their_time_in_a_queue_that_is_not_paused_are_overdue(
    request, server_dir, tmp_path, database
):
    env = {"DATABASE_URL": request.getfixturevalue("fresh_postgres_url")} if database == "postgresql" else {}
    with deployed(server_dir, tmp_path, env) as deployment:
        app = deployment.app
        schema.upgrade(app.store.database)
        late, soon = (deployment.task.add.apply_async((n, n), countdown=60) for n in range(2))
        paused = deployment.task.quiet.apply_async((1,), countdown=60)
        for job, due_s in ((late, -61), (soon, -50), (paused, -61)):
            change(app, job, run_after_utc=now() + timedelta(seconds=due_s))
        change(app, deployment.task.add.delay(1, 1), run_after_utc=now() - timedelta(hours=1))
        app.store.pause("quiet")

        ((job_id, text),) = strays.overdue_jobs(app)

        assert job_id == late.id
        assert text.endswith("nobody has published it: no worker lives")


# Lost messages, other brokers


class Counting:
    """A broker that only counts."""

    names_messages = False

    def __init__(self, ready):
        self.count = ready

    def ready(self, queues):
        return dict.fromkeys(queues, self.count)


@pytest.fixture
def counting(reconciler):
    counting = Counting(0)
    reconciler._lost_messages._ledger = counting
    return counting


def found(reconciler):
    return {finding.subject for finding in reconciler.lost_messages()}


def test_too_few_messages_are_believed_the_second_time_ten_seconds_later(app, reconciler, counting, clock, add):
    jobs = [add.delay(n, n) for n in range(3)]
    settled(app, *jobs)

    assert found(reconciler) == set()
    clock.pass_s(5)
    assert found(reconciler) == set()
    clock.pass_s(5)
    assert found(reconciler) == {job.id for job in jobs}


def test_enough_messages_in_between_make_it_begin_again(app, reconciler, counting, clock, add):
    settled(app, add.delay(1, 1))

    for ready in (0, 1, 0):
        counting.count = ready
        assert found(reconciler) == set()
        clock.pass_s(10)
    assert len(found(reconciler)) == 1


def test_only_jobs_that_waited_both_times_are_published_again(app, reconciler, counting, clock, add):
    first = add.delay(1, 1)
    settled(app, first)
    found(reconciler)
    clock.pass_s(10)
    settled(app, add.delay(2, 2))

    assert found(reconciler) == {first.id}


def test_what_a_worker_has_reserved_is_not_lost(app, reconciler, counting, clock, add):
    lost, reserved = add.delay(1, 1), add.delay(2, 2)
    settled(app, lost, reserved)
    app.store.heartbeat(beat_of("w1", reserved_tasks=[reserved.id]))

    found(reconciler)
    clock.pass_s(10)

    assert found(reconciler) == {lost.id}


@pytest.mark.parametrize(("slots", "is_lost"), [(2, False), (1, True)])
def test_as_many_as_the_workers_have_slots_may_have_been_reserved_since(
    app, reconciler, counting, clock, add, slots, is_lost
):
    settled(app, *[add.delay(n, n) for n in range(3)])
    app.store.heartbeat(beat_of("w1", concurrency=slots))
    app.store.heartbeat(beat_of("w2", concurrency=50, capabilities=["fail"]))
    counting.count = 1

    found(reconciler)
    clock.pass_s(10)

    assert (len(found(reconciler)) == 3) is is_lost


@pytest.fixture
def busy(counting):
    """A queue that never runs empty: a lost message does not show in its count."""
    counting.count = 100


def found_twice(reconciler, clock):
    assert found(reconciler) == set()
    clock.pass_s(10)
    return found(reconciler)


@pytest.mark.usefixtures("busy")
def test_a_job_that_another_has_overtaken_has_lost_its_message(app, reconciler, clock, add):
    lost, newer, newest = (add.delay(n, n) for n in range(3))
    settled(app, lost, newest)
    claimed_by(app, newer)

    assert found_twice(reconciler, clock) == {lost.id}


@pytest.mark.usefixtures("busy")
def test_nobody_has_lost_a_message_while_only_older_jobs_run(app, reconciler, clock, add):
    older, waiting = (add.delay(n, n) for n in range(2))
    settled(app, waiting)
    claimed_by(app, older)

    assert found_twice(reconciler, clock) == set()


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(("priority", "is_lost"), [(1, True), (9, False)])
def test_who_has_a_higher_priority_may_overtake(app, reconciler, clock, add, priority, is_lost):
    waiting, newer = add.apply_async((1, 1), priority=5), add.apply_async((2, 2), priority=priority)
    settled(app, waiting)
    claimed_by(app, newer)

    assert (found_twice(reconciler, clock) == {waiting.id}) is is_lost


@pytest.mark.usefixtures("busy")
def test_who_runs_in_another_queue_overtakes_nobody(app, reconciler, clock, add):
    waiting, newer = add.delay(1, 1), add.apply_async((2, 2), queue="fail")
    settled(app, waiting)
    claimed_by(app, newer)

    assert found_twice(reconciler, clock) == set()


@pytest.mark.usefixtures("busy")
def test_who_was_reserved_in_time_is_not_overtaken(app, reconciler, clock, add):
    reserved, newer = add.delay(1, 1), add.delay(2, 2)
    settled(app, reserved)
    claimed_by(app, newer)
    app.store.heartbeat(beat_of("w1", reserved_tasks=[reserved.id]))

    assert found_twice(reconciler, clock) == set()


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("changed", [{"publication": 2}, {"run_after_utc": now()}], ids=["retried", "rested"])
def test_a_message_that_was_sent_late_is_overtaken_by_jobs_that_came_after_it(app, reconciler, clock, add, changed):
    late, newer = add.delay(1, 1), add.delay(2, 2)
    change(app, late, **changed)
    settled(app, late)
    claimed_by(app, newer)
    assert found_twice(reconciler, clock) == set()

    claimed_by(app, add.delay(3, 3))
    assert found_twice(reconciler, clock) == {late.id}


def test_more_lost_messages_than_one_look_takes_are_found_one_after_the_other(
    app, reconciler, counting, clock, dispatcher, add, monkeypatch
):
    monkeypatch.setattr("tasks.lost_messages.IN_ONE_LOOK", 2)
    jobs = [add.delay(n, n) for n in range(7)]
    for job in jobs:
        change(app, job, published_at=now() - timedelta(seconds=60))

    for _ in range(30):
        sent = mend(reconciler.lost_messages())
        dispatcher.publish_due(100)
        counting.count += len(sent)
        settled(app, *(job for job in jobs if job.id in sent))
        clock.pass_s(5)

    publications = sorted(app.store.job(job.id)["publication"] for job in jobs)
    assert publications in ([2] * 7, [2] * 6 + [3]), "the last look takes one more"
