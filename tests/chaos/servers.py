"""The servers of a combination, brokers and databases, and what can be done to them. In: nothing but their programs.

Each has `env` for workers and producers, `harms` (what havoc may do: a name, and a call that gets a `hold`, which waits
for as long as the harm is to last), and, once all is over, what it still holds. Another server is another class with
`start`, `env`, `harms` and `remove` in the list of a combination.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path

import psycopg
from kombu import Connection

from tests import services

Hold = Callable[[], object]
Harm = Callable[[Hold], None]


class Server:
    """What all have in common."""

    name = ""
    env: Mapping[str, str] = {}

    def start(self) -> None:
        """Make it ready; what is embedded is."""

    def remove(self) -> None:
        """End it and delete its data."""

    @property
    def harms(self) -> dict[str, Harm]:
        return {}

    def remains(self, queues: Iterable[str]) -> dict[str, int]:
        """Messages that it still holds, by queue; queues without any are left out."""
        return {}

    @property
    def log(self) -> str:
        return ""


# --- Brokers


class EmbeddedBroker(Server):
    name = "embedded"

    def __init__(self, server_dir: Path) -> None:
        self._path = server_dir / "broker.db"

    @property
    def harms(self) -> dict[str, Harm]:
        return {"broker emptied": self._empty, "broker deleted": self._delete}

    def remains(self, queues: Iterable[str]) -> dict[str, int]:
        with closing(sqlite3.connect(self._path, timeout=10)) as connection:
            counts = dict(connection.execute("SELECT queue, count(*) FROM messages GROUP BY queue"))
        return {queue: counts[queue] for queue in queues if counts.get(queue)}

    def _empty(self, _hold: Hold) -> None:
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self._path, timeout=10)) as connection:
            connection.execute("DELETE FROM messages")
            connection.commit()

    def _delete(self, _hold: Hold) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)


class ServerProcess(Server):
    """A private server, which can be restarted, stopped for a while and frozen."""

    part = "broker"

    def __init__(self, server: services.PrivateServer) -> None:
        self._server = server

    def start(self) -> None:
        self._server.start()

    def remove(self) -> None:
        self._server.remove()

    @property
    def log(self) -> str:
        return self._server.log

    @property
    def harms(self) -> dict[str, Harm]:
        return {
            f"{self.part} restarted": lambda _: self._away(lambda: None),
            f"{self.part} stopped": self._away,
            f"{self.part} frozen": self._freeze,
        }

    def _away(self, hold: Hold) -> None:
        self._server.stop()
        try:
            hold()
        finally:
            self._server.start()

    def _freeze(self, hold: Hold) -> None:
        self._server.pause()
        try:
            hold()
        finally:
            self._server.resume()


class RabbitmqBroker(ServerProcess):
    name = "rabbitmq"

    def __init__(self, queues: Iterable[str]) -> None:
        self._rabbitmq = services.PrivateRabbitmq()
        self._queues = tuple(queues)
        super().__init__(self._rabbitmq)
        self.env = {"CELERY_BROKER_URL": self._rabbitmq.url}

    @property
    def harms(self) -> dict[str, Harm]:
        return {**super().harms, "queues purged": self._purge}

    def remains(self, queues: Iterable[str]) -> dict[str, int]:
        said = self._rabbitmq.server.rabbitmqctl("list_queues", "--formatter=json", "name", "messages")
        counts = {queue["name"]: queue["messages"] for queue in json.loads(said.stdout or "[]")}
        return {queue: counts[queue] for queue in queues if counts.get(queue)}

    def _purge(self, _hold: Hold) -> None:
        with Connection(self._rabbitmq.url) as connection:
            for queue in self._queues:
                with suppress(*connection.channel_errors), connection.channel() as channel:
                    channel.queue_purge(queue)


class RedisBroker(ServerProcess):
    """What a dead worker had reserved stays in `unacked` until the visibility timeout, six hours: it does not count."""

    name = "redis"

    def __init__(self) -> None:
        self._redis = services.PrivateRedis()
        super().__init__(self._redis)
        self.env = {"CELERY_BROKER_URL": self._redis.url}

    @property
    def harms(self) -> dict[str, Harm]:
        return {**super().harms, "redis flushed": self._flush}

    def remains(self, queues: Iterable[str]) -> dict[str, int]:
        found = {}
        with self._redis.server.client() as client:
            for queue in queues:
                keys = [key for key in client.keys(f"{queue}*") if client.type(key) == "list"]
                if waiting := sum(client.llen(key) for key in keys):
                    found[queue] = waiting
        return found

    def _flush(self, _hold: Hold) -> None:
        with self._redis.server.client() as client:
            client.flushdb()


# --- Databases


class SqliteDatabase(Server):
    name = "sqlite"

    def __init__(self, server_dir: Path) -> None:
        self._path = server_dir / "media_store.db"

    @property
    def harms(self) -> dict[str, Harm]:
        return {"database locked": self._lock}

    def _lock(self, hold: Hold) -> None:
        with closing(sqlite3.connect(self._path, isolation_level=None, timeout=10)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            hold()
            connection.execute("ROLLBACK")


class PostgresDatabase(ServerProcess):
    name = "postgresql"
    part = "database"

    def __init__(self) -> None:
        self._postgres = services.PrivatePostgres()
        super().__init__(self._postgres)
        self.env = {"DATABASE_URL": self._postgres.url}

    @property
    def harms(self) -> dict[str, Harm]:
        return {**super().harms, "database locked": self._lock}

    def _lock(self, hold: Hold) -> None:
        with self._postgres.server.connect() as connection:
            connection.execute("SET lock_timeout = '20s'")
            with suppress(psycopg.errors.LockNotAvailable), connection.transaction(force_rollback=True):
                connection.execute("LOCK TABLE task_queue IN ACCESS EXCLUSIVE MODE")
                hold()


# --- MQTT


class Mosquitto(ServerProcess):
    """Keeps over a restart what is retained, and every message for a subscriber with a session."""

    name = part = "mqtt"

    def __init__(self) -> None:
        self._mosquitto = services.PrivateMosquitto(
            "persistence true", "persistence_location ./", "max_queued_messages 0"
        )
        super().__init__(self._mosquitto)
        self.port = self._mosquitto.port
        self.env = {
            "BROADCAST_TYPE": "mqtt",
            "MQTT_BROKER": services.HOST,
            "MQTT_PORT": str(self.port),
            "MQTT_HEARTBEAT_INTERVAL": "5",
        }
