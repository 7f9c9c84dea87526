"""How workers are run: which queues they take, their names and logs, `inspect`, revoke and Flower."""

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.acceptance.conftest import DEPLOYMENT
from tests.acceptance.deployment import REPOSITORY, deployed, lines
from tests.services import free_port
from tests.tooling.environment import without_settings
from tests.tooling.waiting import eventually

GET = {"timeout": 20}


@pytest.fixture(scope="module")
def deployment(request, module_server_dir, tmp_path_factory):
    with deployed(module_server_dir, tmp_path_factory.mktemp("deployment")) as deployment:
        request.node.stash[DEPLOYMENT] = deployment
        yield deployment


@pytest.fixture(scope="module")
def json_worker(deployment):
    return deployment.start_worker("--concurrency=1", env={"LOG_FORMAT": "json"})


def refused(deployment, *args, **env):
    """Start a worker that must not start; the last line that it says."""
    worker = deployment.start_worker(*args, env=env, ready_timeout_s=0)
    assert worker.wait(30) != 0
    log = worker.log().strip()
    deployment.stop(worker)
    assert "Traceback" not in log
    return log.splitlines()[-1]


def test_an_unknown_capability_is_refused_with_the_nearest_known_one(deployment):
    said = refused(deployment, "-Q", "image_reszie")

    assert said == "Error: -Q: no capability is called image_reszie; did you mean image_resize?"


def test_a_claim_order_of_a_misspelt_queue_is_refused(deployment):
    said = refused(deployment, QUEUE_STRATEGY="image_reszie=LIFO")

    assert said == "Error: QUEUE_STRATEGY: no queue is called image_reszie; did you mean image_resize?"


def test_an_unknown_supported_task_is_refused_too(deployment):
    said = refused(deployment, WORKER_SUPPORTED_TASKS="image_resize,image_konversion")

    assert "WORKER_SUPPORTED_TASKS: no capability is called image_konversion" in said
    assert "did you mean image_conversion?" in said


def test_an_unknown_supported_task_that_is_like_no_other_gets_the_list(deployment):
    said = refused(deployment, WORKER_SUPPORTED_TASKS="xyzzy")

    assert "known: add, " in said
    assert "image_resize" in said


def test_a_name_that_no_table_can_hold_is_refused(deployment):
    assert "must be printable, and 180 characters long at most" in refused(deployment, "-n", "w" * 200)


def test_a_capability_without_its_engine_is_refused_with_the_remedy(deployment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'pyvips' else find(name, package)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])

    said = refused(deployment, "-Q", "image_resize", PYTHONPATH=path)

    assert said == "Error: -Q: image_resize needs pyvips; pip install '.[image]'"


def test_a_worker_that_is_told_to_quit_promises_no_time(deployment):
    worker = deployment.start_worker("-Q", "add", "-c1")

    worker.signal(signal.SIGQUIT)

    assert worker.wait(20) == 0
    assert "SIGQUIT: running jobs are given back at once" in worker.log()


def test_supported_tasks_are_served_and_no_others(deployment):
    worker = deployment.start_worker(env={"WORKER_SUPPORTED_TASKS": "add, total", "WORKER_ID": "few"})

    (row,) = [row for row in deployment.app.live_workers() if row["worker_id"] == "few"]

    assert row["capabilities"] == ["add", "total"]
    deployment.stop(worker)


def test_q_wins_over_supported_tasks(deployment):
    worker = deployment.start_worker("-Q", "total", env={"WORKER_SUPPORTED_TASKS": "add", "WORKER_ID": "one"})

    (row,) = [row for row in deployment.app.live_workers() if row["worker_id"] == "one"]

    assert row["capabilities"] == ["total"]
    worker.terminate()
    assert worker.wait() == 0
    assert "one" not in [row["worker_id"] for row in deployment.app.live_workers()]
    deployment.stop(worker)


def test_every_line_of_a_json_log_is_an_object_with_the_tasks_name_and_id(deployment, json_worker):
    job = deployment.task.secret_keeper.delay("hunter2")
    assert job.get(**GET) == {"answer": "result-of-hunter2"}
    failed = deployment.task.fail.delay(message="on purpose")
    deployment.wait_for(failed, "failed")
    json_worker.wait_for_log(f"fail[{failed.id}] raised")
    os.kill(json_worker.child_pids()[0], signal.SIGKILL)

    log = json_worker.wait_for_log("exited with 'signal 9 (SIGKILL)'")
    text = [line for line in log.splitlines() if line.startswith("{")]
    entries = [json.loads(line) for line in text]
    mine = [entry for entry in entries if entry.get("task_id") == job.id]
    assert {entry["task"] for entry in mine} == {"secret_keeper"}
    assert any("succeeded in" in entry["message"] for entry in mine)
    assert {"time", "level", "logger", "process", "message"} <= set(entries[0])
    after_banner = log[log.index('{"time"') :].splitlines()
    assert [line for line in after_banner if not line.startswith("{")] == []


def test_neither_arguments_nor_results_are_logged(deployment, json_worker):
    job = deployment.task.secret_keeper.delay("hunter2")
    job.get(**GET)
    json_worker.wait_for_log(f"secret_keeper[{job.id}] succeeded")

    assert "hunter2" not in json_worker.log()


def test_arguments_are_not_logged_at_debug_either(server_dir, tmp_path):
    with deployed(server_dir, tmp_path) as own:
        worker = own.start_worker("--concurrency=1", "--loglevel=DEBUG")
        job = own.task.secret_keeper.delay("hunter2")
        job.get(**GET)

        log = worker.wait_for_log(f"secret_keeper[{job.id}] succeeded")

    assert "TaskPool: Apply" in log
    assert "hunter2" not in log


def test_a_password_in_a_url_is_not_shown_by_a_worker_that_cannot_connect(deployment):
    worker = deployment.start_worker(env={"CELERY_BROKER_URL": "amqp://user:hunter2@127.0.0.1:9//"}, ready_timeout_s=0)

    log = worker.wait_for_log("127.0.0.1:9", 20)

    assert "hunter2" not in log
    deployment.stop(worker)


def test_a_password_in_a_database_url_is_not_shown(deployment):
    env = {"DATABASE_URL": "postgresql://user:hunter2@127.0.0.1:9/jobs"}

    done = celery(deployment, "jobs", "list", **env)

    assert done.returncode != 0
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def celery(deployment, *args, **env):
    base = without_settings(os.environ) | {name: str(value) for name, value in deployment.env.items()}
    command = [sys.executable, "-m", "celery", "-A", "tasks", *args]
    return subprocess.run(
        command, cwd=REPOSITORY, env=base | env, capture_output=True, text=True, check=False, timeout=60
    )


def test_inspect_ping_is_answered(deployment, json_worker):
    done = celery(deployment, "inspect", "ping")

    assert done.returncode == 0, done.stderr
    assert "pong" in done.stdout
    assert "1 node online." in done.stdout


def test_registered_tasks_are_those_that_are_declared(deployment, json_worker):
    (names,) = deployment.app.control.inspect(timeout=3).registered().values()

    assert {"image_resize", "image_conversion", "image_renditions", "add"} <= set(names)


@pytest.fixture
def flower(deployment, json_worker, tmp_path):
    """Flower's HTTP API, as `celery -A tasks flower` starts it."""
    pytest.importorskip("flower")
    port = free_port()
    env = without_settings(os.environ) | {name: str(value) for name, value in deployment.env.items()}
    env |= {"FLOWER_UNAUTHENTICATED_API": "true", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}", "--address=127.0.0.1"]
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--db={tmp_path / 'flower'}"], cwd=tmp_path, env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def get(path, method="GET"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        request.add_header("Authorization", "Basic " + base64.b64encode(b"a:b").decode())
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 (our own)
                return json.loads(answer.read() or b"null")
        except OSError:
            assert process.poll() is None, (tmp_path / "flower.log").read_text()
            return None

    try:
        yield get
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_flower_shows_workers_and_tasks_on_the_embedded_broker(deployment, json_worker, flower):
    workers = eventually(lambda: flower("/api/workers?refresh=true"), 30)
    ((node, worker),) = workers.items()
    assert "image_resize" in {queue["name"] for queue in worker["active_queues"]}
    assert "image_resize" in worker["registered"]

    def shown():
        # Events are switched on by Flower at its start; a job from before that is not shown.
        job = deployment.task.add.delay(40, 2)
        job.get(**GET)
        return eventually_shown(flower, job)

    task = eventually(shown, 20)
    assert (task["name"], task["state"], task["worker"]) == ("add", "SUCCESS", node)


def eventually_shown(flower, job):
    try:
        return eventually(
            lambda: (task := flower(f"/api/task/info/{job.id}")) and task["state"] == "SUCCESS" and task, 3
        )
    except AssertionError:
        return None


def test_a_revoke_from_flower_writes_the_row(deployment, json_worker, flower, tmp_path):
    eventually(lambda: flower("/api/workers?refresh=true"), 30)
    blocker = deployment.task.note.delay("/dev/null", "", 3.0)
    job = deployment.task.note.delay(str(tmp_path / "never"))

    flower(f"/api/task/revoke/{job.id}", method="POST")

    assert deployment.wait_for(job, "cancelled")["error_type"] == "TaskRevokedError"
    blocker.get(**GET)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("strategy", "order"), [("note=LIFO", "cba"), ("note=FIFO", "abc"), ("*=PRIORITY", "bac")])
def test_a_worker_takes_jobs_in_the_order_that_is_set(server_dir, tmp_path, strategy, order):
    with deployed(server_dir, tmp_path, {"QUEUE_STRATEGY": strategy}) as own:
        jobs = [
            own.task.note.apply_async((str(tmp_path / "runs"), name), priority=9 if name == "b" else 5)
            for name in "abc"
        ]
        own.start_worker("--concurrency=1", "-Q", "note")
        for job in jobs:
            job.get(timeout=20)

    assert [line.split()[-1] for line in lines(tmp_path / "runs", "begin")] == list(order)
