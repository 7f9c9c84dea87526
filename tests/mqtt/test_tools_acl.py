"""docker/mosquitto: the configuration starts, and its ACL lets each user do what it has to, and nothing else."""

import re
import subprocess
from pathlib import Path

import pytest

from tasks.settings import read_settings
from tasks.sinks import topics
from tests.mqtt.said import one_warning, warnings
from tests.mqtt.tools import event
from tests.services import PrivateMosquitto, free_port
from tests.tooling.waiting import stays

FOLDER = Path(__file__).parents[2] / "docker" / "mosquitto"
USERS = ("worker-1", "worker-2", "monitor")
SETTINGS = read_settings({"HOME": "/home/x"})
EVENTS = SETTINGS.mqtt_topic


def own(worker_id):
    return topics.capability_topic(SETTINGS.capability_topic_prefix, worker_id)


class Shipped(PrivateMosquitto):
    """A broker with the configuration of docker/mosquitto: as it is, or with its options switched on."""

    def __init__(self, *options):
        super().__init__()
        self._options = options

    def prepare(self):
        (self.folder / "data").mkdir(exist_ok=True)
        text = (FOLDER / "mosquitto.conf").read_text()
        for option in self._options:
            text, found = re.subn(rf"^#({option} )", r"\1", text, flags=re.MULTILINE)
            assert found == 1, f"#{option} stands once in mosquitto.conf"
        if self._options:
            text = text.replace("allow_anonymous true", "allow_anonymous false")
        text = text.replace("/mosquitto/config/", f"{self.folder}/").replace("/mosquitto/data", f"{self.folder}/data")
        text = text.replace("listener 1883\n", f"listener {self.port} 127.0.0.1\nuser root\n")
        (self.folder / "mosquitto.conf").write_text(text)
        for name, content in {"acl": (FOLDER / "acl").read_text(), "passwd": ""}.items():
            (self.folder / name).write_text(content)
            (self.folder / name).chmod(0o600)
        for user in USERS:
            self.run("mosquitto_passwd", "-b", self.folder / "passwd", user, f"password of {user}")


@pytest.fixture
def ship(mosquitto_server):
    """`ship("option", ...)`; the program is there, or the tests have been skipped."""
    servers = []

    def start(*options):
        servers.append(Shipped(*options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.remove()


@pytest.fixture
def as_user(ship, tools_for):
    """`as_user("worker-1")`: the commands as this user, on one broker with users and ACL."""
    server = ship("password_file", "acl_file")

    def tools(user, **env):
        credentials = {"MQTT_USERNAME": user, "MQTT_PASSWORD": f"password of {user}", "WORKER_ID": user}
        topics_ = {"MQTT_TOPIC": EVENTS, "CAPABILITY_TOPIC_PREFIX": SETTINGS.capability_topic_prefix}
        return tools_for(server.port, **credentials | topics_ | env)

    return tools


@pytest.fixture
def publish(as_user):
    """`publish("worker-1", topic)`: whether the broker takes a message of this user."""
    from tasks.cli.mqtt_connection import Connection, Refused

    def sent(user, topic, *, client_id="", is_retained=False):
        with Connection(as_user(user).settings, client_id=client_id) as connection:
            try:
                connection.publish(topic, "x", is_retained=is_retained)
            except Refused:
                return False
            return True

    return sent


@pytest.fixture
def receives(as_user):
    """`receives("worker-1", topic)`: whether this user is given what one who may publishes there."""
    from tasks.cli.mqtt_connection import Connection

    def got(user, topic, sender):
        with (
            Connection(as_user(user).settings) as reader,
            Connection(as_user(sender).settings) as writer,
        ):
            reader.subscribe(topic)
            reader.subscribe("#")
            writer.publish(topic, "x")
            return reader.next(0.3) is not None

    return got


def test_the_configuration_as_it_is_lets_a_worker_work(ship, tools_for):
    result = tools_for(ship().port).mqtt("check")

    assert result.exit_code == 0, result.output


def test_its_options_are_all_mosquittos_own(ship):
    """Mosquitto refuses a file with a word that it does not know."""
    switched = set(re.findall(r"^#([a-z_]+) ", (FOLDER / "mosquitto.conf").read_text(), re.MULTILINE))

    assert switched == {
        "password_file", "acl_file", "listener", "cafile", "certfile", "keyfile", "tls_version",
        "require_certificate", "use_identity_as_username",
    }  # fmt: skip


def test_with_tls_and_client_certificates_the_name_in_the_certificate_is_the_user(tmp_path, tools_for, ship):
    port = free_port()

    class Tls(Shipped):
        def prepare(self):
            super().prepare()
            conf = self.folder / "mosquitto.conf"
            conf.write_text(conf.read_text().replace("listener 8883", f"listener {port} 127.0.0.1"))
            certs = self.folder / "certs"
            certs.mkdir()
            new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            by = ["-CA", "ca.crt", "-CAkey", "ca.key"]
            for name, subject, signer in (("ca", "ca", []), ("server", "localhost", by), ("worker", "worker-1", by)):
                names = ["-addext", "subjectAltName=IP:127.0.0.1"] if signer else []
                files = ["-subj", f"/CN={subject}", "-keyout", f"{name}.key", "-out", f"{name}.crt"]
                subprocess.run([*new, *names, *signer, *files], cwd=certs, check=True, capture_output=True)

    tls = (
        "listener",
        "cafile",
        "certfile",
        "keyfile",
        "tls_version",
        "require_certificate",
        "use_identity_as_username",
    )
    server = Tls("acl_file", *tls)
    try:
        server.start()
        certs = server.folder / "certs"
        env = {
            "MQTT_USE_TLS": "on", "MQTT_CA_CERT": certs / "ca.crt", "MQTT_CLIENT_CERT": certs / "worker.crt",
            "MQTT_CLIENT_KEY": certs / "worker.key", "CAPABILITY_TOPIC_PREFIX": SETTINGS.capability_topic_prefix,
        }  # fmt: skip
        assert tools_for(port, **env, WORKER_ID="worker-1").mqtt("check").exit_code == 0
        refused = tools_for(port, **env, WORKER_ID="worker-2").mqtt("check")
        assert refused.exit_code == 1
        assert "publish   failed" in refused.stdout
    finally:
        server.remove()


# Workers


def test_a_worker_writes_its_own_topics_and_events(publish):
    assert publish("worker-1", own("worker-1"), is_retained=True)
    assert publish("worker-1", EVENTS)


@pytest.mark.parametrize(
    "topic",
    [own("worker-2"), f"{own('worker-2')}/check", own("monitor"), f"{EVENTS}/x", "inference/workers", "other/thing"],
)
def test_a_worker_writes_nothing_else_whatever_it_calls_itself(publish, topic):
    assert not publish("worker-1", topic)
    assert not publish("worker-1", topic, client_id="worker-2", is_retained=True)


def test_a_worker_reads_neither_events_nor_the_topics_of_workers(receives):
    assert not receives("worker-1", EVENTS, "worker-2")
    assert not receives("worker-1", own("worker-2"), "worker-2")
    assert not receives("worker-1", own("worker-1"), "worker-1")


def test_the_will_of_a_worker_is_under_the_same_rule(as_user):
    from tasks.cli.mqtt_connection import Connection

    worker, monitor = as_user("worker-1").settings, as_user("monitor").settings
    with Connection(monitor) as reader:
        reader.subscribe("inference/workers/+")
        for topic in (own("worker-2"), own("worker-1")):
            with Connection(worker, will_topic=topic, will="lost") as lost:
                lost.vanish()

        arrived = reader.next(5)
        assert arrived is not None
        assert arrived.topic == own("worker-1")
        assert reader.next(0.3) is None


def test_check_tells_a_worker_whose_name_is_not_its_user(as_user):
    assert as_user("worker-1").mqtt("check").exit_code == 0

    result = as_user("worker-1", WORKER_ID="worker-2").mqtt("check")

    assert result.exit_code == 1
    assert re.search(r"publish   failed .*look at its ACL, MQTT_USERNAME and WORKER_ID", result.stdout)


@pytest.fixture
def deploy_as(as_user, deploy):
    """`deploy_as("worker-1", worker_id)`: a deployment whose worker is this user of the broker with users and ACL."""

    def start(user, worker_id):
        settings = as_user(user, WORKER_ID=worker_id)
        return deploy(settings.settings.mqtt_port, **{n: settings.env[n] for n in settings.env if n != "CL_SERVER_DIR"})

    return start


@pytest.fixture
def monitoring(as_user, listen):
    """What the user monitor hears of all that is published."""
    settings = as_user("monitor").settings
    return listen(
        settings.mqtt_port,
        prefix=EVENTS.partition("/")[0],
        setup=lambda client: client.username_pw_set(settings.mqtt_username, settings.mqtt_password),
    )


@pytest.mark.slow
def test_a_real_worker_is_heard_by_the_monitor_until_it_is_killed(deploy_as, monitoring):
    deployment = deploy_as("worker-1", "worker-1")
    worker = deployment.start_worker("--concurrency=2", "-Q", "add,report")

    shown = monitoring.wait_for_capability("worker-1", 20)
    assert shown["capabilities"] == ["add", "report"]
    assert shown["idle_count"] == 2
    job, reporting = deployment.task.add.delay(40, 2), deployment.task.report.delay(2.0)
    for one in (job, reporting):
        monitoring.wait_for_change(one, "completed")
        kinds = [change["event_type"] for change in monitoring.changes(one)]
        assert kinds == ["queued", "processing", "processing", "completed"]
    assert monitoring.changes(job)[-1]["data"] == {"result": 42}
    assert 40.0 in [event["progress"] for event in monitoring.events(reporting)]
    assert warnings(worker) == []

    worker.kill9()

    monitoring.wait_until_gone("worker-1", 5)
    assert {heard.topic for heard in monitoring.heard} == {own("worker-1"), EVENTS}


@pytest.mark.slow
def test_a_real_worker_whose_name_is_not_its_user_is_not_shown_and_says_so(deploy_as, monitoring):
    deployment = deploy_as("worker-1", "worker-2")
    worker = deployment.start_worker("-Q", "add")

    monitoring.wait_for_change(deployment.task.add.delay(1, 2), "completed")
    assert "refuses messages" in one_warning(worker, quiet_s=1)
    worker.kill9()

    stays(lambda: {heard.topic for heard in monitoring.heard} == {EVENTS}, 1)


# Those who watch


def test_a_monitor_reads_events_and_workers(receives):
    assert receives("monitor", EVENTS, "worker-1")
    assert receives("monitor", own("worker-1"), "worker-1")


@pytest.mark.parametrize("topic", [EVENTS, own("worker-1"), own("monitor"), f"{own('monitor')}/check", "other/thing"])
def test_a_monitor_writes_nothing_whatever_it_calls_itself(publish, topic):
    assert not publish("monitor", topic)
    assert not publish("monitor", topic, client_id="worker-1", is_retained=True)


def test_a_monitors_cleanup_and_replay_are_refused_in_a_word(as_user, publish):
    assert publish("worker-1", own("worker-1"), is_retained=True)
    monitor = as_user("monitor")
    monitor.job("8af269fb")

    result = monitor.mqtt("cleanup", "inference/#")
    assert result.exit_code == 1
    assert result.stdout == "0 retained messages cleared\n"
    assert f"does not let this user publish to {own('worker-1')}" in result.stderr
    assert "does not let this user publish" in monitor.error("replay", "--job", "8af269fb", "--publish")


def test_nobody_without_a_name_is_let_in(as_user):
    assert "set MQTT_USERNAME" in as_user("monitor", MQTT_USERNAME="").error("workers")


def test_a_monitor_follows_a_worker_with_the_commands(as_user, publish):
    monitor = as_user("monitor")
    watching = monitor.start("watch", "--count", "1", "--timeout", "20")
    watching.line("err")
    from tasks.cli.mqtt_connection import Connection

    with Connection(as_user("worker-1").settings, client_id="worker-1") as worker:
        import json

        worker.publish(own("worker-1"), topics.capability("worker-1", ["x"], 1, is_draining=False), is_retained=True)
        worker.publish(EVENTS, json.dumps(event("8af269fb", 1, "created")))

    assert watching.wait() == 0
    assert "worker-1  idle" in monitor.mqtt("workers").stdout
