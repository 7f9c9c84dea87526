"""Passwords, TLS with an own CA, client certificates; secrets from files, and none of them in a log."""

import os
import signal
import subprocess
import time

import pytest

from tasks.sinks.refusals import WAIT_S
from tests.mqtt.certificates import openssl, tls_lines
from tests.mqtt.jobs import check_none_was_blocked, run_jobs
from tests.mqtt.said import debug_log, one_warning, warnings
from tests.tooling.waiting import eventually

pytestmark = pytest.mark.slow

PASSWORD = "hunter2-correct"


@pytest.fixture
def password_broker(private_mosquitto, tmp_path):
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "worker", PASSWORD], check=True, capture_output=True)
    return private_mosquitto(f"password_file {passwords}", allow_anonymous=False)


def knows_the_ca(certificates, *, is_client=False):
    pair = (str(certificates / "client.pem"), str(certificates / "client.key")) if is_client else (None, None)
    return lambda client: client.tls_set(str(certificates / "ca.pem"), *pair)


def check_it_is_back(deployment, worker, listener, worker_id, missed=()):
    """The broker lets the worker in again: it shows itself, tells what it could not tell, and complains no more."""
    known = len(warnings(worker))
    listener.wait_for_capability(worker_id, 20)
    for job in [*missed, deployment.task.add.delay(1, 2)]:
        listener.wait_for_change(job, "completed")
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    assert len(warnings(worker)) == known


def test_a_worker_with_the_password_is_let_in_and_does_not_log_it(deploy, listen, password_broker, worker_id):
    deployment = deploy(password_broker.port, MQTT_USERNAME="worker", MQTT_PASSWORD=PASSWORD)
    worker = deployment.start_worker("-Q", "add", "--loglevel=DEBUG")
    listener = listen(password_broker.port, setup=lambda client: client.username_pw_set("worker", PASSWORD))

    listener.wait_for_capability(worker_id)
    job = deployment.task.add.delay(1, 2)
    listener.wait_for_change(job, "completed")

    assert warnings(worker) == []
    assert PASSWORD not in debug_log(worker)


def test_a_password_that_is_wrong_for_a_while_is_said_and_all_is_told_afterwards(
    deploy, listen, password_broker, worker_id, tmp_path
):
    def set_password(password):
        command = ["mosquitto_passwd", "-b", str(tmp_path / "passwords"), "worker", password]
        subprocess.run(command, check=True, capture_output=True)
        os.kill(password_broker.pid, signal.SIGHUP)  # it also closes the connections of whoever is not let in any more

    # At the start.
    set_password("of another one")
    deployment = deploy(password_broker.port, MQTT_USERNAME="worker", MQTT_PASSWORD=PASSWORD)
    worker = deployment.start_worker("-Q", "add")
    run_jobs(deployment)
    assert "look at MQTT_USERNAME and MQTT_PASSWORD" in one_warning(worker)

    set_password(PASSWORD)

    worker.wait_for_log("is back", 20)
    listener = listen(password_broker.port, setup=lambda client: client.username_pw_set("worker", PASSWORD))
    check_it_is_back(deployment, worker, listener, worker_id)

    # In mid-run.
    set_password("of another one")
    eventually(lambda: len(warnings(worker)) == 2, 20)
    assert "look at MQTT_USERNAME and MQTT_PASSWORD" in warnings(worker)[1]
    missed = [deployment.task.add.delay(number, 1) for number in range(20)]
    assert [job.get(timeout=20) for job in missed] == list(range(1, 21))
    check_none_was_blocked(deployment, missed)
    said = len(listener.of_worker(worker_id))
    worker.signal(signal.SIGSTOP)  # what it told before the listener is back would be heard by nobody
    set_password(PASSWORD)
    listener.wait_until_subscribed()
    worker.signal(signal.SIGCONT)

    eventually(lambda: len(listener.of_worker(worker_id)) > said, 20)
    check_it_is_back(deployment, worker, listener, worker_id, missed)


def acl_broker(private_mosquitto, tmp_path, acl, *users):
    """A broker with an ACL, where each of these users has the same password; and a function that changes the ACL."""
    passwords, path = tmp_path / "passwords", tmp_path / "acl"
    passwords.touch(mode=0o600)
    path.write_text(acl)
    for user in users:
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, PASSWORD], check=True, capture_output=True)
    broker = private_mosquitto(f"password_file {passwords}", f"acl_file {path}", allow_anonymous=False)

    def change(acl):
        path.write_text(acl)
        os.kill(broker.pid, signal.SIGHUP)

    return broker, change


def test_the_events_that_one_worker_may_not_tell_are_told_by_another_one(
    deploy, listen, private_mosquitto, tmp_path, prefix, worker_id
):
    acl = f"user mute\ntopic write {prefix}/workers/#\nuser worker\ntopic readwrite {prefix}/#\n"
    broker, _ = acl_broker(private_mosquitto, tmp_path, acl, "mute", "worker")
    deployment = deploy(broker.port, MQTT_PASSWORD=PASSWORD)
    mute = deployment.start_worker("-Q", "total", env={"MQTT_USERNAME": "mute"})
    eventually(lambda: deployment.app.store.duty_holder("relay"), 10)
    listener = listen(broker.port, setup=lambda client: client.username_pw_set("worker", PASSWORD))
    listener.wait_for_capability(worker_id)
    deployment.start_worker("-Q", "add", env={"MQTT_USERNAME": "worker", "WORKER_ID": f"{worker_id}-2"})

    jobs = [deployment.task.add.delay(number, 1) for number in range(10)]

    for job in jobs:
        listener.wait_for_change(job, "completed")
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    assert "MQTT_TOPIC" in one_warning(mute, quiet_s=1)
    assert listener.capability(worker_id)["idle_count"] >= 1


def test_the_events_that_nobody_may_tell_are_told_when_the_acl_is_mended(
    deploy, listen, private_mosquitto, tmp_path, prefix, worker_id
):
    acl = f"user worker\ntopic read {prefix}/events\ntopic readwrite {prefix}/workers/#\n"
    broker, change_acl = acl_broker(private_mosquitto, tmp_path, acl, "worker")
    deployment = deploy(broker.port, MQTT_USERNAME="worker", MQTT_PASSWORD=PASSWORD)
    worker = deployment.start_worker("-Q", "add")
    listener = listen(broker.port, setup=lambda client: client.username_pw_set("worker", PASSWORD))
    listener.wait_for_capability(worker_id)
    jobs = [deployment.task.add.delay(number, 1) for number in range(10)]
    for job in jobs:
        job.get(timeout=20)
    eventually(lambda: warnings(worker), 10)
    assert listener.events() == []

    change_acl(f"user worker\ntopic readwrite {prefix}/#\n")

    for job in jobs:
        listener.wait_for_change(job, "completed", WAIT_S + 10)
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
    assert len(warnings(worker)) == 1


def test_name_and_password_are_read_from_files(deploy, listen, password_broker, worker_id, tmp_path):
    (tmp_path / "name").write_text("worker\n")
    (tmp_path / "secret").write_text(f"{PASSWORD}\n")
    files = {"MQTT_USERNAME_FILE": tmp_path / "name", "MQTT_PASSWORD_FILE": tmp_path / "secret"}
    worker = deploy(password_broker.port, **files).start_worker("-Q", "add", "--loglevel=DEBUG")

    listener = listen(password_broker.port, setup=lambda client: client.username_pw_set("worker", PASSWORD))

    listener.wait_for_capability(worker_id)
    assert warnings(worker) == []
    assert PASSWORD not in debug_log(worker)


@pytest.mark.parametrize("is_in_files", [False, True])
def test_neither_name_nor_password_is_in_any_log(deploy, private_mosquitto, tmp_path, worker_id, is_in_files):
    """The name is an access token with some brokers."""
    token, acl = "t0k3n-of-a-user", "user another\ntopic readwrite #\n"
    broker, _ = acl_broker(private_mosquitto, tmp_path, acl, token)
    credentials = {"MQTT_USERNAME": token, "MQTT_PASSWORD": PASSWORD}
    if is_in_files:
        for name, secret in list(credentials.items()):
            (tmp_path / name).write_text(secret)
        credentials = {f"{name}_FILE": tmp_path / name for name in credentials}
    deployment = deploy(broker.port, LOG_LEVEL="DEBUG", **credentials)
    mute = deployment.start_worker("-Q", "add")
    wrong = {"MQTT_PASSWORD": f"{PASSWORD}-not", "WORKER_ID": f"{worker_id}-2"}
    refused = deployment.start_worker("-Q", "add", env=wrong | {"MQTT_PASSWORD_FILE": ""})

    run_jobs(deployment, 3)

    assert "let the user of MQTT_USERNAME write MQTT_TOPIC" in one_warning(mute, quiet_s=1)
    assert "look at MQTT_USERNAME and MQTT_PASSWORD" in one_warning(refused, quiet_s=1)
    for worker in (mute, refused):
        worker.terminate()
        worker.wait()
        assert token not in worker.log()
        assert PASSWORD not in worker.log()


@pytest.mark.parametrize("variable", ["MQTT_USERNAME_FILE", "MQTT_PASSWORD_FILE"])
def test_a_secrets_file_that_cannot_be_read_is_said(deploy, password_broker, tmp_path, variable):
    credentials = {"MQTT_USERNAME": "worker", "MQTT_PASSWORD": PASSWORD, variable: tmp_path / "missing"}
    deployment = deploy(password_broker.port, **credentials)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment, 3)
    warning = one_warning(worker, quiet_s=1)
    assert f"{variable}='{tmp_path / 'missing'}' can't be read: No such file or directory" in warning
    assert PASSWORD not in worker.log()


def test_events_and_the_will_come_over_tls_with_a_ca_of_ones_own(
    deploy, listen, private_mosquitto, certificates, worker_id
):
    broker = private_mosquitto(*tls_lines(certificates))
    deployment = deploy(broker.port, MQTT_USE_TLS="on", MQTT_CA_CERT=str(certificates / "ca.pem"))
    worker = deployment.start_worker("--concurrency=2", "-Q", "add,kill_its_worker")
    listener = listen(broker.port, setup=knows_the_ca(certificates))

    listener.wait_for_capability(worker_id)
    job = deployment.task.kill_its_worker.delay(str(certificates / "deaths"))  # children are forked beside it
    listener.wait_for_change(job, "error", 40)
    assert warnings(worker) == []
    killed_at = time.time()
    worker.kill9()
    assert listener.wait_until_gone(worker_id, 1).at - killed_at < 1


def test_children_that_are_forked_all_the_time_do_not_disturb_tls(
    deploy, listen, private_mosquitto, certificates, worker_id
):
    broker = private_mosquitto(*tls_lines(certificates))
    deployment = deploy(broker.port, MQTT_USE_TLS="on", MQTT_CA_CERT=str(certificates / "ca.pem"))
    worker = deployment.start_worker("--concurrency=2", "--max-tasks-per-child=1", "-Q", "add")
    listener = listen(broker.port, setup=knows_the_ca(certificates))
    listener.wait_for_capability(worker_id)

    jobs = [deployment.task.add.delay(number, 1) for number in range(30)]
    for job in jobs:
        listener.wait_for_change(job, "completed", 60)
        assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]

    assert warnings(worker) == []
    assert all(heard.text for heard in listener.of_worker(worker_id))


@pytest.mark.parametrize("is_known_here", [True, False])
def test_a_certificate_of_another_ca_is_not_trusted_and_said(deploy, private_mosquitto, certificates, is_known_here):
    broker = private_mosquitto(*tls_lines(certificates))
    own = {"MQTT_CA_CERT": str(certificates / "another.pem")} if is_known_here else {}
    deployment = deploy(broker.port, MQTT_USE_TLS="on", **own)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment, 3)
    assert "MQTT_CA_CERT" in one_warning(worker)


@pytest.mark.parametrize(("server", "variable"), [("foreign", "MQTT_CA_CERT"), ("elsewhere", "MQTT_BROKER")])
def test_a_certificate_that_is_wrong_for_a_while_is_said_and_all_is_told_afterwards(
    deploy, listen, private_mosquitto, certificates, worker_id, server, variable
):
    (certificates / "other-names").write_text("subjectAltName=DNS:mqtt.example.org\n")
    for name, ca, names in (("foreign", "another", "names"), ("elsewhere", "ca", "other-names")):
        sign = ("x509", "-req", "-in", "server.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial")
        openssl(*sign, "-days", "2", "-extfile", names, "-out", f"{name}.pem", cwd=certificates)
    right = (certificates / "server.pem").read_bytes()
    (certificates / "server.pem").write_bytes((certificates / f"{server}.pem").read_bytes())
    broker = private_mosquitto(*tls_lines(certificates))
    deployment = deploy(broker.port, MQTT_USE_TLS="on", MQTT_CA_CERT=str(certificates / "ca.pem"))
    worker = deployment.start_worker("-Q", "add")
    run_jobs(deployment)
    assert variable in one_warning(worker)

    broker.stop()
    (certificates / "server.pem").write_bytes(right)
    broker.start()

    worker.wait_for_log("is back", 20)
    listener = listen(broker.port, setup=knows_the_ca(certificates))
    check_it_is_back(deployment, worker, listener, worker_id)


def test_tls_on_one_side_only_is_said(deploy, private_mosquitto, certificates, worker_id):
    plain, secret = private_mosquitto(), private_mosquitto(*tls_lines(certificates))
    ca = {"MQTT_CA_CERT": str(certificates / "ca.pem")}
    deployment = deploy(plain.port)
    first = deployment.start_worker("-Q", "add", env={"MQTT_USE_TLS": "on", **ca})
    second = deployment.start_worker("-Q", "add", env={"MQTT_PORT": secret.port, "WORKER_ID": f"{worker_id}-2"})

    for worker in (first, second):
        assert "MQTT_USE_TLS" in one_warning(worker)


def test_only_a_worker_with_a_client_certificate_is_let_in_where_it_is_required(
    deploy, listen, private_mosquitto, certificates, worker_id
):
    broker = private_mosquitto(*tls_lines(certificates, "require_certificate true"))
    files = {"MQTT_CLIENT_CERT": certificates / "client.pem", "MQTT_CLIENT_KEY": certificates / "client.key"}
    deployment = deploy(broker.port, MQTT_USE_TLS="on", MQTT_CA_CERT=str(certificates / "ca.pem"))
    with_it = deployment.start_worker("-Q", "add", env=files)
    without = deployment.start_worker("-Q", "add", env={"WORKER_ID": f"{worker_id}-2"})
    listener = listen(broker.port, setup=knows_the_ca(certificates, is_client=True))

    listener.wait_for_capability(worker_id)
    assert "MQTT_CLIENT_CERT" in one_warning(without)
    assert warnings(with_it) == []
    assert listener.capability(f"{worker_id}-2") is None


def test_a_client_certificate_that_cannot_be_read_is_said(deploy, certificates):
    files = {"MQTT_CA_CERT": certificates / "ca.pem", "MQTT_CLIENT_CERT": certificates / "missing.pem"}
    deployment = deploy(8883, MQTT_USE_TLS="on", **files)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment, 3)
    assert "MQTT_CLIENT_CERT" in one_warning(worker, quiet_s=1)


def test_a_key_with_a_passphrase_asks_nobody(deploy, certificates):
    openssl("rsa", "-aes256", "-passout", "pass:x", "-in", "client.key", "-out", "locked.key", cwd=certificates)
    files = {"MQTT_CLIENT_CERT": certificates / "client.pem", "MQTT_CLIENT_KEY": certificates / "locked.key"}
    deployment = deploy(8883, MQTT_USE_TLS="on", MQTT_CA_CERT=certificates / "ca.pem", **files)
    worker = deployment.start_worker("-Q", "add")

    run_jobs(deployment, 3)
    assert "MQTT_CLIENT_KEY has a passphrase" in one_warning(worker, quiet_s=1)


@pytest.mark.parametrize("host", ["mqtt://worker:hunter2@127.0.0.1", "[::1]"])
def test_a_url_in_the_place_of_the_host_is_not_told(deploy, host):
    deployment = deploy(1883, MQTT_BROKER=host)
    worker = deployment.start_worker("-Q", "add", "--loglevel=DEBUG")

    run_jobs(deployment, 3)
    assert "MQTT_BROKER is a" in one_warning(worker, quiet_s=1)
    assert "hunter2" not in debug_log(worker)
