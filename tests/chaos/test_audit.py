"""The audit finds what a storm must not leave, that alone, and nothing where no harm was done."""

import shutil
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import pyvips
from sqlalchemy import delete, insert, select, update

from db.models import task_logs, task_queue
from tests.acceptance.deployment import deployed
from tests.chaos import chronicle, servers
from tests.chaos.audit import Audit
from tests.chaos.chronicle import MOVES
from tests.chaos.crew import Blow
from tests.chaos.material import Material
from tests.chaos.workload import QUEUES, Job, Order
from tests.conftest import required

# What subscribers are told

BEGIN = datetime(2026, 11, 22, tzinfo=UTC)
LOG = ["created", "claimed", "started", "completed"]
HEARD = [(1, "queued"), (2, "processing"), (3, "processing"), (4, "completed")]


def audit_of(**logs):
    rows = [
        {"job_id": job_id, "sequence": number, "event_type": event, "created_at": BEGIN}
        for job_id, events in logs.items()
        for number, event in enumerate(events, 1)
    ]
    store = SimpleNamespace(_rows=lambda _statement: rows)
    return Audit(SimpleNamespace(store=store), material=None, blows=[])


def subscriber_of(*absences, **changes):
    return SimpleNamespace(changes=changes, absences=absences)


def test_a_subscriber_that_heard_the_whole_log_is_no_finding():
    audit = audit_of(a=LOG, b=["created"])

    audit.told(subscriber_of(a=HEARD, b=[(1, "queued")]))

    assert audit.findings == []


@pytest.mark.parametrize(
    ("heard", "text"),
    [
        ({}, "did not hear [(1, 'queued'), "),
        ({"a": HEARD[:1] + HEARD[2:]}, "did not hear [(2, 'processing')], and heard []"),
        ({"a": [*HEARD, (5, "lost")]}, "did not hear [], and heard [(5, 'lost')]"),
        ({"a": [*HEARD[:3], (4, "error")]}, "did not hear [(4, 'completed')], and heard [(4, 'error')]"),
        ({"a": HEARD, "b": [(1, "queued")]}, "did not hear [], and heard [(1, 'queued')]"),
    ],
    ids=["nothing", "gap", "untrue", "another end", "no such job"],
)
def test_what_was_not_heard_or_is_not_true_is_a_finding(heard, text):
    audit = audit_of(a=LOG)

    audit.told(subscriber_of(**heard))

    (finding,) = audit.findings
    assert (finding.verdict, finding.job_id) == ("wrong", "b" if "b" in heard else "a")
    assert text in finding.text


@pytest.mark.parametrize(("away_after_s", "is_excused"), [(-10, True), (15, True), (-60, False), (60, False)])
def test_what_a_subscriber_missed_while_it_was_away_is_excused_and_counted(away_after_s, is_excused):
    audit = audit_of(a=LOG)
    away = BEGIN + timedelta(seconds=away_after_s)
    subscriber = subscriber_of((away, away + timedelta(seconds=15)), a=[HEARD[0], HEARD[3]])

    audit.told(subscriber)

    assert audit.is_told(subscriber) == is_excused
    assert audit.missed == (2 if is_excused else 0)
    assert bool(audit.findings) != is_excused


@pytest.mark.parametrize(("away_s", "claimed_after_s", "is_fault"), [(30, 5, False), (30, 40, True), (10, 40, False)])
def test_no_claim_in_a_long_outage_of_mqtt_is_a_finding(away_s, claimed_after_s, is_fault):
    audit = audit_of()
    audit.blows = [
        Blow("mqtt frozen", BEGIN, until=BEGIN + timedelta(seconds=away_s)),
        Blow("database frozen", BEGIN, until=BEGIN + timedelta(seconds=100)),  # in which nobody can claim
    ]
    audit.claims = [BEGIN + timedelta(seconds=claimed_after_s)]

    said = audit.outages_of_mqtt()

    assert bool(audit.findings) == is_fault
    assert f"within the {away_s} s" in said


@pytest.mark.parametrize(("dealt", "is_fault"), [(3, False), (2, True), (4, False)])
def test_a_storm_that_killed_less_than_planned_is_a_finding(dealt, is_fault):
    audit = audit_of()
    kinds = ["child killed", "worker killed", "main killed", "child killed"][:dealt]
    audit.blows = [Blow(kind, BEGIN) for kind in (*kinds, "child stopped", "disk full")]

    audit.kills(3)

    assert findings(audit) == ([("wrong", "3 kill -9 were planned, 2 were dealt")] if is_fault else [])


# The story that a log must be


def told_of(events, *attempts, **row):
    """A chronicle of these events, whose claims have these attempts, beside a row that says `row`."""
    numbers = iter(attempts)
    logs = [
        {"sequence": number, "event_type": event, "worker_id": "w1", "created_at": BEGIN}
        | {"details": {"attempt": next(numbers)} if event == "claimed" else None}
        for number, event in enumerate(events.split(), 1)
    ]
    own = {"sequence": len(logs), "status": MOVES[logs[-1]["event_type"]][1], "attempt": attempts[-1]}
    return chronicle.read({**own, "deaths": 0, "retry_count": 0, **row}, logs)


def test_deaths_and_retries_count_since_the_last_replay():
    events = "created claimed started lost republished claimed started retry claimed started failed"

    told = told_of(f"{events} replayed claimed started completed", 1, 3, 4, 5)

    assert told.faults == []
    assert [attempt.end for attempt in told.attempts] == ["lost", "retry", "failed", "completed"]


@pytest.mark.parametrize(
    ("events", "attempts", "fault"),
    [
        ("created claimed started lost claimed started completed", (3, 1), "attempt 1 follows attempt 3"),
        ("created claimed started completed failed", (1,), "event 5, failed, comes while it is completed"),
        ("created claimed started failed cancelled", (1,), "event 5, cancelled, comes while it is failed"),
        ("created claimed started completed replayed", (1,), "event 5, replayed, comes while it is completed"),
        ("created claimed completed", (1,), "event 3, completed, comes while it is claimed"),
    ],
)
def test_what_no_job_can_have_done_is_a_fault(events, attempts, fault):
    assert fault in told_of(events, *attempts).faults


# What became of jobs


class Storm:
    """Jobs of every kind, as a real worker that is gone since has ended them. What a test does to them is undone."""

    def __init__(self, own, directory):
        self.app = own.app
        self.roots = [directory / "out", directory / "notes"]
        for folder in (*self.roots, directory / "in" / "broken", directory / "direct"):
            folder.mkdir(parents=True)
        self._material = Material(directory)
        (pyvips.Image.perlin(300, 200) * 100 + 128).cast("uchar").jpegsave(str(directory / "in" / "photo.jpg"))
        out, notes = self.roots
        missing = {"input": str(self._material.broken("missing.jpg")), "output": str(out / "b.webp"), "width": 64}
        self.jobs = {
            "image": self._image("image", out / "i.webp"),
            "later": self._image("image", out / "l.png", countdown=1.0),
            "broken": Job("broken", "image_resize", missing, error="InputMissing", output=out / "b.webp"),
            "retry": self._noting("retry", "recover", notes / "r"),
            "killer": self._noting("killer", "kill_its_worker", notes / "k", error="WorkerLost"),
            "member": self._image("member", out / "m.jpg"),
            "second member": self._image("member", out / "n.jpg"),
            "body": self._noting("body", "note_parts", notes / "c"),
        }
        chord = [self.jobs[name] for name in ("member", "second member", "body")]
        chord[-1].members = tuple(job.job_id for job in chord[:-1])
        self._orders = [Order(0.0, chord), *(Order(0.0, [job]) for job in self.jobs.values() if job not in chord)]

    def _image(self, kind, output, **options):
        recipe = self._material.resize(self._material.photos[0], 64, output.suffix)
        return Job(kind, recipe.task, recipe.call(output), options, recipe=recipe, output=output)

    def _noting(self, kind, task, notes, error=None):
        return Job(kind, task, {"file": str(notes)}, error=error, notes=notes)

    def run(self, own):
        worker = own.start_worker("--concurrency=2", env={"MAX_DEATHS": 1})
        for order in self._orders:
            order.submit(self.app)
        for job in self.jobs.values():
            own.wait_for(job.job_id, "failed" if job.error else "completed", timeout_s=40)
        own.stop(worker)
        with self.app.store.database.reading() as connection:
            tables = (task_queue, task_logs)
            self._rows = {
                table: [dict(row) for row in connection.execute(select(table)).mappings()] for table in tables
            }
        self._files = {path: path.read_bytes() for path in self._found()}

    def undo(self):
        self.execute(delete(task_logs))
        self.execute(delete(task_queue))
        for table, rows in self._rows.items():
            self.execute(insert(table), rows)
        for path in self._found():
            path.unlink()
        for path, content in self._files.items():
            path.write_bytes(content)

    def _found(self):
        return [path for root in self.roots for path in root.rglob("*") if path.is_file()]

    def execute(self, *statement):
        with self.app.store.database.transaction() as connection:
            connection.execute(*statement)

    def id(self, name):
        return self.jobs[name].job_id

    def row(self, name):
        return self.app.store.job(self.id(name))

    def change(self, name, **values):
        self.execute(update(task_queue).where(task_queue.c.job_id == self.id(name)).values(**values))

    def at(self, name, seconds):
        """When the log row with this number was written, if `retell` wrote it."""
        return self.row(name)["created_at"] + timedelta(seconds=seconds)

    def retell(self, name, events, **values):
        """Give a job another log, a second between any two changes, and its row what that comes to."""
        counts, claims, logs = Counter(events.split()), 0, []
        for number, event in enumerate(events.split(), 1):
            claims += event in ("claimed", "lost", "released")
            logs.append(
                {"job_id": self.id(name), "sequence": number, "event_type": event, "created_at": self.at(name, number)}
                | {"worker_id": "w1", "details": {"attempt": claims} if event == "claimed" else None}
            )
        self.execute(delete(task_logs).where(task_logs.c.job_id == self.id(name)))
        self.execute(insert(task_logs), logs)
        row = {"status": MOVES[event][1], "sequence": len(logs), "attempt": claims}
        self.change(name, **{**row, "deaths": counts["lost"], "retry_count": counts["retry"], **values})

    def audited(self, *blows, remains=None):
        audit = Audit(self.app, self._material, blows)
        audit.jobs(list(self.jobs.values()))
        audit.files(self.roots, list(self.jobs.values()))
        audit.messages(remains or {})
        return audit


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    server_dir = Path(tempfile.mkdtemp(prefix="mt-")).resolve()  # a short path: unix sockets are made in it
    with deployed(server_dir, tmp_path_factory.mktemp("logs")) as own:
        storm = Storm(own, tmp_path_factory.mktemp("storm"))
        storm.run(own)
        yield storm
    shutil.rmtree(server_dir, ignore_errors=True)


@pytest.fixture
def storm(past):
    yield past
    past.undo()


def findings(audit):
    return [(finding.verdict, finding.text) for finding in audit.findings]


def assert_found(audit, *expected, name, storm):
    """Exactly these verdicts, with these words, on that job."""
    assert [verdict for verdict, _ in findings(audit)] == [verdict for verdict, _ in expected], findings(audit)
    assert [text for (_, text), (_, words) in zip(findings(audit), expected, strict=True) if words not in text] == []
    assert {finding.job_id for finding in audit.findings} == {storm.id(name)}


def test_a_storm_that_did_no_harm_has_no_finding(storm):
    audit = storm.audited()

    assert findings(audit) == []
    assert (audit.excused, audit.recoveries) == ([], [])
    assert (audit.events["completed"], audit.events["failed"], audit.events["lost"]) == (6, 2, 1)


ONCE = "created claimed started completed"
RETRIED = "created claimed started retry claimed started completed"
WITHOUT_END = ("wrong", "its log has 0 terminal events")


@pytest.mark.parametrize(
    ("name", "events", "values", "expected"),
    [
        ("image", "created claimed started failed", {"error_type": "OSError"}, [("lost", "it failed: OSError: None")]),
        ("image", "created claimed started cancelled", {}, [("lost", "it cancelled: None")]),
        ("image", "created", {}, [WITHOUT_END, ("stuck", "it is queued")]),
        ("image", "created claimed started", {}, [WITHOUT_END, ("stuck", "it is running")]),
        (
            "image",
            f"{ONCE} completed",
            {},
            [
                ("wrong", "event 5, completed, comes while it is completed"),
                ("wrong", "its log has 2 terminal events"),
                ("duplicated", "it completed 2 times"),
            ],
        ),
        ("image", "claimed started completed", {}, [("wrong", "event 1, claimed, comes while it is nowhere")]),
        ("image", ONCE, {"sequence": 5}, [("wrong", "its row has sequence 5, its log 4 rows")]),
        ("image", ONCE, {"deaths": 1}, [("wrong", "its row has deaths 1, its log makes that 0")]),
        ("image", ONCE, {"attempt": 2}, [("wrong", "its row has attempt 2, its log makes that 1")]),
        ("image", ONCE, {"retry_count": 1}, [("wrong", "its row has retry_count 1, its log makes that 0")]),
        (
            "image",
            ONCE,
            {"status": "failed", "error_type": "OSError"},
            [("wrong", "its row is failed, its log ends with completed"), ("lost", "it failed: OSError")],
        ),
        ("image", ONCE, {"result_data": {"width": 1}}, [("wrong", "its result is {'width': 1}; it should be {")]),
        ("broken", ONCE, {}, [("wrong", "where InputMissing was planted"), ("lost", "it is completed, and ")]),
        (
            "broken",
            "created claimed started failed",
            {"error_type": "OSError"},
            [("wrong", "it is failed, OSError, where InputMissing was planted")],
        ),
        ("image", "created failed", {"error_type": "DiskFull"}, [("lost", "it failed: DiskFull")]),
        ("retry", ONCE, {}, [("duplicated", "attempts that started: 1; its body ran 2 times")]),
        ("retry", RETRIED, {"result_data": 1}, [("wrong", "its result is 1; it ran 2 times, and 0 attempts died")]),
        ("retry", RETRIED, {"result_data": 3}, [("wrong", "its result is 3; it ran 2 times, and 0 attempts died")]),
        ("body", ONCE, {"result_data": [1]}, [("wrong", "the body of the chord was given [1]")]),
        ("later", ONCE, {"created_at": datetime.max.replace(tzinfo=UTC)}, [("wrong", "before its time")]),
        (
            "image",
            "created claimed started lost claimed started completed",
            {},
            [("wrong", "attempt 1 on w1 counts as dead; nothing killed it")],
        ),
        (
            "image",
            "created claimed started released claimed started completed",
            {},
            [("wrong", "attempt 1 was released, and w1 was not terminated")],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_must_not_become_of_a_job_is_found(storm, name, events, values, expected):
    storm.retell(name, events, **values)

    assert_found(storm.audited(), *expected, name=name, storm=storm)


def test_a_job_without_its_row_is_lost(storm):
    storm.execute(delete(task_queue).where(task_queue.c.job_id == storm.id("image")))

    assert_found(storm.audited(), ("lost", "it was accepted and has no row"), name="image", storm=storm)


def test_a_gap_in_a_log_is_found(storm):
    logs = task_logs.c
    storm.execute(delete(task_logs).where(logs.job_id == storm.id("image"), logs.sequence == 3))

    expected = [
        ("wrong", "its log is numbered [1, 2, 4]"),
        ("wrong", "its row has sequence 4, its log 3 rows"),
        ("wrong", "event 4, completed, comes while it is claimed"),
    ]
    assert_found(storm.audited(), *expected, name="image", storm=storm)


def test_a_job_that_nobody_submitted_is_a_double(storm):
    other = storm.app.tasks["add"].delay(1, 1)

    assert findings(storm.audited()) == [("duplicated", f"a job of add that nobody submitted: {other.id}")]


def test_an_output_that_is_not_there_is_lost(storm):
    storm.jobs["image"].output.unlink()

    assert_found(storm.audited(), ("lost", "it is completed, and "), name="image", storm=storm)


def test_an_output_with_one_other_byte_is_wrong(storm):
    output = storm.jobs["member"].output
    output.write_bytes(output.read_bytes()[:-1] + b"!")

    assert_found(storm.audited(), ("wrong", f"{output} differs from "), name="member", storm=storm)


def test_an_output_of_a_job_that_failed_is_wrong(storm):
    output = storm.jobs["broken"].output
    output.write_bytes(b"half")

    assert_found(storm.audited(), ("wrong", f"{output} was made of a broken input"), name="broken", storm=storm)


@pytest.mark.parametrize("name", ["retry", "killer", "body"])
def test_a_body_that_ran_once_more_than_its_attempts_is_a_double(storm, name):
    with storm.jobs[name].notes.open("a") as notes:
        notes.write("run\n")

    expected = [("duplicated", f"its body ran {3 if name == 'retry' else 2} times")]
    assert_found(storm.audited(), *expected, name=name, storm=storm)


@pytest.mark.parametrize("name", ["killer", "body"])
def test_a_body_that_did_not_run_in_an_attempt_that_nothing_killed_is_lost(storm, name):
    storm.jobs[name].notes.unlink()

    expected = [("lost", "attempts that nothing killed: 1; its body ran 0 times")]
    assert_found(storm.audited(), *expected, name=name, storm=storm)


def test_a_job_is_retried_only_if_its_body_ran(storm):
    storm.jobs["retry"].notes.write_text("run\n")

    expected = [
        ("lost", "attempts that nothing killed: 2; its body ran 1 times"),
        ("wrong", "its result is 2; it ran 1"),
    ]
    assert_found(storm.audited(), *expected, name="retry", storm=storm)


@pytest.mark.parametrize("has_row", [True, False])
def test_the_body_of_an_abandoned_chord_may_not_run_twice_either(storm, monkeypatch, has_row):
    monkeypatch.setattr(storm.jobs["body"], "is_abandoned", True)
    if has_row:
        storm.jobs["body"].notes.write_text("body\nbody\n")
    else:
        storm.execute(delete(task_queue).where(task_queue.c.job_id == storm.id("body")))

    expected = [("duplicated", "attempts that started: 1; its" if has_row else "attempts that started: 0; its")]
    assert_found(storm.audited(), *expected, name="body", storm=storm)


def test_what_becomes_of_an_abandoned_chord_is_nobodys_loss(storm, monkeypatch):
    monkeypatch.setattr(storm.jobs["body"], "is_abandoned", True)
    storm.retell("body", "created failed", error_type="OSError")
    storm.jobs["body"].notes.unlink()

    assert findings(storm.audited()) == []


def test_a_job_that_ran_half_a_second_before_its_time_is_wrong(storm):
    storm.retell("later", ONCE, created_at=storm.at("later", 1.5))

    assert_found(
        storm.audited(), ("wrong", "it ran 0.50 s after its creation, before its time"), name="later", storm=storm
    )


def test_a_temp_file_is_found_wherever_it_was_left(storm):
    left = storm.roots[0] / ".media-tasks-0.1-i.webp"
    left.write_bytes(b"half")

    assert findings(storm.audited()) == [("wrong", f"a file that is no output was left: {left}")]


# What blows explain

DIFFERS = "{} differs from what the same function makes here"
LOST_ONCE = "created claimed started lost claimed started completed"
LOST_THRICE = "created claimed started lost claimed started lost claimed started lost failed"


def test_a_death_that_was_dealt_is_no_finding_and_its_recovery_is_measured(storm):
    storm.retell("image", LOST_ONCE)

    audit = storm.audited(Blow("child killed", storm.at("image", 3.5), "w1"))

    assert findings(audit) == []
    assert [(each.kind, each.seconds) for each in audit.recoveries] == [("child killed", 1.5)]


def test_a_recovery_counts_from_the_blow_that_came_while_the_job_ran(storm):
    storm.retell("image", LOST_ONCE)

    audit = storm.audited(
        Blow("child killed", storm.at("image", 0.5), "w1"),
        Blow("worker killed", storm.at("image", 3), "w1"),
        Blow("child killed", storm.at("image", 4.5), "w1"),
    )

    assert findings(audit) == []
    assert [(each.kind, each.seconds) for each in audit.recoveries] == [("worker killed", 2.0)]


@pytest.mark.parametrize(
    ("kind", "worker", "after_s"),
    [
        ("child killed", "w2", 3.5),
        ("child stopped", "w1", 3.5),
        ("child killed", "w1", 60),
        ("child killed", "w1", -60),
    ],
    ids=["another worker", "no death", "later", "earlier"],
)
def test_another_blow_does_not_explain_a_death(storm, kind, worker, after_s):
    storm.retell("image", LOST_ONCE)

    audit = storm.audited(Blow(kind, storm.at("image", after_s), worker))

    assert_found(audit, ("wrong", "attempt 1 on w1 counts as dead"), name="image", storm=storm)


def test_three_deaths_that_were_dealt_excuse_a_failure(storm):
    storm.retell("image", LOST_THRICE, error_type="WorkerLost")
    storm.jobs["image"].output.unlink()

    audit = storm.audited(*(Blow("main killed", storm.at("image", seconds), "w1") for seconds in (3, 6, 9)))

    assert findings(audit) == []
    assert len(audit.excused) == 1


def test_a_failure_for_two_deaths_is_a_job_lost(storm):
    storm.retell("image", LOST_THRICE.replace("lost claimed started", "", 1), error_type="WorkerLost")

    audit = storm.audited(*(Blow("main killed", storm.at("image", seconds), "w1") for seconds in (3, 6)))

    assert_found(audit, ("lost", "it failed: WorkerLost"), name="image", storm=storm)


@pytest.mark.parametrize(("until_s", "expected"), [(9, []), (4, ["lost"])], ids=["at each attempt", "at one"])
def test_a_disk_that_was_full_at_each_attempt_excuses_a_failure(storm, until_s, expected):
    events = "created claimed started retry claimed started failed"
    storm.retell("image", events, error_type="DiskFull")

    audit = storm.audited(Blow("disk full", storm.at("image", 2), until=storm.at("image", until_s)))

    assert [verdict for verdict, _ in findings(audit)] == expected
    assert len(audit.excused) == (0 if expected else 1)


@pytest.mark.parametrize(("name", "runs"), [("killer", 0), ("killer", 1), ("body", 1), ("body", 2)])
def test_an_attempt_that_a_blow_killed_may_have_begun_its_body_or_not(storm, name, runs):
    storm.retell(name, LOST_ONCE if name == "body" else "created claimed started lost failed")
    storm.jobs[name].notes.write_text("run\n" * runs)

    audit = storm.audited(Blow("child killed", storm.at(name, 3.5), "w1"))

    assert findings(audit) == []


def test_a_body_that_ran_thrice_in_two_attempts_is_a_double_whatever_was_killed(storm):
    storm.retell("body", LOST_ONCE)
    storm.jobs["body"].notes.write_text("body\n" * 3)

    audit = storm.audited(Blow("child killed", storm.at("body", 3.5), "w1"))

    assert_found(audit, ("duplicated", "attempts that started: 2; its body ran 3 times"), name="body", storm=storm)


@pytest.mark.parametrize(
    ("runs", "result", "is_right"), [(2, 2, True), (3, 3, True), (3, 2, True), (2, 3, False), (3, 4, False)]
)
def test_a_job_to_be_retried_may_have_run_once_more_for_each_death(storm, runs, result, is_right):
    storm.retell("retry", RETRIED.replace("claimed", "claimed started lost claimed", 1), result_data=result)
    storm.jobs["retry"].notes.write_text("run\n" * runs)

    audit = storm.audited(Blow("child killed", storm.at("retry", 3.5), "w1"))

    assert [text for _, text in findings(audit)] == (
        [] if is_right else [f"its result is {result}; it ran {runs} times, and 1 attempts died"]
    )


def test_a_job_to_be_retried_that_ran_once_more_without_a_death_is_wrong(storm):
    storm.retell("retry", RETRIED.replace("completed", "retry claimed started completed"), result_data=3)
    storm.jobs["retry"].notes.write_text("run\n" * 3)

    expected = [("wrong", "its result is 3; it ran 3 times, and 0 attempts died")]
    assert_found(storm.audited(), *expected, name="retry", storm=storm)


@pytest.mark.parametrize("content", [b"half", None], ids=["half", "whole"])
@pytest.mark.parametrize(
    ("events", "error", "kind", "worker"),
    [
        ("created claimed started retry claimed started failed", "DiskFull", "disk full", ""),
        (LOST_THRICE, "WorkerLost", "main killed", "w1"),
    ],
    ids=["disk", "deaths"],
)
def test_an_output_of_a_failure_that_is_excused_is_whole_or_wrong(storm, content, events, error, kind, worker):
    storm.retell("image", events, error_type=error)
    output = storm.jobs["image"].output
    if content is not None:
        output.write_bytes(content)

    audit = storm.audited(Blow(kind, storm.at("image", 0), worker, until=storm.at("image", 20)))

    assert findings(audit) == ([("wrong", DIFFERS.format(output))] if content is not None else [])
    assert len(audit.excused) == 1


# What is left in a broker


@pytest.mark.parametrize("kind", ["embedded", "redis", pytest.param("rabbitmq", marks=pytest.mark.slow)])
def test_a_message_that_is_left_in_a_broker_is_found(kind, request, server_dir, tmp_path):
    if kind == "embedded":
        broker = servers.EmbeddedBroker(server_dir)
    else:
        with required():
            broker = servers.RedisBroker() if kind == "redis" else servers.RabbitmqBroker(QUEUES)
    request.addfinalizer(broker.remove)
    broker.start()
    with deployed(server_dir, tmp_path, broker.env) as own:
        own.task.note_parts.apply_async(([], str(tmp_path / "never")), priority=9)
        own.task.note_parts.apply_async(([], str(tmp_path / "never")), priority=2)
        audit = Audit(own.app, material=None, blows=[])

        audit.messages(broker.remains(QUEUES))

        assert findings(audit) == [("wrong", "the broker still has 2 messages in note_parts")]
        with own.app.connection_for_write() as connection, connection.channel() as channel:
            assert [channel.basic_get("note_parts", no_ack=True) for _ in range(3)][2] is None
        assert broker.remains(QUEUES) == {}
