"""Real servers for the tests: those that answer on their standard local ports, or our own on other ports.

A `...Server` says where a server is and makes a part of it that belongs to one test run: a database, a vhost, a
database number, a topic prefix, each dropped when its `with` block ends. A `Private...` server is started by the
test itself from the installed program, so it may be stopped, frozen, killed and started again.
"""

import contextlib
import getpass
import itertools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import amqp
import paho.mqtt.client as mqtt
import psycopg
import redis
from paho.mqtt.enums import CallbackAPIVersion
from psycopg import sql
from sqlalchemy import URL

from tests.tooling import processes
from tests.tooling.waiting import eventually

HOST = "127.0.0.1"
CONNECT_TIMEOUT_S = 3
# Server programs are often installed outside an ordinary user's PATH.
PROGRAM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin", "/opt/homebrew/sbin")
POSTGRES_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
# Debian's /usr/sbin/rabbitmq-server changes the user and the folder; the script behind it does not.
RABBITMQ_FOLDERS = ("/usr/lib/rabbitmq/bin",)


class ServiceMissing(Exception):
    """A server neither answers nor can be started; the message says what was tried and how to get it."""


def unique_name() -> str:
    return f"media_tasks_test_{os.getpid()}_{secrets.token_hex(4)}"


_ports = itertools.islice(itertools.cycle(range(10_000, 30_000)), os.getpid() * 101 % 20_000, None)


def free_port() -> int:
    """A port on which nobody listens.

    It lies below those that the system gives to connections (Linux: 32768 and up), and test processes that run side by
    side begin in different places: nobody takes it before its server is started.
    """
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def find_program(name: str, *patterns: str) -> Path | None:
    """The program from `patterns` (folders, the last in order of name first), PATH, or the usual server folders."""
    for pattern in patterns:
        for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True):
            if os.access(folder / name, os.X_OK):
                return folder / name
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *PROGRAM_FOLDERS]))
    return Path(found) if found else None


# --- PostgreSQL


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server with a role that may create databases."""

    host: str = HOST
    port: int = 5432
    user: str = "postgres"
    password: str | None = field(default=None, repr=False)

    def connect(self, dbname: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=dbname,
            connect_timeout=CONNECT_TIMEOUT_S,
            autocommit=True,
        )

    def can_create_databases(self) -> bool:
        question = "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
        with contextlib.suppress(psycopg.OperationalError), self.connect() as connection:
            row = connection.execute(question).fetchone()
            return bool(row and row[0])
        return False

    def url(self, dbname: str) -> str:
        """An SQLAlchemy URL."""
        is_socket = self.host.startswith("/")
        return URL.create(
            "postgresql+psycopg",
            username=self.user,
            password=self.password,
            host=None if is_socket else self.host,
            port=None if is_socket else self.port,
            database=dbname,
            query={"host": self.host, "port": str(self.port)} if is_socket else {},
        ).render_as_string(hide_password=False)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The SQLAlchemy URL of a new, empty database."""
        name = unique_name()
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield self.url(name)
        finally:
            with self.connect() as connection:
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def standard_postgres() -> PostgresServer | None:
    """The local server on port 5432, if one of the usual roles may log in and create databases."""
    me = os.environ.get("PGUSER") or getpass.getuser()
    roles = [(me, os.environ.get("PGPASSWORD")), ("postgres", None), ("postgres", "postgres")]
    for host in (HOST, "/var/run/postgresql", "/tmp"):  # noqa: S108 - where PostgreSQL's own build puts its socket
        for user, password in roles:
            server = PostgresServer(host=host, user=user, password=password)
            if server.can_create_databases():
                return server
    return None


# --- RabbitMQ


@dataclass(frozen=True)
class RabbitmqServer:
    """A RabbitMQ server; `control` is the command that runs rabbitmqctl for it, where that is allowed."""

    port: int = 5672
    control: tuple[str, ...] = ()
    control_env: Mapping[str, str] = field(default_factory=dict, repr=False)

    def url(self, vhost: str = "/") -> str:
        return f"amqp://guest:guest@{HOST}:{self.port}/{vhost.replace('/', '%2F')}"

    def answers(self, vhost: str = "/") -> bool:
        connection = amqp.Connection(
            f"{HOST}:{self.port}", virtual_host=vhost, connect_timeout=CONNECT_TIMEOUT_S, read_timeout=CONNECT_TIMEOUT_S
        )
        try:
            connection.connect()
        except (OSError, amqp.AMQPError):
            return False
        else:
            return True
        finally:
            with contextlib.suppress(OSError, amqp.AMQPError):
                connection.close()

    def rabbitmqctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.control, "--quiet", *args],
            env={**os.environ, **self.control_env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def may_control(self) -> bool:
        """Whether this user may run rabbitmqctl (root or the server's own user)."""
        return bool(self.control) and self.rabbitmqctl("list_vhosts").returncode == 0

    @contextlib.contextmanager
    def vhost(self) -> Iterator[str]:
        """The AMQP URL of a new, empty vhost."""
        name = unique_name()
        for command in (["add_vhost", name], ["set_permissions", "-p", name, "guest", ".*", ".*", ".*"]):
            done = self.rabbitmqctl(*command)
            if done.returncode != 0:
                raise ServiceMissing(f"rabbitmqctl {command[0]} failed: {done.stderr or done.stdout}")
        try:
            yield self.url(name)
        finally:
            self.rabbitmqctl("delete_vhost", name)


def standard_rabbitmq() -> RabbitmqServer | None:
    """The local server on port 5672 that knows guest/guest; without `control` where rabbitmqctl may not be used."""
    server = RabbitmqServer()
    if not server.answers():
        return None
    program = find_program("rabbitmqctl")
    controlled = RabbitmqServer(control=(str(program),)) if program else server
    return controlled if controlled.may_control() else server


# --- Redis


@dataclass(frozen=True)
class RedisServer:
    """A Redis server without a password. Who has a database number stands in number 0: a test may flush its own."""

    port: int = 6379

    OWNER_KEY: ClassVar[str] = "media_tasks_test_owner_of_{}"

    def client(self, number: int = 0) -> "redis.Redis":
        return redis.Redis(
            host=HOST, port=self.port, db=number, socket_connect_timeout=CONNECT_TIMEOUT_S, decode_responses=True
        )

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database number, which no other test run uses; flushed at the end."""
        number = self._take_number()
        try:
            yield f"redis://{HOST}:{self.port}/{number}"
        finally:
            with self.client(number) as client, self.client() as owners:
                client.flushdb()
                owners.delete(self.OWNER_KEY.format(number))

    def _take_number(self) -> int:
        with self.client() as owners:
            count = int(owners.config_get("databases")["databases"])
            for number in reversed(range(1, count)):
                key = self.OWNER_KEY.format(number)
                with self.client(number) as client:
                    owner = owners.get(key)
                    if owner and not processes.is_running(int(owner)):  # left by a run that was killed
                        client.flushdb()
                        owners.delete(key)
                    if client.dbsize() == 0 and owners.set(key, str(os.getpid()), nx=True):
                        return number
        raise ServiceMissing(f"all {count} database numbers of Redis on port {self.port} are in use; FLUSHDB one")


def standard_redis() -> RedisServer | None:
    server = RedisServer()
    return server if server.answers() else None


# --- Mosquitto


@dataclass(frozen=True)
class MosquittoServer:
    """An MQTT broker that lets anyone in, and the prefix under which a test's topics stand."""

    host: str = HOST
    port: int = 1883
    topic_prefix: str = ""

    def answers(self) -> bool:
        """Whether it accepts a client: CONNECT of MQTT 3.1.1 without a client id, answered by CONNACK 0."""
        connect = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
        try:
            with socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S) as connection:
                connection.settimeout(CONNECT_TIMEOUT_S)
                connection.sendall(connect)
                return connection.recv(4) == b"\x20\x02\x00\x00"
        except OSError:
            return False

    @contextlib.contextmanager
    def prefix(self) -> Iterator["MosquittoServer"]:
        """The same broker with a topic prefix of its own, under which no retained message stays."""
        mine = MosquittoServer(self.host, self.port, unique_name())
        try:
            yield mine
        finally:
            mine.clear_retained()

    def clear_retained(self) -> None:
        """Remove every retained message under the prefix."""
        while topics := self.retained():
            with self._client() as client:
                for message in [client.publish(topic, b"", qos=1, retain=True) for topic in topics]:
                    message.wait_for_publish(10)

    def retained(self) -> list[str]:
        """The topics under the prefix that have a retained message.

        An own message, published after the subscription, marks their end. All come at QoS 0: of a higher one a broker
        keeps only so many messages for a subscriber (Mosquitto: 1000), and drops the rest.
        """
        end = f"{self.topic_prefix}/end-of-retained"
        topics: list[str] = []
        is_over = threading.Event()

        def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
            if message.topic == end:
                is_over.set()
            elif message.retain:
                topics.append(message.topic)

        with self._client() as client:
            client.on_message = on_message
            client.on_subscribe = lambda *_: client.publish(end)
            client.subscribe(f"{self.topic_prefix}/#")
            assert is_over.wait(20), "the MQTT broker returns an own message"
        return topics

    @contextlib.contextmanager
    def _client(self) -> Iterator[mqtt.Client]:
        client = mqtt.Client(CallbackAPIVersion.VERSION2)
        client.connect(self.host, self.port)
        client.loop_start()
        try:
            yield client
        finally:
            client.disconnect()
            client.loop_stop()


def standard_mosquitto() -> MosquittoServer | None:
    server = MosquittoServer()
    return server if server.answers() else None


# --- Servers of our own


class PrivateServer(ABC):
    """A server process on a free port with a folder of its own, both kept over `stop()` and `start()`.

    Not started yet after construction. Call `remove()` at the end.
    """

    name: ClassVar[str]
    debian_package: ClassVar[str]
    program: ClassVar[str]
    program_folders: ClassVar[tuple[str, ...]] = ()
    start_timeout_s: ClassVar[float] = 20.0

    def __init__(self, port: int | None = None) -> None:
        self.executable = self.find()
        self.port = port or free_port()
        self.user = self.server_user()
        # Not pytest's tmp_path: another user than root must get in, and socket paths must stay short.
        self.folder = Path(tempfile.mkdtemp(prefix=f"mt-{self.program}-"))
        if self.user:
            shutil.chown(self.folder, self.user, self.user)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls) -> Path:
        found = find_program(cls.program, *cls.program_folders)
        if not found:
            raise ServiceMissing(f"the program {cls.program} is not installed; {cls.remedy()}")
        return found

    @classmethod
    def remedy(cls) -> str:
        return f"to have it: install {cls.name} (Debian: apt-get install {cls.debian_package})"

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def is_ready(self) -> bool: ...

    def server_user(self) -> str | None:
        """The user to run as, when this process is root and the server refuses to be."""
        return None

    def environment(self) -> dict[str, str]:
        return {}

    def prepare(self) -> None:  # noqa: B027 - most servers need nothing
        """Make what a start needs in the folder."""

    @property
    def log(self) -> str:
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process, f"{self.name} has not been started"
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert not self.is_alive(), f"{self.name} runs already"
        self.prepare()
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._as_server(),
            )

        def is_up() -> bool:
            assert self.is_alive(), f"{self.name} exited with {self._process.poll()}:\n{self.log}"
            return self.is_ready()

        eventually(is_up, self.start_timeout_s, lambda: f"{self.name} answers on port {self.port}:\n{self.log}")

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Shut it down in order; its data stays."""
        self._end(signum)

    def kill9(self) -> None:
        """Kill it and its children at once; its data stays as it is."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        processes.send([self.pid, *processes.descendants(self.pid)], signal.SIGSTOP)

    def resume(self) -> None:
        processes.send([self.pid, *processes.descendants(self.pid)], signal.SIGCONT)

    def remove(self) -> None:
        """Kill it and delete its folder."""
        if self.is_alive():
            self.kill9()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path) -> None:
        """Run a helper program of the server to its end, as the server's user."""
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **self._as_server(),
        )
        assert done.returncode == 0, f"{command[0]} failed: {done.stdout}{done.stderr}"

    def _as_server(self) -> dict:
        given_up = {"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}
        return {"cwd": self.folder, "env": {**os.environ, **self.environment()}, **given_up}

    def _end(self, signum: signal.Signals) -> None:
        everyone = [self.pid, *processes.descendants(self.pid)]
        if signum == signal.SIGKILL:
            processes.send(everyone, signum)
        else:
            self.resume()  # a frozen process would not act on a signal
            processes.send([self.pid], signum)
        try:
            self._process.wait(self.start_timeout_s)
            eventually(lambda: not any(map(processes.is_running, everyone)), 5, f"{self.name} and its children end")
        except (subprocess.TimeoutExpired, AssertionError):
            processes.send(everyone, signal.SIGKILL)
            self._process.wait(self.start_timeout_s)


class PrivatePostgres(PrivateServer):
    """PostgreSQL with one superuser `postgres`, trusted on 127.0.0.1; it does not fsync."""

    name = "PostgreSQL"
    debian_package = "postgresql"
    program = "postgres"
    program_folders = POSTGRES_FOLDERS

    @property
    def server(self) -> PostgresServer:
        return PostgresServer(port=self.port)

    @property
    def url(self) -> str:
        """Of the database `postgres`; `server.database()` makes others."""
        return self.server.url("postgres")

    def server_user(self) -> str | None:
        if os.geteuid() != 0:
            return None
        try:
            return pwd.getpwnam("postgres").pw_name
        except KeyError:
            raise ServiceMissing("PostgreSQL does not run as root and there is no user `postgres`") from None

    def prepare(self) -> None:
        if not (self.folder / "data").exists():
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
            self.run(self.executable.with_name("initdb"), "-D", self.folder / "data", *options)

    def command(self) -> list[str]:
        settings = {"listen_addresses": HOST, "port": self.port, "unix_socket_directories": self.folder, "fsync": "off"}
        return [str(self.executable), "-D", "data", *(f"--{name}={value}" for name, value in settings.items())]

    def is_ready(self) -> bool:
        return self.server.can_create_databases()

    def stop(self, signum: signal.Signals = signal.SIGINT) -> None:
        """A fast shutdown: SIGTERM would wait for the clients."""
        super().stop(signum)


class PrivateRedis(PrivateServer):
    """Redis; `options` are more words of its command line, such as "--appendonly", "yes"."""

    name = "Redis"
    debian_package = "redis-server"
    program = "redis-server"

    def __init__(self, *options: str, port: int | None = None) -> None:
        super().__init__(port)
        self._options = options

    @property
    def server(self) -> RedisServer:
        return RedisServer(port=self.port)

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        own = ["--port", str(self.port), "--bind", HOST, "--dir", str(self.folder), "--save", "", "--appendonly", "no"]
        return [str(self.executable), *own, *self._options]

    def is_ready(self) -> bool:
        return self.server.answers()


class PrivateRabbitmq(PrivateServer):
    """RabbitMQ with its own Erlang port mapper, so that no daemon is left; takes some 5 s to start."""

    name = "RabbitMQ"
    debian_package = "rabbitmq-server"
    program = "rabbitmq-server"
    program_folders = RABBITMQ_FOLDERS
    start_timeout_s = 60.0

    def __init__(self, port: int | None = None) -> None:
        super().__init__(port)
        self._mapper_port, self._distribution_port = free_port(), free_port()

    @property
    def server(self) -> RabbitmqServer:
        control = find_program("rabbitmqctl", *RABBITMQ_FOLDERS)
        return RabbitmqServer(self.port, (str(control),) if control else (), self.environment())

    @property
    def url(self) -> str:
        """Of the default vhost; `server.vhost()` makes others."""
        return self.server.url()

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.folder),  # the Erlang cookie is made here
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": f"media-tasks-test-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CTL_ERL_ARGS": "",
        }

    def prepare(self) -> None:
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text("log.file.level = warning\n")

    def command(self) -> list[str]:
        return [str(self.executable)]

    def is_ready(self) -> bool:
        return self.server.answers()

    def remove(self) -> None:
        if self.is_alive():
            self.kill9()
        if mapper := find_program("epmd"):
            subprocess.run(
                [mapper, "-kill"], env={**os.environ, **self.environment()}, capture_output=True, check=False
            )
        super().remove()


class PrivateMosquitto(PrivateServer):
    """Mosquitto on 127.0.0.1, for anyone unless `allow_anonymous` is False; `lines` are added to its configuration."""

    name = "Mosquitto"
    debian_package = "mosquitto"
    program = "mosquitto"

    def __init__(self, *lines: str, port: int | None = None, allow_anonymous: bool = True) -> None:
        super().__init__(port)
        self._lines = lines
        self._allow_anonymous = allow_anonymous

    @property
    def server(self) -> MosquittoServer:
        return MosquittoServer(port=self.port)

    def prepare(self) -> None:
        lines = [f"listener {self.port} {HOST}", f"allow_anonymous {str(self._allow_anonymous).lower()}"]
        if os.geteuid() == 0:
            lines.append("user root")  # it would become the user mosquitto, who can't read the folder
        (self.folder / "mosquitto.conf").write_text("\n".join([*lines, *self._lines, ""]))

    def command(self) -> list[str]:
        return [str(self.executable), "-c", str(self.folder / "mosquitto.conf")]

    def is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), CONNECT_TIMEOUT_S):
                return True
        except OSError:
            return False
