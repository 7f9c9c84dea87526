"""What people set for whole queues, with real workers on each broker: pauses, purges, the order of claims."""

from datetime import timedelta

import pytest

from db.records import now
from tasks import control
from tests.acceptance.deployment import lines
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

COMPLETED = ["created", "claimed", "started", "completed"]
GET = {"timeout": 60}


@pytest.fixture
def own(own_on_broker):
    return own_on_broker


def test_a_pause_outlives_a_restart_and_ends_by_itself(own, task, tmp_path):
    first = own.start_worker("--concurrency=1", "-Q", "note,add")
    control.pause("note", reason="a new disk", for_s=3600, app=own.app)
    first.wait_for_log("the queue note is paused", 30)
    job = task.note.delay(str(tmp_path / "runs"), "job")

    first.terminate()
    assert first.wait(30) == 0
    second = own.start_worker("--concurrency=1", "-Q", "note,add")
    second.wait_for_log("the queue note is paused", 30)
    assert task.add.delay(1, 1).get(**GET) == 2
    assert own.row(job)["status"] == "queued"
    assert control.explain(job.id, app=own.app)[-1].text.endswith(" UTC: a new disk")

    until = now() + timedelta(seconds=5)
    control.pause("note", reason="nearly done", for_s=5, app=own.app)

    assert job.get(**GET) == "job"
    assert own.row(job)["started_at"] >= until
    assert lines(tmp_path / "runs") == ["begin job", "end job"]
    assert own.events(job).count("completed") == 1
    assert not control.queue_named("note", app=own.app).is_paused


def test_purged_jobs_are_cancelled_and_never_run(own, task, tmp_path):
    worker = own.start_worker("--concurrency=1", "-Q", "note,stay")
    busy = task.stay.delay(str(tmp_path / "busy"), 60.0)
    eventually(lambda: lines(tmp_path / "busy"), 20)
    waiting = [task.note.delay(str(tmp_path / "never"), str(n)) for n in range(10)]

    assert control.purge("note", app=own.app) == 10

    assert [own.events(job) for job in waiting] == [["created", "cancelled"]] * 10
    after = task.note.apply_async((str(tmp_path / "after"), "after"), priority=1)
    assert own.row(busy)["status"] == "running"
    control.cancel(busy.id, app=own.app)
    assert after.get(**GET) == "after"  # behind the messages of all that was purged
    worker.terminate()
    assert worker.wait(30) == 0
    own.start_worker("--concurrency=1", "-Q", "note")
    assert task.note.apply_async((str(tmp_path / "after"), "restarted"), priority=1).get(**GET) == "restarted"
    assert {own.row(job)["status"] for job in waiting} == {"cancelled"}
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("broker", ["embedded"], indirect=True)
@pytest.mark.parametrize("own_env", [{"QUEUE_STRATEGY": "note=WEIGHTED_RANDOM"}])
def test_weighted_random_gives_each_priority_its_share(own, task, tmp_path):
    """Low ones first in the queue: by age the first half would be all low, by priority all high."""
    file = str(tmp_path / "order")
    jobs = [task.note.apply_async((file, "low"), priority=1) for _ in range(100)]
    jobs += [task.note.apply_async((file, "high"), priority=9) for _ in range(100)]

    own.start_worker("--concurrency=1", "-Q", "note")

    eventually(lambda: len(lines(tmp_path / "order", "end")) == 200, 60)
    first = lines(tmp_path / "order", "begin")[:100]
    # The mean is 83, the deviation 3: both bounds are far off.
    assert 60 <= first.count("begin high") <= 99
    eventually(lambda: {own.row(job)["status"] for job in jobs} == {"completed"}, 20)
    assert {tuple(own.events(job)) for job in jobs} == {tuple(COMPLETED)}
