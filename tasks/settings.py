"""Every setting of the project, read from the environment in this one place.

In: environment variables. Out: one frozen `Settings`. A value that can't be used stops the start with a
`SettingsError` that names the variable, what is wrong with it and what would do.
"""

import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from tasks.brokers import SCHEMES, BrokerKind, broker_kind
from tasks.errors import SettingsError
from tasks.mqtt_values import host_fault, secret_fault, topic_fault

T = TypeVar("T")

ENQUEUE_WAYS = ("strict", "outbox", "broker")
QUEUE_STRATEGIES = ("FIFO", "LIFO", "PRIORITY", "WEIGHTED_RANDOM")
BROADCAST_TYPES = ("mqtt", "noop")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
GIB = 2**30
TIB = 2**40
HOUR_S = 3600.0
DAY_S = 86400.0
# Redis gives a message to another worker after so long. Longer than the longest job, shorter than rows are kept.
VISIBILITY_TIMEOUT_S = 6 * 3600
LAST_PORT = 65535
# With a host behind it, it still fits the columns of 255 characters.
LONGEST_WORKER_NAME = 180
_PORT = re.compile(r"(?:\[[^]]*]|[^@:/?#;[]*):(\d+)(?=[/?#;]|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; the README's table says what each one means. Times are seconds, sizes bytes.

    `max_duration_s` limits the video and audio that is opened: images have no duration, so it takes effect with the
    first video task.
    """

    server_dir: Path
    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    enqueue: str
    worker_id: str
    worker_supported_tasks: tuple[str, ...]
    worker_poll_interval_s: float
    lease_renew_s: float
    lease_timeout_s: float
    max_deaths: int
    max_attempts: int
    shutdown_grace_s: float
    retention_days: float
    sqlite_mmap_bytes: int
    db_pool_size: int
    mirror: bool
    log_level: str
    log_format: str
    queue_strategy: Mapping[str, str]
    max_pixels: int
    max_frames: int
    max_input_bytes: int
    max_duration_s: float
    media_roots: tuple[str, ...]
    broadcast_type: str
    mqtt_broker: str
    mqtt_port: int
    mqtt_topic: str
    capability_topic_prefix: str
    mqtt_heartbeat_interval_s: float
    mqtt_username: str | None = field(repr=False)  # of some brokers it is an access token
    mqtt_password: str | None = field(repr=False)
    mqtt_unusable: str | None
    """What can't be used of these settings: said where MQTT is used, since it must stop nothing else."""
    mqtt_use_tls: bool
    mqtt_ca_cert: str | None
    mqtt_client_cert: str | None
    mqtt_client_key: str | None

    @property
    def broker_kind(self) -> BrokerKind:
        """What is particular to the broker at `broker_url`."""
        return broker_kind(self.broker_url)


@cache
def settings() -> Settings:
    """The settings of this process, read once at first use."""
    return read_settings(os.environ)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Build `Settings` from `environment`.

    Raises:
        SettingsError: A variable holds a value that can't be used.
    """
    read = _Reader(environment)
    server_dir = read.directory("CL_SERVER_DIR", _user_data_dir(environment))
    lease_renew_s = read.number("LEASE_RENEW_S", 5.0, above=0, most=HOUR_S)
    lease_timeout_s = read.number("LEASE_TIMEOUT_S", 15.0, above=0, most=DAY_S)
    if lease_timeout_s < 2 * lease_renew_s:
        raise SettingsError(
            f"LEASE_TIMEOUT_S={lease_timeout_s:g} is under twice LEASE_RENEW_S={lease_renew_s:g}: "
            "one late renewal would take living workers for dead; raise the first or lower the second"
        )
    broker_url = read.url(
        "CELERY_BROKER_URL",
        f"sqlite:///{server_dir / 'broker.db'}",
        SCHEMES,
    )
    queue_strategy = read.strategies("QUEUE_STRATEGY")
    if not broker_kind(broker_url).has_strategies and set(queue_strategy.values()) != {"PRIORITY"}:
        raise SettingsError(
            "QUEUE_STRATEGY: RabbitMQ and Redis only know PRIORITY; unset it, or use the embedded broker "
            "(unset CELERY_BROKER_URL)"
        )
    worker_id = worker_name("WORKER_ID", environment.get("WORKER_ID") or "") or f"{socket.gethostname()}-{os.getpid()}"
    mqtt_topic = read.topic("MQTT_TOPIC", "inference/events")
    capability_topic_prefix = read.topic("CAPABILITY_TOPIC_PREFIX", "inference/workers")
    if mqtt_topic.rpartition("/")[::2] == (capability_topic_prefix, worker_id):
        raise SettingsError(
            f"MQTT_TOPIC={mqtt_topic!r:.60} would be the topic of WORKER_ID={worker_id!r:.60} below "
            f"CAPABILITY_TOPIC_PREFIX={capability_topic_prefix!r:.60}, too; choose another prefix"
        )
    mqtt_use_tls = read.switch("MQTT_USE_TLS", default=False)
    mqtt_broker = read.mqtt_host("MQTT_BROKER", "localhost")
    mqtt_username = read.mqtt_secret("MQTT_USERNAME")
    mqtt_password = read.mqtt_secret("MQTT_PASSWORD")
    return Settings(
        server_dir=server_dir,
        database_url=read.url("DATABASE_URL", f"sqlite:///{server_dir / 'media_store.db'}", ("sqlite", "postgresql")),
        broker_url=broker_url,
        enqueue=read.choice("ENQUEUE", "strict", ENQUEUE_WAYS),
        worker_id=worker_id,
        worker_supported_tasks=read.names("WORKER_SUPPORTED_TASKS"),
        worker_poll_interval_s=read.number("WORKER_POLL_INTERVAL", 1.0, above=0, most=HOUR_S),
        lease_renew_s=lease_renew_s,
        lease_timeout_s=lease_timeout_s,
        max_deaths=read.whole("MAX_DEATHS", 3, least=1, most=1000),
        max_attempts=read.whole("MAX_ATTEMPTS", 3, least=1, most=1000),
        shutdown_grace_s=read.number("SHUTDOWN_GRACE_S", 300.0, above=0, most=30 * DAY_S),
        retention_days=read.number("RETENTION_DAYS", 30.0, above=VISIBILITY_TIMEOUT_S / 86400, most=36_500),
        sqlite_mmap_bytes=read.whole("SQLITE_MMAP_BYTES", 256 * 2**20, least=0, most=TIB),
        db_pool_size=read.whole("DB_POOL_SIZE", 5, least=1, most=1000),
        mirror=read.switch("MIRROR", default=True),
        log_level=read.choice("LOG_LEVEL", "INFO", LOG_LEVELS, fold=str.upper),
        log_format=read.choice("LOG_FORMAT", "console", ("console", "json")),
        queue_strategy=queue_strategy,
        max_pixels=read.whole("MAX_PIXELS", 150_000_000, least=1, most=10**12),
        max_frames=read.whole("MAX_FRAMES", 1000, least=1, most=10**9),
        max_input_bytes=read.whole("MAX_INPUT_BYTES", 4 * GIB, least=1, most=1024 * TIB),
        max_duration_s=read.number("MAX_DURATION_S", 4 * 3600.0, above=0, most=365 * DAY_S),
        media_roots=read.roots("MEDIA_ROOTS"),
        broadcast_type=read.choice("BROADCAST_TYPE", "mqtt", BROADCAST_TYPES),
        mqtt_broker=mqtt_broker,
        mqtt_port=read.whole("MQTT_PORT", 8883 if mqtt_use_tls else 1883, least=1, most=LAST_PORT),
        mqtt_topic=mqtt_topic,
        capability_topic_prefix=capability_topic_prefix,
        mqtt_heartbeat_interval_s=read.number("MQTT_HEARTBEAT_INTERVAL", 30.0, above=0, most=DAY_S),
        mqtt_username=mqtt_username,
        mqtt_password=mqtt_password,
        mqtt_unusable=". ".join(read.mqtt_faults) or None,
        mqtt_use_tls=mqtt_use_tls,
        mqtt_ca_cert=environment.get("MQTT_CA_CERT") or None,
        mqtt_client_cert=environment.get("MQTT_CLIENT_CERT") or None,
        mqtt_client_key=environment.get("MQTT_CLIENT_KEY") or None,
    )


class _Reader:
    """Turns one variable at a time into a value, or into a `SettingsError` that names it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.mqtt_faults: Final[list[str]] = []  # they stop nothing but MQTT

    def number(self, name: str, default: float, *, above: float, most: float) -> float:
        value = self._parse(name, default, float, "a number")
        if not above < value <= most:
            raise SettingsError(
                f"{name}={self._environment[name]!r} must be above {above:g} and at most {most:,.10g}; "
                f"unset it for {default:g}"
            )
        return value

    def whole(self, name: str, default: int, *, least: int, most: int) -> int:
        value = self._parse(name, default, _whole, "a whole number")
        if not least <= value <= most:
            raise SettingsError(
                f"{name}={self._environment[name]!r} must be from {least} to {most:,}; unset it for {default}"
            )
        return value

    def mqtt_host(self, name: str, default: str) -> str:
        value = self._environment.get(name) or default
        return value if self._is_for_mqtt(name, host_fault(value)) else ""

    def mqtt_secret(self, name: str) -> str | None:
        """A variable, or the first line of the file that `{name}_FILE` names."""
        path = self._environment.get(f"{name}_FILE")
        try:
            value = Path(path).read_text().lstrip("\n").partition("\n")[0] if path else self._environment.get(name)
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "it is no text"
            self.mqtt_faults.append(f"{name}_FILE={path!r} can't be read: {reason}")
            return None
        return value if value and self._is_for_mqtt(name, secret_fault(value)) else None

    def _is_for_mqtt(self, name: str, fault: str | None) -> bool:
        if fault is not None:
            self.mqtt_faults.append(f"{name} {fault}")
        return fault is None

    def choice(self, name: str, default: str, allowed: tuple[str, ...], fold: Callable[[str], str] = str.lower) -> str:
        value = fold(self._environment.get(name) or default)
        if value not in allowed:
            raise SettingsError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
        return value

    def switch(self, name: str, *, default: bool) -> bool:
        value = (self._environment.get(name) or ("on" if default else "off")).lower()
        if value in ("on", "1", "true", "yes"):
            return True
        if value in ("off", "0", "false", "no"):
            return False
        raise SettingsError(f"{name}={value!r} is neither on nor off")

    def names(self, name: str) -> tuple[str, ...]:
        text = self._environment.get(name, "")
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        if text and not names:
            raise SettingsError(f"{name}={text!r} names nothing; unset it, or give names with commas between")
        return names

    def directory(self, name: str, default: str) -> Path:
        """A directory that all processes find, wherever they stand."""
        value = self._environment.get(name)
        path = Path(value or default).expanduser()
        if value and not path.is_absolute():
            raise SettingsError(f"{name}={value!r} is relative, and every process may stand elsewhere; give it in full")
        return path.absolute()

    def roots(self, name: str) -> tuple[str, ...]:
        roots = tuple(part for part in self._environment.get(name, "").split(os.pathsep) if part)
        for root in roots:
            if not Path(root).is_absolute():
                raise SettingsError(
                    f"{name} holds the relative path {root!r}; give absolute ones, {os.pathsep!r} between"
                )
        return roots

    def url(self, name: str, default: str, schemes: tuple[str, ...]) -> str:
        value = self._environment.get(name) or default
        scheme = value.partition("://")[0].lower() if "://" in value else ""
        if scheme.split("+", 1)[0] not in schemes:
            known = ", ".join(f"{known}://" for known in schemes)
            said = f"starts with {scheme!r}" if scheme else "has no scheme"
            raise SettingsError(f"{name} {said}; it can be one of {known}")
        if scheme.startswith("sqlite") and not value.partition("://")[2].startswith("//"):
            raise SettingsError(
                f"{name}={value!r} names no absolute path, and every process may stand elsewhere; write "
                f"{scheme}:////path/to/a/file"
            )
        if scheme.startswith("postgresql") and value.partition("?")[0].count("@") > 1:
            raise SettingsError(f"{name} holds more than one @; write the one in its password as %40")
        for part in value.split(";"):
            if (port := _port(part)) is not None and not 1 <= port <= LAST_PORT:
                raise SettingsError(f"{name} has the port {port}; give one from 1 to {LAST_PORT}")
        return scheme + value[len(scheme) :]  # SQLAlchemy knows no capitals

    def topic(self, name: str, default: str) -> str:
        value = self._environment.get(name) or default
        if fault := topic_fault(value):
            raise SettingsError(f"{name}={value!r:.60} {fault}")
        return value

    def strategies(self, name: str) -> dict[str, str]:
        """`image_resize=LIFO,*=PRIORITY`, or one word for all queues."""
        given: dict[str, str] = {}
        for part in self.names(name):
            queue, separator, strategy = part.partition("=")
            if not separator:
                queue, strategy = "*", part
            queue, strategy = queue.strip(), strategy.strip().upper()
            if not queue or strategy not in QUEUE_STRATEGIES:
                raise SettingsError(
                    f"{name} has {part!r}; choose one of {', '.join(QUEUE_STRATEGIES)}, as in image_resize=LIFO"
                )
            if queue in given:
                raise SettingsError(f"{name} names {queue} twice; name it once")
            given[queue] = strategy
        return {"*": "PRIORITY", **given}

    def _parse(self, name: str, default: T, convert: Callable[[str], T], what: str) -> T:
        text = self._environment.get(name)
        if not text:
            return default
        try:
            return convert(text)
        except (ValueError, OverflowError) as exc:
            raise SettingsError(f"{name}={text!r} is not {what}; unset it for {default}") from exc


def worker_name(source: str, value: str) -> str:
    """A worker's name.

    Raises:
        SettingsError: It can't be shown, or is too long.
    """
    if not value.isprintable() or len(value) > LONGEST_WORKER_NAME:
        raise SettingsError(
            f"{source}={value!r:.60} must be printable, and {LONGEST_WORKER_NAME} characters long at most"
        )
    return value


def _whole(text: str) -> int:
    """A whole number, also one written as 1e6."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def _port(url: str) -> int | None:
    """The port of a server's URL, if it has one; a password may hold anything but an `@`."""
    server = url.partition("://")[2]
    found = _PORT.match(server.partition("@")[2] or server)
    return int(found[1]) if found is not None else None


def _user_data_dir(environment: Mapping[str, str]) -> str:
    home = environment.get("HOME") or "~"
    if sys.platform == "darwin":
        return f"{home}/Library/Application Support/media-tasks"
    return f"{environment.get('XDG_DATA_HOME') or home + '/.local/share'}/media-tasks"
