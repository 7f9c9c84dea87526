"""MQTT is never in the way: jobs run whatever the broker does, each outage is said once, and all is said after it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.acceptance.deployment import install_entry_point
from tests.mqtt.certificates import tls_lines
from tests.mqtt.jobs import check_none_was_blocked, run_jobs
from tests.mqtt.listener import SILENT_FOR_S
from tests.mqtt.road import Road
from tests.mqtt.said import debug_log, one_warning, warnings
from tests.services import free_port
from tests.tooling.waiting import eventually, stays
from tests.tooling.worker import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_broker_that_is_absent_at_the_start_is_said_once_and_found_when_it_comes(
    deploy, listen, private_mosquitto, worker_id
):
    port = free_port()
    deployment = deploy(port)
    worker = deployment.start_worker("-Q", "add")
    run_jobs(deployment)
    warning = one_warning(worker)
    assert f"127.0.0.1:{port}" in warning
    assert "MQTT_BROKER and MQTT_PORT" in warning
    assert "Connection refused" in warning

    private_mosquitto(port=port)

    listener = listen(port)
    listener.wait_for_capability(worker_id, 10)
    job = deployment.task.add.delay(1, 2)
    listener.wait_for_change(job, "completed")
    worker.wait_for_log("is back")
    assert len(warnings(worker)) == 1


def test_a_broker_that_goes_and_comes_back_twice_is_said_once_each_time(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)

    for times in (1, 2):
        broker.kill9()
        worker.wait_for_log("is lost")
        run_jobs(deployment)
        eventually(lambda times=times: len(warnings(worker)) == times, 10)
        stays(lambda times=times: len(warnings(worker)) == times, 2)
        broker.start()
        said = len(listener.of_worker(worker_id))
        eventually(lambda said=said: len(listener.of_worker(worker_id)) > said, 12)
        assert len(warnings(worker)) == times

    assert all("MQTT_BROKER" in warning for warning in warnings(worker))
    assert listener.wait_for_capability(worker_id)["idle_count"] >= 1


def test_a_frozen_broker_slows_no_job_and_costs_no_memory(deploy, listen, private_mosquitto, worker_id):
    # Thousands of events come at once when it is back; Mosquitto drops what a subscriber has waiting above 1000.
    broker = private_mosquitto("max_queued_messages 0")
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=2", "-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)
    run_jobs(deployment, 200)
    before_s, before = run_jobs(deployment, 200), _memory_mib(worker.pid)

    broker.pause()
    frozen_s = sum(run_jobs(deployment, 200) for _ in range(3)) / 3
    eventually(lambda: any("is lost" in line for line in warnings(worker)), 20)
    last = [deployment.task.add.delay(number, 2) for number in range(300)]
    for job in last:
        assert job.get(timeout=30)
    check_none_was_blocked(deployment, last)
    stays(lambda: len(warnings(worker)) == 1, 6)
    assert _memory_mib(worker.pid) - before < 20
    assert frozen_s < 2 * before_s + 1

    broker.resume()
    listener.wait_until_subscribed()
    for job in last:
        assert listener.wait_for_change(job, "completed", 40)
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    idle = listener.wait_for_capability(worker_id, 10, idle_count=2)
    assert time.time() * 1000 - idle["timestamp"] < 60_000


@pytest.mark.parametrize(("leave", "come_back"), [("pause", "resume"), ("stop", "start")])
def test_large_results_cost_no_memory_while_the_broker_is_away(
    deploy, listen, private_mosquitto, worker_id, leave, come_back
):
    from tests.mqtt import capabilities

    broker = private_mosquitto("max_queued_messages 0")
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=1", "-Q", "weigh", plug_in=capabilities.__name__)
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)
    listener.wait_for_change(capabilities.weigh.delay(60_000), "completed")

    before = _memory_mib(worker.pid)

    getattr(broker, leave)()
    last = _run_with_large_results(deployment)
    _check_memory(worker, before)
    getattr(broker, come_back)()

    listener.wait_until_subscribed()
    listener.wait_for_change(last, "completed", 60)


@pytest.mark.parametrize("obstacle", ["closed port", "wrong password", "wrong certificate", "slow road"])
def test_large_results_cost_no_memory_while_the_broker_is_hard_to_reach(
    deploy, private_mosquitto, certificates, obstacle
):
    from tests.mqtt import capabilities

    tls = {}
    with contextlib.ExitStack() as stack:
        match obstacle:
            case "closed port":
                port = free_port()
            case "wrong password":
                port = private_mosquitto(allow_anonymous=False).port
            case "wrong certificate":
                port = private_mosquitto(*tls_lines(certificates)).port
                tls = {"MQTT_USE_TLS": "on", "MQTT_CA_CERT": certificates / "another.pem"}
            case "slow road":
                port = stack.enter_context(Road(private_mosquitto().port, bytes_per_s=200_000)).port
        deployment = deploy(port, MQTT_USERNAME="worker", MQTT_PASSWORD="hunter2-wrong", **tls)
        worker = deployment.start_worker("--concurrency=1", "-Q", "weigh", plug_in=capabilities.__name__)
        capabilities.weigh.delay(60_000).get(timeout=20)
        if obstacle == "slow road":
            worker.wait_for_log("this worker tells the events")
        before = _memory_mib(worker.pid)

        _run_with_large_results(deployment)

        _check_memory(worker, before)
        if obstacle == "wrong certificate":
            assert "MQTT_CA_CERT" in one_warning(worker)


def _run_with_large_results(deployment):
    """The last one of many jobs."""
    from tests.mqtt import capabilities

    jobs = [capabilities.weigh.delay(60_000) for _ in range(800)]  # 48 MB
    jobs[-1].get(timeout=60)
    check_none_was_blocked(deployment, jobs)
    return jobs[-1]


def _check_memory(worker, before_mib):
    more_mib = _memory_mib(worker.pid) - before_mib
    print(f"{more_mib:.0f} MiB more")
    assert more_mib < 15  # these brokers take 20 at a time


def _memory_mib(pid):
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_the_capability_after_a_frozen_broker_is_the_present_one(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=2", "-Q", "note")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id, idle_count=2)

    broker.pause()
    job = deployment.task.note.delay("/dev/null", "", 2.0)
    deployment.wait_for(job, "completed")
    eventually(lambda: any("is lost" in line for line in warnings(worker)), 20)
    stays(lambda: len(warnings(worker)) == 1, 4)  # it tries to come back, and is not answered
    broker.resume()

    listener.wait_until_subscribed()
    listener.wait_for_change(job, "completed", 20)
    eventually(lambda: listen(broker.port).wait_for_capability(worker_id, 5)["idle_count"] == 2, 10)


def test_a_broker_that_takes_the_connection_and_says_nothing_is_said_and_delays_no_stop(deploy, worker_id):
    with socket.create_server(("127.0.0.1", 0)) as server:
        deployment = deploy(server.getsockname()[1])
        worker = deployment.start_worker("-Q", "add")

        run_jobs(deployment)

        warning = one_warning(worker, within_s=15, quiet_s=8)
        assert "does not answer" in warning
        assert "MQTT_PORT" in warning
        started = time.monotonic()
        worker.terminate()
        assert worker.wait() == 0
        assert time.monotonic() - started < 8


def test_a_broker_that_is_frozen_at_the_start_is_said_once_and_found_when_it_goes_on(
    deploy, listen, private_mosquitto, worker_id
):
    broker = private_mosquitto()
    broker.pause()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("--concurrency=2", "-Q", "add")
    run_jobs(deployment)
    assert "does not answer" in one_warning(worker, within_s=15, quiet_s=8)

    broker.resume()

    listener = listen(broker.port)
    listener.wait_for_capability(worker_id, 20, idle_count=2)
    listener.wait_for_change(deployment.task.add.delay(3, 4), "completed", 20)
    worker.wait_for_log("is back")
    stays(lambda: len(warnings(worker)) == 1, 3)
    late = listen(broker.port)
    assert late.wait_for_capability(worker_id)["idle_count"] == 2


def test_a_slow_broker_delays_events_and_no_job(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    with Road(broker.port, bytes_per_s=20_000) as road:
        deployment = deploy(road.port)
        worker = deployment.start_worker("--concurrency=2", "-Q", "add")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id, 20)

        assert run_jobs(deployment, 100) < 20

        job = deployment.task.add.delay(0, 0)
        listener.wait_for_change(job, "completed", 40)
        assert warnings(worker) == []


def test_a_network_that_is_lost_without_a_word_blocks_no_job_and_all_is_told_afterwards(
    deploy, listen, private_mosquitto, worker_id
):
    broker = private_mosquitto()
    with Road(broker.port) as road:
        deployment = deploy(road.port)
        worker = deployment.start_worker("--concurrency=2", "-Q", "add")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id)
        listener.wait_for_change(deployment.task.add.delay(0, 0), "completed")

        road.lose()
        jobs = [deployment.task.add.delay(number, 1) for number in range(20)]
        for job in jobs:
            assert job.get(timeout=20)
        check_none_was_blocked(deployment, jobs)
        listener.wait_until_gone(worker_id, SILENT_FOR_S)
        eventually(lambda: warnings(worker), 20)
        stays(lambda: len(warnings(worker)) == 1, 8)
        road.mend()

        listener.wait_for_capability(worker_id, 20, idle_count=2)
        for job in jobs:
            listener.wait_for_change(job, "completed")
            assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
        assert "MQTT_BROKER" in one_warning(worker, quiet_s=1)


def test_a_client_that_takes_the_name_of_a_worker_starts_no_war(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)

    with namesake(broker.port, worker_id) as thrown_off:
        warning = one_warning(worker, within_s=20, quiet_s=10)  # it tries it once more, after five seconds
        times = len(thrown_off)
        assert 1 <= times <= 4
        stays(lambda: len(thrown_off) == times, 8)

    assert f"another MQTT client takes the connection of WORKER_ID={worker_id}; give each worker its own" in warning
    run_jobs(deployment)


def test_quick_restarts_of_the_broker_are_no_namesake(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)

    for _ in range(4):
        said = len(listener.of_worker(worker_id))
        broker.kill9()
        broker.start()
        eventually(lambda said=said: len(listener.of_worker(worker_id)) > said, 10)
        listener.wait_for_change(deployment.task.add.delay(1, 2), "completed")
        stays(lambda: not any("another MQTT client" in warning for warning in warnings(worker)), 4)


@contextlib.contextmanager
def namesake(port, client_id):
    """Another client with this id, which comes back at once; the list has an item for each time it is thrown off."""
    thrown_off = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
    client.reconnect_delay_set(1, 1)
    client.on_disconnect = lambda *_: thrown_off.append(time.monotonic())
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield thrown_off
    finally:
        client.disconnect()
        client.loop_stop()


def test_a_worker_comes_back_when_its_namesake_has_left(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    deployment = deploy(broker.port)
    worker = deployment.start_worker("-Q", "add")
    listener = listen(broker.port)
    listener.wait_for_capability(worker_id)

    with namesake(broker.port, worker_id):
        listener.wait_until_gone(worker_id, 5)

    listener.wait_for_capability(worker_id, 10)
    assert warnings(worker) == []


def test_the_events_of_a_stopped_relay_are_told_by_another_one(deploy, listener, mosquitto, worker_id):
    deployment = deploy(mosquitto.port, LEASE_RENEW_S="0.5", LEASE_TIMEOUT_S="3")
    first = deployment.start_worker("-Q", "total")
    eventually(lambda: deployment.app.store.duty_holder("relay"), 10)
    deployment.start_worker("-Q", "add", env={"WORKER_ID": f"{worker_id}-2"})

    first.signal(signal.SIGSTOP)
    while_stopped = deployment.task.add.delay(1, 2)
    listener.wait_for_change(while_stopped, "completed", 10)
    first.signal(signal.SIGCONT)

    after = deployment.task.add.delay(3, 4)
    listener.wait_for_change(after, "completed", 10)
    for job in (while_stopped, after):
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
@pytest.mark.parametrize("credentials", [{}, {"MQTT_USERNAME": "worker", "MQTT_PASSWORD": "hunter2-wrong"}])
def test_a_broker_that_refuses_the_password_is_said_without_it(deploy, private_mosquitto, credentials, level):
    broker = private_mosquitto(allow_anonymous=False)
    deployment = deploy(broker.port, **credentials)
    worker = deployment.start_worker("-Q", "add", f"--loglevel={level}")

    run_jobs(deployment)

    warning = one_warning(worker)
    assert "MQTT_USERNAME and MQTT_PASSWORD" in warning
    assert "Not authorized" in warning
    assert "hunter2" not in (debug_log(worker) if level == "DEBUG" else worker.log())


def test_a_reason_that_another_one_has_hidden_is_said_too(deploy, private_mosquitto):
    port = free_port()
    deployment = deploy(port, MQTT_USERNAME="worker", MQTT_PASSWORD="hunter2-wrong")
    worker = deployment.start_worker("-Q", "add")
    assert "Connection refused" in one_warning(worker, quiet_s=1)

    broker = private_mosquitto(port=port, allow_anonymous=False)
    eventually(lambda: len(warnings(worker)) == 2, 15)
    assert "MQTT_USERNAME and MQTT_PASSWORD" in warnings(worker)[1]
    broker.stop()
    stays(lambda: len(warnings(worker)) == 2, 6, lambda: f"two warnings, not {warnings(worker)}")


def test_what_cannot_be_used_leaves_the_worker_without_mqtt(deploy, tmp_path):
    deployment = deploy(8883, MQTT_USE_TLS="on", MQTT_CA_CERT=str(tmp_path / "missing.pem"))
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment)

    warning = one_warning(worker, quiet_s=2)
    assert f"MQTT_CA_CERT='{tmp_path / 'missing.pem'}' can't be used" in warning
    assert "without MQTT until it is restarted" in warning
    worker.terminate()
    assert worker.wait() == 0


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".example"])
def test_a_host_that_is_none_is_said_by_its_variable(deploy, host):
    deployment = deploy(1883, MQTT_BROKER=host)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment)

    warning = one_warning(worker, quiet_s=2)
    assert f"MQTT_BROKER='{host}'" in warning
    assert "Traceback" not in worker.log()


def test_a_broker_that_takes_no_events_from_this_client_is_said(deploy, listen, private_mosquitto, tmp_path, worker_id):
    acl = tmp_path / "acl"
    acl.write_text("topic read #\n")
    broker = private_mosquitto(f"acl_file {acl}")
    deployment = deploy(broker.port)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment)

    warning = one_warning(worker, quiet_s=2)
    assert "MQTT_TOPIC" in warning


def test_noop_loads_no_mqtt_code(deployment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: print('LOADED ' + str([m for m in sys.modules if 'paho' in m"
        " or m.startswith(('tasks.sinks', 'tasks.broadcast', 'tasks.relay', 'tasks.cli.mqtt_'))]),"
        " file=sys.__stderr__, flush=True))\n"
    )
    plug_ins = install_entry_point(tmp_path / "plug-ins", "tests.acceptance.capabilities")
    path = f"{tmp_path}:{REPOSITORY}:{plug_ins}"
    worker = deployment.start_worker("-Q", "add", env={"BROADCAST_TYPE": "noop", "PYTHONPATH": path})
    run_jobs(deployment, 3)

    worker.terminate()

    assert worker.wait() == 0
    assert "LOADED []" in worker.log()
    assert deployment.app.store.duty_holder("relay") is None


def test_a_producer_loads_no_mqtt_code():
    code = "import sys, tasks; print([m for m in sys.modules if 'paho' in m or 'sinks' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_an_idle_worker_that_relays_costs_next_to_nothing(deployment, listener, worker_id):
    worker = deployment.start_worker("--concurrency=1", "-Q", "add")
    listener.wait_for_capability(worker_id)
    run_jobs(deployment, 3)
    time.sleep(2)

    before, started = _cpu_s(worker.pid), time.monotonic()
    time.sleep(10)
    share = (_cpu_s(worker.pid) - before) / (time.monotonic() - started)

    print(f"an idle worker's main process takes {share:.2%} of a CPU")
    assert share < 0.03  # the figure, under one percent, is that of `make bench`: other tests may run beside this one


def _cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
