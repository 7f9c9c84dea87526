"""What the settings say of MQTT that has no effect, in one line each with its remedy."""

import pytest

from tasks.settings import read_settings
from tasks.sinks import trouble
from tasks.sinks.mqtt import MqttSink

CA, CERT, KEY = ({name: f"/etc/{name}.pem"} for name in ("MQTT_CA_CERT", "MQTT_CLIENT_CERT", "MQTT_CLIENT_KEY"))
TLS, USER, PASSWORD = {"MQTT_USE_TLS": "on"}, {"MQTT_USERNAME": "worker"}, {"MQTT_PASSWORD": "hunter2"}


def settings_of(environment):
    return read_settings({"HOME": "/home/x", "MQTT_PORT": "9", **environment})


@pytest.mark.parametrize("environment", [{}, TLS, TLS | CA, TLS | CA | CERT | KEY, TLS | CERT, USER, USER | PASSWORD])
def test_what_has_its_effect_is_not_complained_of(environment):
    assert trouble.ignored(settings_of(environment)) == []


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        (CA, "MQTT_USE_TLS is off in spite of MQTT_CA_CERT: all goes to the MQTT broker localhost:9 in clear"),
        (CERT | KEY, "in clear, a password too; set MQTT_USE_TLS=on, or unset MQTT_CLIENT_CERT and MQTT_CLIENT_KEY"),
        (CA | {"MQTT_USE_TLS": "off"}, "in spite of MQTT_CA_CERT"),
        (TLS | KEY, "MQTT_CLIENT_KEY is not used without MQTT_CLIENT_CERT; set both, or neither"),
        (PASSWORD, "MQTT_PASSWORD is not sent without MQTT_USERNAME; set both, or neither"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_has_none_is_said_with_the_remedy(environment, what):
    (said,) = trouble.ignored(settings_of(environment))

    assert what in said
    assert "hunter2" not in said


def test_a_worker_warns_of_each_once_when_it_starts(monkeypatch, caplog):
    monkeypatch.setattr("paho.mqtt.client.Client.loop_start", lambda client: None)
    settings = settings_of(CA | PASSWORD)

    MqttSink(settings, "w").start()

    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", what) for what in trouble.ignored(settings)
    ]
    assert len(caplog.records) == 2
