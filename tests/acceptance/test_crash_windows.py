"""A process dies between any two steps of the protocol: every job still ends once, and so does what follows from it."""

import signal

import pytest
import pyvips
from celery import chain, chord

from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow
GET = {"timeout": 60}
IN_A_CHILD = ["claimed", "before the rename", "before completed", "completed"]
IN_THE_MAIN_PROCESS = ["before the acknowledgement"]


@pytest.fixture
def start(own, tmp_path):
    """Start a worker that dies at a point; if its main process does, another one takes its place."""

    def start(point, *args):
        env = {"CRASH_AT": point, "CRASH_FILE": tmp_path / "crashed"}
        return own.start_worker("--concurrency=1", *args, env=env, plug_in="tests.acceptance.crash_points")

    return start


def was_hit(tmp_path):
    eventually((tmp_path / "crashed").exists, 30, "no process came to the point")


def ended_once(own, job):
    events = own.events(job)
    assert events.count("completed") == 1, events
    assert own.row(job)["status"] == "completed"


@pytest.mark.parametrize("point", [*IN_A_CHILD, *IN_THE_MAIN_PROCESS])
def test_an_image_job_ends_once_wherever_its_process_dies(own, task, start, tmp_path, point):
    worker = start(point)
    pyvips.Image.black(300, 200).pngsave(str(tmp_path / "in.png"))
    job = task.image_resize.delay(tmp_path / "in.png", tmp_path / "out" / "out.png", width=100)

    was_hit(tmp_path)
    if point in IN_THE_MAIN_PROCESS:
        assert worker.wait() == -signal.SIGKILL
        own.start_worker("--concurrency=1")

    assert job.get(**GET)["width"] == 100
    ended_once(own, job)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.png"]


def test_a_callback_runs_once_though_the_process_that_had_sent_it_died_before_its_own_end(own, task, start, tmp_path):
    start("before completed")
    job = task.add.apply_async((1, 1), link=task.note.si(str(tmp_path / "linked"), "linked"))

    was_hit(tmp_path)

    assert job.get(**GET) == 2
    eventually(lambda: {row["status"] for row in own.app.store.jobs()} == {"completed"}, 20)
    assert len(own.app.store.jobs()) == 2
    assert lines(tmp_path / "linked") == ["begin linked", "end linked"]


@pytest.mark.parametrize("point", ["completed", "chord fired"])
def test_a_chord_runs_its_body_once_wherever_its_last_member_dies(own, task, start, tmp_path, point):
    start(point)
    result = chord([task.add.s(1, 1), task.add.s(2, 2)], task.note_parts.s(str(tmp_path / "body")))()

    was_hit(tmp_path)

    assert result.get(**GET) == [2, 4]
    ended_once(own, result)
    assert lines(tmp_path / "body") == ["body [2, 4]"]
    assert [own.events(member).count("completed") for member in result.parent] == [1, 1]


def test_a_chord_fails_though_the_process_that_had_to_tell_it_died(own, task, start, tmp_path):
    start("failed")
    result = chord([task.add.s(1, 1), task.fail.si(message="a member")], task.total.s())()

    was_hit(tmp_path)

    row = own.wait_for(result, "failed", timeout_s=40)
    assert row["error_type"] == "ChordError"


def test_the_rest_of_a_chain_fails_though_the_process_that_had_to_tell_it_died(own, task, start, tmp_path):
    start("failed")
    result = chain(task.fail.si(message="the first step"), task.add.si(1, 1), task.add.s(1))()

    was_hit(tmp_path)

    row = own.wait_for(result, "failed", timeout_s=40)
    assert "the first step" in row["error_message"]
    assert own.events(result) == ["created", "failed"]


@pytest.mark.parametrize("point", ["requeued", "due taken", "due sent"])
def test_a_retry_is_not_lost_wherever_a_process_dies(own, task, start, tmp_path, point):
    worker = start(point)
    job = task.recover.delay(str(tmp_path / "runs"))

    was_hit(tmp_path)
    if point != "requeued":
        assert worker.wait() == -signal.SIGKILL
        own.start_worker("--concurrency=1")

    runs = job.get(**GET)
    ended_once(own, job)
    row = own.row(job)
    # A message that was sent may reach a child of the dying worker: that run is a death, and counted.
    assert row["deaths"] <= (1 if point == "due sent" else 0)
    assert runs == 2 + row["deaths"]
    assert lines(tmp_path / "runs") == ["run"] * runs
    assert row["retry_count"] == 1


def test_a_main_process_that_dies_while_it_closes_an_attempt_loses_nothing(own, task, start, tmp_path):
    worker = start("closed")
    job = task.kill_its_worker.delay(str(tmp_path / "runs"))

    was_hit(tmp_path)
    assert worker.wait() == -signal.SIGKILL
    own.start_worker("--concurrency=1")

    row = own.wait_for(job, "failed", timeout_s=60)
    assert (row["error_type"], row["deaths"]) == ("WorkerLost", 3)
    assert lines(tmp_path / "runs") == ["run"] * 3
