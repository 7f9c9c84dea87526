"""Every setting: its default, what it takes, and the one line that a bad value gets."""

import ast
import os
import re
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.settings import Settings, read_settings

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = {"HOME": "/home/user"}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DATABASE_URL", "mysql://u:hunter2@h/db", ["mysql", "sqlite://", "postgresql://"]),
        ("DATABASE_URL", "media_store.db", ["DATABASE_URL has no scheme; it can be one of sqlite://"]),
        ("DATABASE_URL", "sqlite:///jobs.db", ["sqlite:///jobs.db", "absolute path", "sqlite:////"]),
        ("DATABASE_URL", "sqlite://", ["absolute path", "sqlite:////"]),
        ("CELERY_BROKER_URL", "sqlite:///broker.db", ["sqlite:///broker.db", "absolute path", "sqlite:////"]),
        ("CELERY_BROKER_URL", "kafka://u:hunter2@h", ["kafka", "amqp://", "redis://"]),
        ("ENQUEUE", "sometimes", ["sometimes", "strict"]),
        ("MIRROR", "perhaps", ["perhaps", "on", "off"]),
        ("LOG_LEVEL", "LOUD", ["LOUD", "INFO"]),
        ("LOG_FORMAT", "xml", ["xml", "json"]),
        ("QUEUE_STRATEGY", "image_resize=RANDOM", ["RANDOM", "FIFO", "LIFO", "PRIORITY"]),
        ("QUEUE_STRATEGY", "SOMEHOW", ["SOMEHOW", "FIFO"]),
        ("QUEUE_STRATEGY", "=LIFO", ["'=LIFO'", "as in image_resize=LIFO"]),
        ("QUEUE_STRATEGY", "image_resize=", ["'image_resize='", "FIFO"]),
        ("QUEUE_STRATEGY", "LIFO,*=FIFO", ["names * twice"]),
        ("WORKER_ID", "a\nb", ["printable"]),
        ("WORKER_ID", "w" * 181, ["180 characters"]),
        ("MEDIA_ROOTS", "media", ["media", "absolute"]),
        ("WORKER_POLL_INTERVAL", "often", ["often", "1"]),
        ("WORKER_POLL_INTERVAL", "0", ["0"]),
        ("LEASE_RENEW_S", "-1", ["-1"]),
        ("LEASE_TIMEOUT_S", "9", ["9", "LEASE_RENEW_S"]),
        ("LEASE_TIMEOUT_S", "nan", ["nan"]),
        ("MAX_DEATHS", "0", ["0", "1"]),
        ("MAX_DEATHS", "three", ["three"]),
        ("MAX_ATTEMPTS", "0", ["0"]),
        ("SQLITE_MMAP_BYTES", "-1", ["-1"]),
        ("DB_POOL_SIZE", "0", ["0"]),
        ("MAX_PIXELS", "0", ["0"]),
        ("MAX_PIXELS", "inf", ["inf"]),
        ("MAX_FRAMES", "many", ["many"]),
        ("MAX_INPUT_BYTES", "4G", ["4G"]),
        ("CELERY_BROKER_URL", "amqp://u:hunter2@h:99999//", ["99999", "1 to 65535"]),
        ("CELERY_BROKER_URL", "amqp://h1//;amqp://u:hunter2@[::1]:70000//", ["70000", "1 to 65535"]),
        ("CELERY_BROKER_URL", "amqp://h1//;amqp://h2:70000//", ["70000", "1 to 65535"]),
        ("DATABASE_URL", "postgresql://u:hunter2@h:0/db", ["0", "1 to 65535"]),
        ("DATABASE_URL", "postgresql://u:p@hunter2@h/db", ["more than one @", "%40"]),
        ("DATABASE_URL", "postgresql://u:p@hunter2/@h/db?x=@", ["more than one @", "%40"]),
        ("MQTT_PORT", "0", ["'0'", "1 to 65,535"]),
        ("MQTT_PORT", "70000", ["'70000'", "1 to 65,535"]),
        ("CL_SERVER_DIR", "here", ["'here' is relative"]),
        ("WORKER_SUPPORTED_TASKS", " , ", ["' , ' names nothing"]),
        ("QUEUE_STRATEGY", ",", ["',' names nothing"]),
        ("MAX_DEATHS", "2.5", ["2.5", "whole"]),
        ("MQTT_TOPIC", "$SYS/events", ["'$SYS/events'", "leading $"]),
        ("CAPABILITY_TOPIC_PREFIX", "$share/a/b", ["leading $"]),
        ("MQTT_TOPIC", "a" * 65_001, ["60,000 bytes"]),
        ("CAPABILITY_TOPIC_PREFIX", "é" * 30_001, ["60,000 bytes"]),
        ("MQTT_TOPIC", "caf\udce9", ["UTF-8"]),
    ],
)
def test_a_bad_value_is_refused_by_its_variables_name(variable, value, words):
    with pytest.raises(SettingsError) as caught:
        read_settings(HOME | {variable: value})

    message = str(caught.value)
    assert variable in message
    assert [word for word in words if word not in message] == []
    assert "hunter2" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "lowest", "highest", "default"),
    [
        ("LEASE_RENEW_S", "0", "3,600", "5"),
        ("LEASE_TIMEOUT_S", "0", "86,400", "15"),
        ("WORKER_POLL_INTERVAL", "0", "3,600", "1"),
        ("SHUTDOWN_GRACE_S", "0", "2,592,000", "300"),
        ("RETENTION_DAYS", "0.25", "36,500", "30"),
        ("MAX_DURATION_S", "0", "31,536,000", "14400"),
        ("MQTT_HEARTBEAT_INTERVAL", "0", "86,400", "30"),
        ("MAX_DEATHS", "1", "1,000", "3"),
        ("MAX_ATTEMPTS", "1", "1,000", "3"),
        ("SQLITE_MMAP_BYTES", "0", "1,099,511,627,776", "268435456"),
        ("DB_POOL_SIZE", "1", "1,000", "5"),
        ("MAX_PIXELS", "1", "1,000,000,000,000", "150000000"),
        ("MAX_FRAMES", "1", "1,000,000,000", "1000"),
        ("MAX_INPUT_BYTES", "1", "1,125,899,906,842,624", "4294967296"),
    ],
)
@pytest.mark.parametrize("value", ["-1", "1e30", "inf", "nan"])
def test_a_number_out_of_its_range_is_refused_with_the_range_and_the_default(variable, lowest, highest, default, value):
    with pytest.raises(SettingsError) as caught:
        read_settings(HOME | {variable: value})

    message = str(caught.value)
    assert message.startswith(f"{variable}={value!r}")
    assert message.endswith(f"; unset it for {default}")
    assert "is not a whole number" in message or (lowest in message and highest in message)


@pytest.mark.parametrize("days", ["0", "0.25", "-30"])
def test_rows_are_kept_longer_than_any_message(days):
    with pytest.raises(SettingsError, match=r"RETENTION_DAYS=.* must be above 0\.25 and at most 36,500"):
        read_settings(HOME | {"RETENTION_DAYS": days})


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("DATABASE_URL", "postgresql+psycopg://u:p/99999#:?@h:5432/db"),
        ("DATABASE_URL", "postgresql:///db?host=/run/postgresql"),
        ("DATABASE_URL", "sqlite:////data/a:99999/media_store.db"),
        ("DATABASE_URL", "sqlite:////data/@me@home/media_store.db"),
        ("DATABASE_URL", "postgresql://u:p%40ss@h/db?application_name=me@home"),
        ("CELERY_BROKER_URL", "amqp://u:p@ss@h//"),
        ("CELERY_BROKER_URL", "amqp://u:999999@h//"),
        ("CELERY_BROKER_URL", "redis://:sec[ret@[::1]:6379/0"),
    ],
)
def test_what_only_looks_like_a_port_is_let_through(variable, url):
    settings = read_settings(HOME | {variable: url})

    assert url in (settings.database_url, settings.broker_url)


@pytest.mark.parametrize("variable", ["DATABASE_URL", "CELERY_BROKER_URL"])
def test_a_scheme_may_be_in_capitals_and_its_path_stays_as_it_is(variable):
    settings = read_settings(HOME | {variable: "SQLite:////Data/Jobs.db"})

    assert "sqlite:////Data/Jobs.db" in (settings.database_url, settings.broker_url)


def test_an_empty_variable_is_one_that_is_not_set():
    variables = dict.fromkeys(variables_read(), "")

    assert read_settings(HOME | variables).max_deaths == 3
    assert read_settings(HOME | variables).database_url == read_settings(HOME).database_url


def test_the_defaults_need_no_server():
    settings = read_settings(HOME)

    assert settings.database_url == f"sqlite:///{settings.server_dir}/media_store.db"
    assert settings.broker_url == f"sqlite:///{settings.server_dir}/broker.db"
    assert settings.server_dir.is_relative_to("/home/user")


def test_the_server_directory_may_stand_below_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert read_settings(HOME | {"CL_SERVER_DIR": "~/here"}).server_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "strategies"),
    [
        ("LIFO", {"*": "LIFO"}),
        ("image_resize=LIFO,*=FIFO", {"*": "FIFO", "image_resize": "LIFO"}),
        (" image_resize = lifo ", {"*": "PRIORITY", "image_resize": "LIFO"}),
    ],
)
def test_a_strategy_is_given_for_one_queue_or_for_all(text, strategies):
    assert read_settings(HOME | {"QUEUE_STRATEGY": text}).queue_strategy == strategies


@pytest.mark.parametrize("url", ["amqp://h//", "redis://h/0"])
@pytest.mark.parametrize("strategy", ["FIFO", "LIFO", "WEIGHTED_RANDOM", "image_resize=WEIGHTED_RANDOM,*=PRIORITY"])
def test_a_strategy_that_the_broker_does_not_know_is_refused_with_the_remedy(url, strategy):
    with pytest.raises(
        SettingsError, match=r"^QUEUE_STRATEGY: RabbitMQ and Redis only know PRIORITY; unset it, or use"
    ):
        read_settings(HOME | {"CELERY_BROKER_URL": url, "QUEUE_STRATEGY": strategy})


@pytest.mark.parametrize("url", ["amqp://h//", "redis://h/0"])
def test_priority_is_known_to_every_broker(url):
    settings = read_settings(HOME | {"CELERY_BROKER_URL": url, "QUEUE_STRATEGY": "image_resize=PRIORITY"})

    assert settings.broker_url == url


@pytest.mark.parametrize(("text", "is_on"), [("on", True), ("1", True), ("TRUE", True), ("off", False), ("No", False)])
def test_a_switch_takes_the_usual_words(text, is_on):
    assert read_settings(HOME | {"MIRROR": text}).mirror is is_on


@pytest.mark.parametrize(("is_on", "port"), [("off", 1883), ("on", 8883)])
def test_the_port_of_mqtt_is_the_usual_one_unless_it_is_given(is_on, port):
    assert read_settings(HOME | {"MQTT_USE_TLS": is_on}).mqtt_port == port
    assert read_settings(HOME | {"MQTT_USE_TLS": is_on, "MQTT_PORT": "1884"}).mqtt_port == 1884


@pytest.mark.parametrize("text", ["debug", "Debug", "DEBUG"])
def test_a_level_may_be_written_in_any_case(text):
    assert read_settings(HOME | {"LOG_LEVEL": text}).log_level == "DEBUG"


def test_a_worker_is_called_by_its_host_and_process_unless_it_has_a_name():
    assert read_settings(HOME).worker_id == f"{socket.gethostname()}-{os.getpid()}"
    assert read_settings(HOME | {"WORKER_ID": "w" * 180}).worker_id == "w" * 180


@pytest.mark.skipif(sys.platform == "darwin", reason="it has a place of its own")
def test_the_server_directory_is_the_users_data_directory_unless_it_is_given():
    assert read_settings(HOME).server_dir == Path("/home/user/.local/share/media-tasks")
    assert read_settings(HOME | {"XDG_DATA_HOME": "/data"}).server_dir == Path("/data/media-tasks")


def test_lists_are_split_and_trimmed():
    settings = read_settings(HOME | {"WORKER_SUPPORTED_TASKS": " a, b ,,c", "MEDIA_ROOTS": f"/a{os.pathsep}/b"})

    assert settings.worker_supported_tasks == ("a", "b", "c")
    assert settings.media_roots == ("/a", "/b")


def test_a_size_may_be_written_with_an_exponent():
    assert read_settings(HOME | {"MAX_PIXELS": "1e6"}).max_pixels == 1_000_000


def test_settings_cannot_be_changed():
    settings = read_settings(HOME)

    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        settings.max_deaths = 5


def test_passwords_do_not_show_in_the_settings():
    urls = {"DATABASE_URL": "postgresql://u:hunter2@h/db", "CELERY_BROKER_URL": "amqp://u:hunter3@h//"}

    shown = repr(read_settings(HOME | urls)) + str(read_settings(HOME | urls))

    assert "hunter" not in shown


def test_passwords_do_not_show_in_celery_report(tmp_path):
    env = {"PATH": os.environ["PATH"], "CL_SERVER_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    env |= {"DATABASE_URL": "postgresql://u:hunter2@h/db", "CELERY_BROKER_URL": "amqp://u:hunter3@h//"}

    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "report"], env=env, capture_output=True, text=True, check=True
    )

    assert "amqp" in done.stdout
    assert "hunter" not in done.stdout + done.stderr


def test_a_bad_setting_stops_a_command_with_one_line(tmp_path):
    env = {"PATH": os.environ["PATH"], "CL_SERVER_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "MAX_DEATHS": "x"}

    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker"], env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "Error: MAX_DEATHS='x' is not a whole number; unset it for 3"
    assert "Traceback" not in done.stderr


# The README


def variables_read():
    """The environment variables that tasks/settings.py reads, from its source."""
    tree = ast.parse((REPOSITORY / "tasks" / "settings.py").read_text())
    names = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }
    return {name for name in names if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", name)} - {"HOME", "XDG_DATA_HOME"}


@pytest.fixture(scope="module")
def documented():
    """{variable: (default, meaning)} of the README's table."""
    readme = REPOSITORY / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if "## Settings" not in text:
        pytest.skip("the README has no section Settings")
    section = text.split("## Settings", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| (.+) \|$", section, re.MULTILINE)
    return {name: (default, meaning) for names, default, meaning in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_source_is_understood():
    assert {"CL_SERVER_DIR", "DATABASE_URL", "WORKER_ID", "MAX_DEATHS", "QUEUE_STRATEGY"} <= variables_read()
    # Each field of Settings comes from a variable; `mqtt_unusable` from what is wrong with one.
    assert len(variables_read()) == len(fields(Settings)) - 1


def test_every_setting_that_does_something_is_in_the_readme(documented):
    field_of = {"CL_SERVER_DIR": "server_dir", "CELERY_BROKER_URL": "broker_url"}
    source = "\n".join(
        path.read_text()
        for path in [*(REPOSITORY / "tasks").rglob("*.py"), REPOSITORY / "celeryconfig.py"]
        if path.name != "settings.py"
    )
    used = {
        name for name in variables_read() if re.search(rf"settings\.{field_of.get(name, name.lower())}(_s)?\b", source)
    }

    assert {"MAX_DEATHS", "WORKER_POLL_INTERVAL", "CELERY_BROKER_URL"} <= used
    assert used - set(documented) == set()


def test_the_readme_names_no_setting_that_is_not_read(documented):
    assert set(documented) - variables_read() == set()


def test_the_readme_tells_the_defaults(documented):
    settings = read_settings(HOME)
    told = {name: default.split()[0].strip("`") for name, (default, _) in documented.items()}
    numbers = {name: float(default) for name, default in told.items() if re.fullmatch(r"[\d.]+", default)}
    intervals = ("WORKER_POLL_INTERVAL", "MQTT_HEARTBEAT_INTERVAL")
    field_of = {name: f"{name.lower()}_s" if name in intervals else name.lower() for name in numbers}

    assert {name: getattr(settings, field_of[name]) for name in numbers} == numbers
    assert (told["ENQUEUE"], told["LOG_LEVEL"], told["LOG_FORMAT"]) == ("strict", "INFO", "console")


def test_a_workers_topic_that_would_be_that_of_events_is_refused_with_both_names():
    own = HOME | {"CAPABILITY_TOPIC_PREFIX": "inference", "WORKER_ID": "events"}

    with pytest.raises(SettingsError, match=r"MQTT_TOPIC=.*WORKER_ID='events'.*CAPABILITY_TOPIC_PREFIX='inference'"):
        read_settings(own)

    assert read_settings(own | {"WORKER_ID": "edge-1"}).worker_id == "edge-1"
    assert read_settings(own | {"MQTT_TOPIC": "events"}).mqtt_topic == "events"


@pytest.mark.parametrize(
    "text", ["from a file", "from a file\n", "from a file\r\n", "from a file\nand a note\n", "\nfrom a file\n"]
)
def test_a_secret_may_stand_in_the_first_line_of_a_file(tmp_path, text):
    (tmp_path / "secret").write_bytes(text.encode())

    settings = read_settings(HOME | {"MQTT_PASSWORD": "ignored", "MQTT_PASSWORD_FILE": str(tmp_path / "secret")})

    assert settings.mqtt_password == "from a file"
    assert "from a file" not in repr(settings)


def test_a_secrets_file_that_is_no_text_is_said_without_its_content(tmp_path):
    (tmp_path / "secret").write_bytes(b"hunter2\xff")

    said = unusable(MQTT_PASSWORD_FILE=str(tmp_path / "secret"))

    assert said == f"MQTT_PASSWORD_FILE='{tmp_path}/secret' can't be read: it is no text"


def test_a_secrets_file_that_can_not_be_read_stops_nothing_but_mqtt(tmp_path):
    from tasks.sinks.client import new_client

    settings = read_settings(HOME | {"MQTT_PASSWORD_FILE": str(tmp_path / "missing")})

    with pytest.raises(SettingsError, match=r"MQTT_PASSWORD_FILE=.*missing.* can.t be read"):
        new_client(settings, "me")


@pytest.mark.parametrize(
    "host",
    ["mqtt://u:hunter2@h", "u:hunter2@h", "hunter2@h", "h:1883", "//h", "h/hunter2", "a b", "h\nunter2", "1::2::3"],
)
def test_a_url_in_the_place_of_a_host_is_no_part_of_any_message(host):
    assert "MQTT_BROKER is a host name or an address, no URL" in unusable(MQTT_BROKER=host)


@pytest.mark.parametrize("host", ["localhost", "mqtt.example.org", "127.0.0.1", "::1", "fe80::1%eth0"])
def test_a_host_is_a_name_or_an_address(host):
    settings = read_settings(HOME | {"MQTT_BROKER": host})

    assert settings.mqtt_broker == host
    assert settings.mqtt_unusable is None


def test_an_address_has_no_brackets():
    assert unusable(MQTT_BROKER="[::1]") == "MQTT_BROKER is an address with brackets; write it without"


@pytest.mark.parametrize("variable", ["MQTT_USERNAME", "MQTT_PASSWORD"])
@pytest.mark.parametrize("value", ["hunter2\udce9", "hunter2" * 10_000])
def test_a_name_or_password_that_mqtt_cannot_carry_is_named_and_not_told(variable, value):
    said = unusable(**{variable: value})

    assert said == f"{variable} can't be sent; it must be UTF-8, of at most 65,535 bytes"


def test_all_that_mqtt_cannot_use_is_told_at_once(tmp_path):
    said = unusable(MQTT_BROKER="[::1]", MQTT_USERNAME_FILE=str(tmp_path / "missing"), MQTT_PASSWORD="hunter2\udce9")

    assert said == (
        "MQTT_BROKER is an address with brackets; write it without. "
        f"MQTT_USERNAME_FILE='{tmp_path}/missing' can't be read: No such file or directory. "
        "MQTT_PASSWORD can't be sent; it must be UTF-8, of at most 65,535 bytes"
    )


def unusable(**environment):
    """Why MQTT can't be used with these settings; they stop nothing else, and are nowhere told."""
    from tasks.sinks.client import new_client

    settings = read_settings(HOME | environment)
    assert "hunter2" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        new_client(settings, "me")
    assert "hunter2" not in str(caught.value)
    return str(caught.value)
