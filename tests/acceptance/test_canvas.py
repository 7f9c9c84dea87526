"""Groups, chords, chains and what can be nested of them, against a real worker: Celery's results, and our rows."""

import json
import os
import subprocess
import sys

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult, GroupResult

from tasks import control
from tasks.errors import InvalidArguments
from tests.acceptance.deployment import REPOSITORY, lines
from tests.tooling.waiting import eventually, stays

COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 20}
# `get` looks at the members before the body: it raises the member's own error or the chord's, whichever it sees first.
CHORD_FAILED = (ChordError, ValueError)
pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def task(deployment):
    return deployment.task


def rows_of(deployment, root_id):
    return [row for row in deployment.app.store.jobs(limit=1000) if row["root_id"] == root_id]


def by_task(deployment, root_id):
    return sorted((row["task_type"], row["status"]) for row in rows_of(deployment, root_id))


def test_a_group_gives_the_results_in_order(deployment, task):
    result = group(task.add.s(n, n) for n in range(10))()

    assert result.get(**GET) == [2 * n for n in range(10)]
    assert [deployment.events(member) for member in result] == [COMPLETED] * 10
    assert {deployment.row(member)["group_id"] for member in result} == {result.id}


def test_an_empty_group_is_done_at_once(task):
    assert group([])().get(**GET) == []


def test_a_chain_hands_each_result_on(deployment, task):
    result = chain(task.add.s(1, 2), task.add.s(4), task.add.s(8))()

    assert result.get(**GET) == 15
    # Each step sends the next one before its own completion is written.
    steps = [deployment.wait_for(step, "completed") for step in (result.parent.parent, result.parent, result)]
    assert_is_chain(steps)


def assert_is_chain(rows):
    """Each names the first as its root, and the one before it as its parent."""
    assert {row["root_id"] for row in rows} == {rows[0]["job_id"]}
    assert [row["parent_id"] for row in rows] == [None, *(row["job_id"] for row in rows[:-1])]


def test_the_steps_behind_a_failed_one_fail_with_its_error_and_never_run(deployment, task, tmp_path):
    result = chain(
        task.add.s(1, 2), task.fail.si(message="in the middle"), task.note.si(str(tmp_path / "ran")), task.add.si(1, 1)
    )()

    with pytest.raises(ValueError, match="in the middle"):
        result.get(**GET)
    assert not (tmp_path / "ran").exists()
    steps = [result.parent.parent.parent, result.parent.parent, result.parent, result]
    assert [deployment.wait_for(step, "completed", "failed")["status"] for step in steps] == [
        "completed", "failed", "failed", "failed",
    ]  # fmt: skip
    assert [deployment.events(step) for step in steps[2:]] == [["created", "failed"]] * 2
    assert deployment.row(result)["error_type"] == "ValueError"
    assert deployment.row(result)["task_type"] == "add"
    assert_is_chain([deployment.row(step) for step in steps])


def test_a_chord_runs_its_body_once_with_all_results_in_order(deployment, task, tmp_path):
    result = chord([task.add.s(n, 1) for n in range(12)], task.note_parts.s(str(tmp_path / "body")))()

    assert result.get(**GET) == list(range(1, 13))
    assert lines(tmp_path / "body") == [f"body {list(range(1, 13))}"]
    assert deployment.events(result) == COMPLETED


def test_a_chord_needs_no_unlock_task(deployment, task):
    chord([task.add.s(1, 1), task.add.s(2, 2)], task.total.s())().get(**GET)

    assert not any("chord_unlock" in worker.log() for worker in deployment.workers)


def test_a_chord_of_one_is_a_chord(task):
    assert chord([task.add.s(1, 1)], task.total.s())().get(**GET) == 2


def test_a_chord_without_members_runs_its_body(task):
    assert chord([], task.total.s())().get(**GET) == 0


@pytest.mark.parametrize("number", range(3))
def test_many_chords_at_once_each_run_their_body_once(deployment, task, tmp_path, number):
    results = [
        chord([task.add.s(n, n) for n in range(3)], task.note_parts.s(str(tmp_path / f"body-{chord_number}")))()
        for chord_number in range(8)
    ]

    assert [result.get(**GET) for result in results] == [[0, 2, 4]] * 8
    assert [lines(tmp_path / f"body-{n}") for n in range(8)] == [["body [0, 2, 4]"]] * 8


def test_a_chord_may_be_a_step_of_a_chain(task):
    steps = chain(task.add.s(1, 1), group(task.add.s(10), task.add.s(20)), task.total.s(), task.add.s(100))

    assert steps().get(**GET) == 134


def test_a_chain_may_be_a_member_of_a_chord(task):
    header = [chain(task.add.s(1, 1), task.add.s(2)), task.add.s(5, 5), chain(task.add.s(0, 1), task.add.s(1))]

    assert chord(header, task.total.s())().get(**GET) == 4 + 10 + 2


def test_a_chord_may_be_a_member_of_a_chord(task):
    inner = chord([task.add.s(1, 1), task.add.s(2, 2)], task.total.s())

    assert chord([inner, task.add.s(10, 10)], task.total.s())().get(**GET) == 26


def test_a_chord_may_have_a_group_as_its_body(task):
    body = group(task.total.s(), task.note_parts.s("/dev/null"))

    assert chord([task.add.s(1, 1), task.add.s(2, 2)], body)().get(**GET) == [6, [2, 4]]


def test_a_chord_may_have_a_chain_as_its_body(task):
    body = chain(task.total.s(), task.add.s(100))

    assert chord([task.add.s(1, 1), task.add.s(2, 2)], body)().get(**GET) == 106


def test_a_group_may_hold_chords(task):
    result = group(chord([task.add.s(n, 1), task.add.s(n, 2)], task.total.s()) for n in range(4))()

    assert result.get(**GET) == [3, 5, 7, 9]


def test_a_group_may_hold_chains(task):
    assert group(chain(task.add.s(n, 1), task.add.s(10)) for n in range(3))().get(**GET) == [11, 12, 13]


def test_a_group_may_hold_a_group(task):
    assert group(task.add.s(1, 1), group(task.add.s(2, 2), task.add.s(3, 3)))().get(**GET) == [2, 4, 6]


def test_a_chord_with_a_failed_member_fails_its_body_which_never_runs(deployment, task, tmp_path):
    header = [task.add.s(1, 1), task.fail.si(message="a member"), task.add.s(2, 2)]
    result = chord(header, task.note_parts.s(str(tmp_path / "body")))()

    with pytest.raises(CHORD_FAILED, match="a member"):
        result.get(**GET)
    row = deployment.wait_for(result, "failed")
    assert not (tmp_path / "body").exists()
    assert deployment.events(result) == ["created", "failed"]
    assert (row["task_type"], row["error_type"]) == ("note_parts", "ChordError")
    assert [deployment.wait_for(member, "completed", "failed")["status"] for member in result.parent] == [
        "completed", "failed", "completed",
    ]  # fmt: skip


def test_a_failed_member_fails_a_body_that_is_a_chain_and_all_behind_it(deployment, task, tmp_path):
    body = chain(task.note_parts.s(str(tmp_path / "body")), _pair(task), task.total.s(), task.add.s(1))
    result = chord([task.add.s(1, 1), task.fail.si(message="a member")], body)()

    with pytest.raises(Exception, match="a member"):
        result.get(**GET)
    root_id = deployment.wait_for(result, "failed")["root_id"]
    rows = [row for row in reversed(rows_of(deployment, root_id)) if row["error_type"] == "ChordError"]
    assert [(row["task_type"], row["status"], row["error_type"]) for row in rows] == [
        (name, "failed", "ChordError") for name in ("note_parts", "total", "add")
    ]
    first, second, last = rows
    assert last["job_id"] == result.id
    assert (second["parent_id"], last["parent_id"]) == (first["job_id"], second["job_id"])
    assert root_id == deployment.row(first["parent_id"])["root_id"]
    assert first["parent_id"] in [member.id for member in result.parent]
    with pytest.raises(ChordError, match="a member"):
        AsyncResult(first["job_id"], app=deployment.app).get(**GET)
    assert not (tmp_path / "body").exists()


def test_a_failed_member_fails_every_task_of_a_body_that_is_a_group(deployment, task, tmp_path):
    body = group(task.total.s(), task.note_parts.s(str(tmp_path / "body")))
    result = chord([task.add.s(1, 1), task.fail.si(message="a member")], body)()

    with pytest.raises(Exception, match="a member"):
        result.get(**GET)
    assert not (tmp_path / "body").exists()
    rows = [deployment.wait_for(member, "failed") for member in result]
    assert [row["task_type"] for row in rows] == ["total", "note_parts"]
    assert deployment.app.store.job(result.id) is None, "a group is no job"


def test_a_failed_chain_in_a_chord_fails_the_chord(deployment, task):
    header = [chain(task.add.s(1, 1), task.fail.s(message="deep inside"), task.add.s(1)), task.add.s(2, 2)]

    result = chord(header, task.total.s())()

    with pytest.raises(CHORD_FAILED, match="deep inside"):
        result.get(**GET)
    row = deployment.wait_for(result, "failed")
    assert row["error_type"] == "ChordError"
    assert "deep inside" in row["error_message"]


def test_what_follows_a_failed_chord_in_a_chain_fails_too(deployment, task):
    steps = chain(group(task.add.s(1, 1), task.fail.si(message="in the group")), task.total.s(), task.add.s(1))
    result = steps()

    with pytest.raises(Exception, match="in the group"):
        result.get(**GET)
    deployment.wait_for(result, "failed")  # `get` may have seen the member's end before this one


BEHIND_A_FAILURE = {
    "a group": lambda t, failing: chain(failing, _pair(t)),
    "a step and a group": lambda t, failing: chain(failing, t.add.si(1, 1), _pair(t)),
    "a group of canvases": lambda t, failing: chain(
        failing, group(chain(t.add.si(1, 1), t.add.s(1)), chord([t.add.si(1, 1), t.add.si(2, 2)], t.total.s()))
    ),
    "two groups": lambda t, failing: chain(failing, _pair(t), _pair(t)),
    "two groups and a step": lambda t, failing: chain(failing, _pair(t), _pair(t), t.total.si([1])),
    "a group behind a chord": lambda t, failing: chain(group(t.add.si(1, 1), failing), t.total.s(), _pair(t)),
    "a chord behind a group": lambda t, failing: chain(group(t.add.si(1, 1), failing), _pair(t), t.total.si([1])),
    "a group in a chord": lambda t, failing: chord([chain(failing, _pair(t)), t.add.si(1, 1)], t.total.s()),
}


def _pair(task):
    return group(task.add.si(1, 1), task.add.si(2, 2))


@pytest.mark.parametrize("name", BEHIND_A_FAILURE)
def test_what_waits_for_a_group_that_is_never_sent_hears_of_the_failure_before_it(deployment, task, name):
    result = BEHIND_A_FAILURE[name](task, task.fail.si(message="before it"))()

    with pytest.raises(Exception, match="before it"):
        result.get(**GET)

    ends = list(result) if isinstance(result, GroupResult) else [result]
    assert [deployment.wait_for(end, "failed")["task_type"] for end in ends] == (
        ["add", "total" if "canvases" in name else "add"] if len(ends) > 1 else ["total"]
    )
    assert all(deployment.row(end)["root_id"] and deployment.row(end)["parent_id"] for end in ends)


def test_a_group_behind_a_cancelled_step_is_cancelled(deployment, task, tmp_path):
    result = chain(task.note.si(str(tmp_path / "runs"), "", 60.0), _pair(task))()
    deployment.wait_for(result.parent, "running")

    control.cancel(result.parent.id, app=deployment.app)

    with pytest.raises(TaskRevokedError):
        result.get(**GET)
    assert [deployment.wait_for(member, "cancelled")["task_type"] for member in result] == ["add", "add"]


def test_no_row_is_made_of_a_chord_that_is_never_sent_but_that_of_its_result(deployment, task):
    result = chain(task.fail.si(message="before it"), _pair(task), task.total.s())()

    with pytest.raises(ValueError, match="before it"):
        result.get(**GET)
    deployment.wait_for(result, "failed")
    first = result
    while first.parent is not None:
        first = first.parent
    eventually(lambda: deployment.row(first)["sequel"] == "told", 10)
    assert [row["task_type"] for row in deployment.app.store.jobs(limit=2)] == ["total", "fail"]


def test_a_failed_member_of_a_group_does_not_touch_the_others(deployment, task):
    result = group(task.add.s(1, 1), task.fail.si(message="only me"), task.add.s(2, 2))()

    with pytest.raises(ValueError, match="only me"):
        result.get(**GET)
    assert result.get(propagate=False, **GET)[::2] == [2, 4]


def test_a_link_gets_the_result(deployment, task, tmp_path):
    task.add.apply_async((1, 2), link=task.note_parts.s(str(tmp_path / "link"))).get(**GET)

    eventually(lambda: lines(tmp_path / "link") == ["body 3"], 10)


def test_an_immutable_link_does_not(deployment, task, tmp_path):
    task.add.apply_async((1, 2), link=task.note.si(str(tmp_path / "link"), "alone")).get(**GET)

    eventually(lambda: lines(tmp_path / "link") == ["begin alone", "end alone"], 10)


def test_a_link_error_is_called_once_with_the_request_and_the_error(deployment, task, tmp_path):
    errback = task.note_error.s(file=str(tmp_path / "errors"))
    result = task.fail.apply_async(link_error=errback)

    with pytest.raises(ValueError, match="can't work"):
        result.get(**GET)
    eventually(lambda: lines(tmp_path / "errors"), 10)
    stays(lambda: lines(tmp_path / "errors") == [f"errback {result.id} ValueError"], 0.5)


def test_the_link_error_of_a_chord_is_called_when_a_member_fails(deployment, task, tmp_path):
    body = task.total.s().on_error(task.note_error.s(file=str(tmp_path / "errors")))
    result = chord([task.add.s(1, 1), task.fail.si()], body)()

    with pytest.raises(CHORD_FAILED):
        result.get(**GET)
    eventually(lambda: lines(tmp_path / "errors") == [f"errback {result.id} ChordError"], 10)


def test_jobs_that_ignore_their_results_complete_their_rows(deployment, task):
    job = task.quiet.delay(5)

    row = deployment.wait_for(job, "completed")

    assert (row["status"], row["result_data"]) == ("completed", 5)
    assert deployment.events(job) == COMPLETED


def test_jobs_that_ignore_their_results_fail_their_rows(deployment, task):
    job = task.quiet_failure.delay()

    row = deployment.wait_for(job, "failed")

    assert (row["error_type"], row["error_message"]) == ("ValueError", "nobody listens")


def test_jobs_that_ignore_their_results_count_in_chords(task):
    assert chord([task.quiet.s(1), task.quiet.s(2), task.add.s(3, 0)], task.total.s())().get(**GET) == 6


def test_a_step_that_can_not_work_fails_and_not_the_job_before_it(deployment, task):
    steps = chain(task.add.si(1, 1), task.add.s(2, 3, 4), task.add.s(5))()

    with pytest.raises(InvalidArguments, match="add"):
        steps.get(**GET)  # the error of the second, before the third has its row

    deployment.wait_for(steps, "failed")
    assert [deployment.row(step)["status"] for step in (steps.parent.parent, steps.parent)] == ["completed", "failed"]


def test_a_chord_whose_body_can_not_work_fails_at_once(deployment, task):
    for body in (task.total, task.strict_total):
        result = chord([task.add.si(1, 1), task.add.si(2, 2)], body.s(2, 3))()
        with pytest.raises((InvalidArguments, TypeError), match="total"):
            result.get(**GET)
        assert deployment.row(result)["status"] == "failed"


def test_a_job_that_is_submitted_by_a_job_knows_its_parent_and_root(deployment, task):
    outer = task.call_another.delay(5)

    inner = AsyncResult(outer.get(**GET), app=deployment.app)

    assert inner.get(**GET) == 6
    row = deployment.row(inner)
    assert (row["root_id"], row["parent_id"]) == (outer.id, outer.id)
    assert deployment.events(inner) == COMPLETED


def test_a_job_may_replace_itself(deployment, task):
    job = task.become_add.delay(5)

    assert job.get(**GET) == 6
    row = deployment.row(job)
    assert (row["status"], row["task_type"], row["parameters"]) == ("completed", "add", {"x": 5, "y": 1})
    assert deployment.events(job) == [*COMPLETED[:3], "replaced", *COMPLETED[1:]]


def test_a_job_may_replace_itself_inside_of_a_chord(task):
    assert chord([task.become_add.s(1), task.add.s(3, 4)], task.total.s())().get(**GET) == 9


def test_a_result_can_be_read_by_another_process(deployment, task):
    job = task.add.delay(20, 22)
    code = (
        "import sys; from tasks import app; from celery.result import AsyncResult; "
        "print(AsyncResult(sys.argv[1], app=app).get(timeout=20))"
    )
    env = {**os.environ, **{name: str(value) for name, value in deployment.env.items()}}

    done = subprocess.run(
        [sys.executable, "-c", code, job.id], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
    )

    assert done.stdout == "42\n"


def test_a_saved_group_can_be_restored(deployment, task):
    result = group(task.add.s(n, n) for n in range(3))()
    result.save()

    restored = GroupResult.restore(result.id, app=deployment.app)

    assert restored.get(**GET) == [0, 2, 4]
    assert [member.id for member in restored] == [member.id for member in result]
    restored.delete()
    assert GroupResult.restore(result.id, app=deployment.app) is None


def test_an_unknown_group_is_not_restored(deployment):
    assert GroupResult.restore("no-such-group", app=deployment.app) is None


def test_a_canvas_survives_json(deployment, task):
    steps = chain(task.add.s(1, 1), group(task.add.s(1), task.add.s(2)), task.total.s())

    restored = deployment.app.signature(json.loads(json.dumps(steps)))

    assert restored.delay().get(**GET) == 7


def test_no_row_is_left_unfinished_by_all_of_this(deployment):
    def unfinished():
        return [
            (row["task_type"], row["status"])
            for row in deployment.app.store.jobs(limit=10_000)
            if row["status"] not in ("completed", "failed", "cancelled")
        ]

    eventually(lambda: not unfinished(), 10, lambda: f"{unfinished()}")
    assert {row["task_type"] for row in deployment.app.store.jobs(limit=10_000)} <= set(deployment.app.tasks)
