"""`mqtt check`, and what every MQTT command says when the broker can't be used: one line that names the variable."""

import re
import socket
import subprocess

import pytest

from tests.services import free_port
from tests.tooling.waiting import eventually

PASSWORD = "s3cret-and-long"
COMMANDS = ("watch", "workers", "cleanup mt/#", "replay --since 1h --publish")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """ca, server (for 127.0.0.1), elsewhere (for another name), client and stranger: each a .pem and a .key."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-addext"]

    def make(name, names, signer=None):
        by = ["-CA", f"{signer}.pem", "-CAkey", f"{signer}.key"] if signer else []
        files = ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run(
            ["openssl", "req", "-x509", *new, names, *by, *files], cwd=folder, check=True, capture_output=True
        )

    for ca in ("ca", "stranger"):
        make(ca, "keyUsage=critical,keyCertSign")
    make("server", "subjectAltName=IP:127.0.0.1,DNS:localhost", "ca")
    make("elsewhere", "subjectAltName=DNS:mqtt.example.org", "ca")
    make("client", "subjectAltName=DNS:client", "ca")
    return folder


@pytest.fixture
def secure(private_mosquitto, certificates, tools_for):
    """`secure(server="server", more=(...), **env)`: the commands on a TLS broker."""

    def start(server="server", more=(), **env):
        files = {"cafile": "ca.pem", "certfile": f"{server}.pem", "keyfile": f"{server}.key"}
        broker = private_mosquitto(*(f"{name} {certificates / file}" for name, file in files.items()), *more)
        return tools_for(broker.port, **{"MQTT_USE_TLS": "on", "MQTT_CA_CERT": certificates / "ca.pem"} | env)

    return start


@pytest.fixture
def guarded(private_mosquitto, tools_for, tmp_path):
    """`guarded(**env)`: the commands on a broker with a password for `worker`, and with an ACL if `acl` is given."""

    def start(acl="topic readwrite #", **env):
        passwords, rules = tmp_path / "passwords", tmp_path / "acl"
        passwords.touch(mode=0o600)
        rules.touch(mode=0o600)
        rules.write_text(f"user worker\n{acl}\n")
        subprocess.run(["mosquitto_passwd", "-b", passwords, "worker", PASSWORD], check=True, capture_output=True)
        broker = private_mosquitto(f"password_file {passwords}", f"acl_file {rules}", allow_anonymous=False)
        return tools_for(broker.port, **{"MQTT_USERNAME": "worker", "MQTT_PASSWORD": PASSWORD} | env)

    return start


def steps(tools):
    """{step: the rest of its line}, and the exit code."""
    result = tools.mqtt("check")
    assert PASSWORD not in result.output
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()}, result.exit_code


def failure(tools, *, is_real=False):
    """The last step, which failed: its name and why. A real process: paho leaves sockets to the garbage collector
    when a handshake fails.
    """
    if is_real:
        checking = tools.start("check")
        code = checking.wait()
        done = {line.split()[0]: line.split(maxsplit=1)[1] for line in checking.rest()}
    else:
        done, code = steps(tools)
    *before, (last, said) = done.items()
    assert code == 1
    assert all(text.startswith("ok ") for _, text in before)
    assert said.startswith("failed  ")
    return last, said.removeprefix("failed  ")


# A broker that can be used


def test_every_step_is_told(tools):
    done, code = steps(tools)

    events = done.pop("events")
    assert code == 0
    assert list(done) == ["connect", "publish", "receive", "will"]
    assert all(re.match(r"ok .* \d+ ms$", text) for text in done.values())
    assert events.startswith(f"untried  whether this user may publish to {tools.settings.mqtt_topic} (MQTT_TOPIC)")
    assert f"127.0.0.1:{tools.settings.mqtt_port}, MQTT 5, without a user name" in done["connect"]


def test_what_others_hear_of_it_are_probes(tools, listener):
    assert steps(tools)[1] == 0

    eventually(lambda: len(listener.heard) == 2, message=lambda: str(listener.heard))
    assert {heard.topic for heard in listener.heard} == {f"{tools.prefix}/workers/worker-1/check"}
    assert {(heard.qos, heard.is_retained) for heard in listener.heard} == {(1, False)}


def test_it_leaves_nothing_and_nobody_takes_it_for_a_worker(tools):
    watching = tools.start("watch", "--timeout", "3")
    watching.line("err")

    steps(tools)

    assert tools.mqtt("cleanup", f"{tools.prefix}/#").stdout == "0 retained messages cleared\n"
    assert tools.mqtt("workers", "--json").stdout == ""
    assert watching.wait() == 0
    assert watching.rest() == []


def test_it_passes_with_a_password_and_over_tls(guarded, secure, certificates):
    assert steps(guarded())[1] == 0
    client = {"MQTT_CLIENT_CERT": certificates / "client.pem", "MQTT_CLIENT_KEY": certificates / "client.key"}
    done, code = steps(secure(more=["require_certificate true"], **client))
    assert code == 0, done
    assert ", TLS," in done["connect"]


def test_a_real_command_ends_with_code_1_at_the_first_failure(tools_for):
    checking = tools_for(free_port()).start("check")

    assert checking.wait() == 1
    (line,) = checking.rest()
    assert line.startswith("connect   failed  no MQTT broker can be reached at 127.0.0.1:")
    assert checking.rest("err") == []


def test_noop_is_remarked(tools_for, mosquitto):
    result = tools_for(mosquitto.port, mosquitto.topic_prefix, BROADCAST_TYPE="noop").mqtt("check")

    assert "BROADCAST_TYPE=noop" in result.stderr
    assert result.exit_code == 0


def test_a_certificate_that_is_not_used_is_remarked(tools_for, mosquitto):
    result = tools_for(mosquitto.port, mosquitto.topic_prefix, MQTT_CA_CERT="ca.pem").mqtt("check")

    assert "MQTT_USE_TLS is off in spite of MQTT_CA_CERT" in result.stderr
    assert result.exit_code == 0


# No way in


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broker_that_is_not_there_is_said_in_one_line(tools_for, command):
    error = tools_for(free_port()).error(*command.split())

    assert "no MQTT broker can be reached at 127.0.0.1:" in error
    assert "MQTT_BROKER and MQTT_PORT" in error


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MQTT_BROKER": "no.such.host.invalid"}, "MQTT_BROKER='no.such.host.invalid' is no host that can be found"),
        ({"MQTT_BROKER": "a" * 70}, "is no host that can be found"),
        ({"MQTT_USE_TLS": "on", "MQTT_CA_CERT": "/no/ca.pem"}, "MQTT_CA_CERT='/no/ca.pem' can't be used"),
        (
            {"MQTT_USE_TLS": "on", "MQTT_CLIENT_CERT": "/no/c.pem"},
            "MQTT_CLIENT_CERT='/no/c.pem' with MQTT_CLIENT_KEY can't be used",
        ),
    ],
)
def test_a_setting_that_cannot_be_right_is_named(tools_for, env, said):
    tools = tools_for(**{"port": 1} | env)

    step, reason = failure(tools)

    assert step == "connect"
    assert said in reason
    assert said in tools.error("workers")


@pytest.mark.parametrize(
    ("env", "remedy"),
    [
        ({"MQTT_USERNAME": "", "MQTT_PASSWORD": ""}, "set MQTT_USERNAME and MQTT_PASSWORD"),
        ({"MQTT_PASSWORD": "wrong"}, "look at MQTT_USERNAME and MQTT_PASSWORD"),
    ],
)
def test_a_broker_that_refuses_is_said_with_the_remedy(guarded, env, remedy):
    tools = guarded(**env)

    assert failure(tools) == ("connect", tools.error("watch").removeprefix("Error: "))
    assert failure(tools)[1].endswith(remedy)


@pytest.mark.parametrize(
    ("server", "more", "env", "said"),
    [
        ("server", (), {"MQTT_CA_CERT": "stranger.pem"}, "set MQTT_CA_CERT"),
        ("elsewhere", (), {}, "MQTT_BROKER='127.0.0.1' is not the name in the broker's certificate"),
        ("server", ("require_certificate true",), {}, "MQTT_CLIENT_CERT"),
        ("server", ("require_certificate true", "tls_version tlsv1.2"), {}, "MQTT_CLIENT_CERT"),
        ("server", (), {"MQTT_USE_TLS": "off"}, "MQTT_USE_TLS=on"),
    ],
)
def test_what_does_not_fit_in_tls_is_named(secure, certificates, server, more, env, said):
    here = {name: certificates / value if value.endswith(".pem") else value for name, value in env.items()}

    step, reason = failure(secure(server, more, **here), is_real=True)

    assert step == "connect"
    assert said in reason


def test_tls_against_a_plain_listener_is_named(tools_for, private_mosquitto, certificates):
    tls = {"MQTT_USE_TLS": "on", "MQTT_CA_CERT": certificates / "ca.pem"}

    assert "unset MQTT_USE_TLS" in failure(tools_for(private_mosquitto().port, **tls), is_real=True)[1]


@pytest.mark.slow
def test_a_frozen_broker_is_given_up(tools_for, private_mosquitto):
    server = private_mosquitto()
    server.pause()

    step, reason = failure(tools_for(server.port))

    assert step == "connect"
    assert "does not answer" in reason
    server.resume()


def test_something_else_on_the_port_is_said(tools_for):
    with socket.create_server(("127.0.0.1", 0)) as server:
        import threading

        def hang_up():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        step, reason = failure(tools_for(server.getsockname()[1]))
        thread.join()

    assert step == "connect"
    assert "MQTT_PORT" in reason


# In, and not allowed


def test_an_acl_that_forbids_writing_is_said_at_publish(guarded):
    step, reason = failure(guarded(acl="topic read #"))

    assert step == "publish"
    assert "does not let this user publish to mt/workers/worker-1/check" in reason
    assert "MQTT_USERNAME and WORKER_ID" in reason


def test_an_acl_that_forbids_reading_is_said_at_receive(guarded, monkeypatch):
    monkeypatch.setattr("tasks.cli.mqtt_check.ANSWER_WITHIN_S", 0.5)

    step, reason = failure(guarded(acl="topic write #"))

    assert step == "receive"
    assert "ACL" in reason


def test_a_will_that_is_not_published_is_said(tools, monkeypatch):
    monkeypatch.setattr("tasks.cli.mqtt_check.ANSWER_WITHIN_S", 0.5)
    monkeypatch.setattr("tasks.cli.mqtt_connection.Connection.vanish", lambda _connection: None)  # as behind a proxy

    step, reason = failure(tools)

    assert step == "will"
    assert "is there a proxy between here and MQTT_BROKER" in reason
