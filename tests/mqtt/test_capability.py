"""A worker's capability: what it can do and how much of it now, for as long as it lives."""

import json
import random
import signal
import subprocess
import time
from itertools import pairwise

import pytest

from tasks import control
from tests.acceptance.deployment import install_entry_point
from tests.mqtt.listener import SILENT_FOR_S
from tests.tooling.waiting import eventually, stays
from tests.tooling.worker import REPOSITORY

pytestmark = pytest.mark.slow
POOLS = pytest.mark.parametrize(
    ("options", "slots"),
    [
        (["--pool=prefork", "--concurrency=2"], 2),
        (["--pool=threads", "--concurrency=3"], 3),
        (["--pool=solo", "--concurrency=4"], 1),
    ],
)
# What is told follows within a second, and a tenth of one for the way there.
RIGHT_WITHIN_S = 1.0 + 0.1
QUIET_S = 3.0
STEPS = 6


def test_it_is_retained_from_when_the_worker_is_ready(deployment, listen, mosquitto, worker_id):
    deployment.start_worker("--concurrency=2", "-Q", "add,note")
    deployment.start_worker("-Q", "total", env={"WORKER_ID": f"{worker_id}-2"})

    listen(mosquitto.port).wait_for_capability(worker_id)
    subscribed_at = time.time()
    late = listen(mosquitto.port)

    payload = late.wait_for_capability(worker_id)
    assert payload["id"] == payload["worker_id"] == worker_id
    assert payload["capabilities"] == ["add", "note"]
    assert payload["idle_count"] == 2
    assert time.time() * 1000 - payload["timestamp"] < 30_000
    assert set(payload) == {"id", "worker_id", "capabilities", "idle_count", "timestamp"}
    assert payload["timestamp"] <= subscribed_at * 1000
    assert late.wait_for_capability(f"{worker_id}-2")["capabilities"] == ["total"]


def test_mosquitto_sub_sees_it(deployment, mosquitto, prefix, worker_id):
    deployment.start_worker("-Q", "add")

    def seen():
        command = ["mosquitto_sub", "-p", str(mosquitto.port), "-t", f"{prefix}/workers/+", "-C", "1", "-W", "2"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    assert json.loads(eventually(seen, 10))["worker_id"] == worker_id


@POOLS
def test_idle_count_follows_the_jobs_within_a_second(deployment, listener, worker_id, tmp_path, options, slots):
    deployment.start_worker(*options, "-Q", "note")
    listener.wait_for_capability(worker_id, idle_count=slots)

    jobs = [deployment.task.note.delay(str(tmp_path / str(number)), "", 1.5) for number in range(slots + 1)]
    expected = slots
    for job in jobs[:slots]:
        expected -= 1
        deployment.wait_for(job, "running", "completed")
    listener.wait_for_capability(worker_id, 1.0, idle_count=0)
    for job in jobs:
        deployment.wait_for(job, "completed")
    ended_at = max(deployment.row(job)["completed_at"].timestamp() for job in jobs)
    listener.wait_for_capability(worker_id, 1.0, idle_count=slots)

    counts = [heard.payload["idle_count"] for heard in listener.of_worker(worker_id)]
    assert min(counts) == 0
    assert max(counts) == slots
    assert listener.of_worker(worker_id)[-1].at - ended_at < RIGHT_WITHIN_S


def test_idle_count_of_a_worker_that_tells_no_events_is_right_within_a_second_too(deployment, listener, worker_id):
    """The confirmations of a relay's events make it look; the others look only at their own pace."""
    deployment.start_worker("-Q", "total")
    eventually(lambda: deployment.app.store.duty_holder("relay"), 10)
    serving = {task: f"{worker_id}-{task}" for task in ("note", "stay")}
    for task, name in serving.items():
        deployment.start_worker("--concurrency=1", "-Q", task, env={"WORKER_ID": name})
    for name in serving.values():
        listener.wait_for_capability(name, idle_count=1)

    steps = {name: [] for name in serving.values()}
    for _ in range(STEPS):
        time.sleep(_a_while_s())
        jobs = {
            "note": deployment.task.note.delay("/dev/null", "", _a_while_s()),
            "stay": deployment.task.stay.delay("/dev/null", _a_while_s()),
        }
        for task, job in jobs.items():
            row = deployment.wait_for(job, "completed")
            steps[serving[task]] += [(row["started_at"].timestamp(), 0), (row["completed_at"].timestamp(), 1)]
    for name in serving.values():
        listener.wait_for_capability(name, RIGHT_WITHIN_S, idle_count=1)

    delays_s = [
        _told_after_s(listener.of_worker(name), at, idle_count) for name in steps for at, idle_count in steps[name]
    ]
    print(f"idle_count was right after at most {max(delays_s):.2f} s")
    assert max(delays_s) < RIGHT_WITHIN_S


def _a_while_s():
    """So long that what is told can follow, and never in step with the looks of a worker."""
    return random.SystemRandom().uniform(RIGHT_WITHIN_S, RIGHT_WITHIN_S + 1)


def _told_after_s(heard, at, idle_count):
    """How long after `at` this number was told; 0 if it was already."""
    if [one.payload["idle_count"] for one in heard if one.at <= at][-1] == idle_count:
        return 0.0
    return next(one.at - at for one in heard if one.at > at and one.payload["idle_count"] == idle_count)


@POOLS
def test_idle_count_is_right_under_load(deployment, listener, worker_id, options, slots):
    """At each moment it is, for what the rows say, what was true within the second before: in the middle of hundreds of
    quick jobs, and while one job runs, or as many as there are slots.
    """
    deployment.start_worker(*options, "-Q", "add,note")
    listener.wait_for_capability(worker_id, idle_count=slots)
    time.sleep(QUIET_S)

    jobs = []
    for together in sorted({1, slots}):
        jobs += [deployment.task.add.delay(number, 1) for number in range(150)]
        jobs += [deployment.task.note.delay("/dev/null", "", QUIET_S) for _ in range(together)]
        jobs += [deployment.task.add.delay(number, 1) for number in range(50)]
        for job in jobs:
            job.get(timeout=60)
    time.sleep(QUIET_S)

    heard = [one for one in listener.of_worker(worker_id) if one.text]
    changes = sorted(
        (row[name].timestamp(), step)
        for row in map(deployment.row, jobs)
        for name, step in (("started_at", 1), ("completed_at", -1))
    )
    told_alone = set()
    at, end = heard[0].at + RIGHT_WITHIN_S, time.time()
    while (at := at + 0.05) < end:
        told = [one.payload["idle_count"] for one in heard if one.at <= at][-1]
        true = _free(slots, changes, at - RIGHT_WITHIN_S, at)
        assert told in true, f"{told} is told {at - changes[0][0]:.2f} s after the first job began, true was {true}"
        if len(true) == 1:
            told_alone.add(told)
    assert told_alone >= {0, slots - 1, slots}


def _free(slots, changes, since, until):
    """The numbers of slots that were free at a time between the two."""
    running = sum(step for at, step in changes if at <= since)
    free = {slots - running}
    for _, step in (change for change in changes if since < change[0] <= until):
        running += step
        free.add(slots - running)
    return free


def test_it_is_said_again_at_each_heartbeat(deploy, listener, mosquitto, worker_id):
    deploy(mosquitto.port, MQTT_HEARTBEAT_INTERVAL="0.5").start_worker("-Q", "add")
    listener.wait_for_capability(worker_id)

    said = len(listener.of_worker(worker_id))
    eventually(lambda: len(listener.of_worker(worker_id)) >= said + 4, 4)

    times = [heard.payload["timestamp"] for heard in listener.of_worker(worker_id)[said:]]
    assert all(350 < later - earlier < 900 for earlier, later in pairwise(times))


def test_a_paused_queue_is_no_capability(deployment, listener, worker_id):
    deployment.start_worker("-Q", "add,total")
    listener.wait_for_capability(worker_id, capabilities=["add", "total"])

    control.pause("add")
    listener.wait_for_capability(worker_id, 4, capabilities=["total"])
    control.resume("add")

    listener.wait_for_capability(worker_id, 4, capabilities=["add", "total"])


@POOLS
def test_a_worker_that_stops_is_draining_and_then_gone(deployment, listener, worker_id, tmp_path, options, slots):
    worker = deployment.start_worker(*options, "-Q", "note")
    job = deployment.task.note.delay(str(tmp_path / "file"), "", 4.0)
    deployment.wait_for(job, "running")
    listener.wait_for_capability(worker_id, idle_count=slots - 1)

    worker.terminate()

    draining = listener.wait_for_capability(worker_id, 1.5, status="draining")
    assert draining["idle_count"] == 0, "though slots may be free"
    assert worker.wait() == 0
    listener.wait_until_gone(worker_id, 2)
    listener.wait_for_change(job, "completed")
    assert "lost" not in worker.log()


def test_an_idle_worker_leaves_without_delay(deployment, listener, worker_id):
    worker = deployment.start_worker("-Q", "add")
    listener.wait_for_capability(worker_id)

    worker.terminate()
    worker.wait()

    listener.wait_until_gone(worker_id, 1)


def test_the_will_clears_it_within_a_second_of_kill_9(deployment, listener, listen, mosquitto, worker_id, tmp_path):
    worker = deployment.start_worker("--concurrency=2", "-Q", "note")
    deployment.task.note.delay(str(tmp_path / "file"), "", 30.0)
    listener.wait_for_capability(worker_id, idle_count=1)

    killed_at = time.time()
    worker.kill9()
    gone = listener.wait_until_gone(worker_id, 1)

    assert gone.at - killed_at < 1
    print(f"the will came {(gone.at - killed_at) * 1000:.0f} ms after kill -9")
    late = listen(mosquitto.port)
    stays(lambda: late.capability(worker_id) is None, 1)


def test_children_that_were_forked_later_do_not_keep_the_will_from_firing(deployment, listener, worker_id, tmp_path):
    worker = deployment.start_worker("--concurrency=2", "-Q", "kill_its_worker,note")
    listener.wait_for_capability(worker_id)
    deployment.wait_for(deployment.task.kill_its_worker.delay(str(tmp_path / "deaths")), "failed")
    deployment.task.note.delay(str(tmp_path / "file"), "", 30.0)
    listener.wait_for_capability(worker_id, idle_count=1)

    killed_at = time.time()
    worker.kill9()

    assert listener.wait_until_gone(worker_id, 1).at - killed_at < 1


def test_the_will_clears_it_when_the_worker_is_stopped_past_the_keepalive(deployment, listener, worker_id):
    worker = deployment.start_worker("-Q", "add")
    listener.wait_for_capability(worker_id)

    worker.signal(signal.SIGSTOP)
    listener.wait_until_gone(worker_id, SILENT_FOR_S)
    worker.signal(signal.SIGCONT)

    listener.wait_for_capability(worker_id, 8)
    assert deployment.task.add.delay(1, 2).get(timeout=20) == 3


def test_it_expires_when_the_broker_comes_back_from_disk(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto("persistence true", "autosave_interval 1", "autosave_on_changes true")
    worker = deploy(broker.port, MQTT_HEARTBEAT_INTERVAL="2").start_worker("-Q", "add")
    listen(broker.port).wait_for_capability(worker_id)
    eventually(lambda: worker_id.encode() in (broker.folder / "mosquitto.db").read_bytes(), 5)

    broker.kill9()  # a broker that is stopped fires the wills
    worker.kill9()
    broker.start()

    listen(broker.port).wait_for_capability(worker_id, 1)

    def is_expired():
        late = listen(broker.port)
        time.sleep(0.2)
        capability = late.capability(worker_id)
        late.close()
        return capability is None

    eventually(is_expired, 9)


def test_a_worker_id_that_is_alive_is_refused(deployment, listener, worker_id):
    deployment.start_worker("-Q", "add")
    listener.wait_for_capability(worker_id)

    second = deployment.start_worker("-Q", "add", ready_timeout_s=0)

    assert second.wait(30) != 0
    assert f"WORKER_ID={worker_id}: a worker of this name is alive" in second.log()
    assert listener.capability(worker_id) is not None
    deployment.stop(second)


def test_what_a_worker_cannot_do_for_lack_of_an_engine_is_not_shown(deployment, listener, worker_id, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'pyvips' else find(name, package)\n"
    )
    plug_ins = install_entry_point(tmp_path / "plug-ins", "tests.acceptance.capabilities")
    worker = deployment.start_worker(env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}:{plug_ins}"})

    capabilities = listener.wait_for_capability(worker_id)["capabilities"]
    assert "add" in capabilities
    assert "image_resize" not in capabilities
    assert "image_resize is not served: pyvips is not installed" in worker.log()


def test_what_a_worker_cannot_do_since_its_engine_is_broken_is_not_shown(deployment, listener, worker_id, tmp_path):
    (tmp_path / "pyvips.py").write_text("raise OSError('cannot load library libvips.so.42')")
    plug_ins = install_entry_point(tmp_path / "plug-ins", "tests.acceptance.capabilities")
    worker = deployment.start_worker(env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}:{plug_ins}"})

    assert "image_resize" not in listener.wait_for_capability(worker_id)["capabilities"]
    assert "image_resize is not served: pyvips can't be used: OSError: cannot load library" in worker.log()


def test_formats_whose_codec_is_missing_are_said_at_the_start(deployment, listener, worker_id, tmp_path):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('libheif.so.1')")
    plug_ins = install_entry_point(tmp_path / "plug-ins", "tests.acceptance.capabilities")
    worker = deployment.start_worker(env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}:{plug_ins}"})

    assert "image_resize" in listener.wait_for_capability(worker_id)["capabilities"]
    (line,) = [line for line in worker.log().splitlines() if "images in heic can't be read and written here" in line]
    assert "media-tasks[heif]" in line
