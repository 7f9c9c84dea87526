"""The broker's tables, and every SQL statement that touches them.

In: messages as kombu hands them over, with a queue. Out: `Delivery`, in claim order. A message is ready (no owner) or
reserved (its owner is the name of a lease); an acknowledgement deletes it. Each method is one transaction, or joins
the one that `transaction()` has begun.
"""

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.broker.database import Database

VERSION = 1
_PURGE_BATCH = 10_000  # messages; other writers get their turn between two batches

SCHEMA = """
CREATE TABLE IF NOT EXISTS queues (
    name TEXT PRIMARY KEY,
    ready INTEGER NOT NULL DEFAULT 0,      -- kept by the triggers: counting a million rows takes 130 ms
    auto_delete INTEGER NOT NULL DEFAULT 0,
    owner TEXT,                            -- of an exclusive queue
    message_ttl_s REAL,
    expires_s REAL,                        -- the queue goes when it was unused for so long
    virtual_time REAL NOT NULL DEFAULT 0,  -- of WEIGHTED_RANDOM: the order of the message that was claimed last
    used_at REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS bindings (
    exchange TEXT, routing_key TEXT, pattern TEXT, queue TEXT, PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS consumers (queue TEXT, owner TEXT, tag TEXT, PRIMARY KEY (queue, owner, tag)) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again: it is the delivery tag
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    "order" REAL NOT NULL,
    owner TEXT,
    deliveries INTEGER NOT NULL DEFAULT 0,
    expires_at REAL,
    correlation_id TEXT,
    envelope TEXT NOT NULL,                -- JSON: headers, properties, content type and encoding
    body                                   -- text or bytes, as the serializer made it
);
CREATE INDEX IF NOT EXISTS messages_ready ON messages (queue, priority DESC, "order", id) WHERE owner IS NULL;
CREATE INDEX IF NOT EXISTS messages_reserved ON messages (owner) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_expiring ON messages (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_correlation ON messages (correlation_id) WHERE correlation_id IS NOT NULL;

CREATE TRIGGER IF NOT EXISTS message_put AFTER INSERT ON messages BEGIN
    INSERT INTO queues (name, ready) VALUES (NEW.queue, 1) ON CONFLICT (name) DO UPDATE SET ready = ready + 1;
END;
CREATE TRIGGER IF NOT EXISTS message_moved AFTER UPDATE OF owner ON messages BEGIN
    UPDATE queues SET ready = ready - (OLD.owner IS NULL) + (NEW.owner IS NULL) WHERE name = NEW.queue;
END;
CREATE TRIGGER IF NOT EXISTS message_deleted AFTER DELETE ON messages WHEN OLD.owner IS NULL BEGIN
    UPDATE queues SET ready = ready - 1 WHERE name = OLD.queue;
END;
"""

_PUT = """
INSERT INTO messages (queue, priority, "order", expires_at, correlation_id, envelope, body) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_NEXT = """
WHERE id IN (
    SELECT id FROM messages WHERE queue = ? AND owner IS NULL AND (expires_at IS NULL OR expires_at > ?)
    ORDER BY priority DESC, "order", id LIMIT ?
)
"""
_RETURNING = 'RETURNING priority, "order", id, queue, deliveries, envelope, body'
_RESERVE = "UPDATE messages SET owner = ?, deliveries = deliveries + 1" + _NEXT + _RETURNING  # noqa: S608  # constants
_TAKE = "DELETE FROM messages" + _NEXT + _RETURNING  # noqa: S608  # constants
_PURGE = """
DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE queue = ? AND owner IS NULL LIMIT ?)
"""
_ADDRESSED = """
SELECT id, queue, correlation_id, envelope FROM messages WHERE id > ? AND correlation_id IS NOT NULL ORDER BY id LIMIT ?
"""
_EXPIRE = "DELETE FROM messages WHERE expires_at <= ? AND owner IS NULL"
_EXPIRED = "SELECT 1 FROM messages WHERE expires_at <= ? AND owner IS NULL LIMIT 1"
_UNUSED_QUEUES = """
SELECT name FROM queues WHERE used_at + expires_s <= ? AND NOT EXISTS (SELECT 1 FROM consumers WHERE queue = name)
"""
_DECLARE = """
INSERT INTO queues (name, auto_delete, owner, message_ttl_s, expires_s, used_at) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (name) DO UPDATE SET auto_delete = excluded.auto_delete, owner = excluded.owner,
    message_ttl_s = excluded.message_ttl_s, expires_s = excluded.expires_s, used_at = excluded.used_at
"""
_OWNERS = """
SELECT owner FROM messages WHERE owner IS NOT NULL
UNION SELECT owner FROM consumers UNION SELECT owner FROM queues WHERE owner IS NOT NULL
"""

# A strategy turns a message's priority, the time and the queue's virtual time into the two leading columns of the claim
# order: higher priority first, then lower order, then lower id. It runs when the message is put, so claiming is one
# step in one index. WEIGHTED_RANDOM draws with a probability in proportion to the priority: of exponential variables
# with the rates w the smallest belongs to i with w_i / sum(w), and since they have no memory, those that came later may
# start at the virtual time (Efraimidis and Spirakis, Weighted random sampling with a reservoir, IPL 97, 2006).
Strategy = Callable[[int, float, float], tuple[int, float]]
STRATEGIES: Mapping[str, Strategy] = {
    "FIFO": lambda _priority, _now, _virtual: (0, 0.0),
    "LIFO": lambda _priority, now, _virtual: (0, -now),
    "PRIORITY": lambda priority, _now, _virtual: (priority, 0.0),
    "WEIGHTED_RANDOM": lambda priority, _now, virtual: (0, virtual + random.expovariate(max(priority, 1))),
}


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way to a consumer. `count` is 1 at the first delivery."""

    id: int
    queue: str
    count: int
    envelope: str
    body: str | bytes


@dataclass(frozen=True, slots=True)
class Addressed:
    """A message that stays where it is, ready or reserved, and whom it is for (Celery: the task id)."""

    id: int
    queue: str
    correlation_id: str
    envelope: str


class MessageStore:
    """The messages, queues, bindings and consumers of one file.

    Args:
        queue_strategy: claim order by queue name; `*` stands for all others. See `STRATEGIES`.

    Raises:
        ValueError: a strategy has an unknown name.
    """

    def __init__(
        self, path: Path, *, queue_strategy: Mapping[str, str] | None = None, busy_timeout_s: float = 5.0
    ) -> None:
        queue_strategy = queue_strategy or {}
        if unknown := set(queue_strategy.values()) - set(STRATEGIES):
            raise ValueError(f"queue_strategy {', '.join(sorted(unknown))}: use one of {', '.join(STRATEGIES)}")
        self._strategies = {"*": "PRIORITY", **queue_strategy}
        self._database = Database(path, schema=SCHEMA, version=VERSION, busy_timeout_s=busy_timeout_s)
        self.open = self._database.open
        self.close = self._database.close
        self.check = self._database.check

    def transaction(self) -> AbstractContextManager[Any]:
        """Join the calls of the block into one transaction."""
        return self._database.transaction()

    # Messages

    def put(
        self,
        queues: Collection[str],
        envelope: str,
        body: str | bytes,
        *,
        priority: int = 0,
        ttl_s: float | None = None,
        correlation_id: str | None = None,
    ) -> set[str]:
        """Store one copy per queue and return who consumes from them. A queue that nobody declared is made."""
        now = time.time()
        with self._database.transaction() as db:
            for queue in queues:
                strategy = STRATEGIES[self._strategy_of(queue)]
                row = db.execute("SELECT message_ttl_s, virtual_time FROM queues WHERE name = ?", (queue,)).fetchone()
                queue_ttl_s, virtual_time = row or (None, 0.0)
                ttls_s = [ttl for ttl in (ttl_s, queue_ttl_s) if ttl is not None]
                expires_at = now + min(ttls_s) if ttls_s else None
                order = strategy(priority, now, virtual_time)
                db.execute(_PUT, (queue, *order, expires_at, correlation_id, envelope, body))
            return self.consumers_of(queues)

    def ready(self, queues: Collection[str]) -> set[str]:
        """Tell which of the queues have messages to reserve. Takes no lock."""
        find = "SELECT 1 FROM queues WHERE name = ? AND ready > 0"
        with self._database.transaction(write=False) as db:
            return {queue for queue in queues if db.execute(find, (queue,)).fetchone()}

    def reserve(self, queue: str, owner: str, limit: int) -> list[Delivery]:
        """Give the next messages to an owner, until it acknowledges or requeues them, or dies."""
        return self._next(queue, _RESERVE, (owner, queue, time.time(), limit))

    def take(self, queue: str, limit: int) -> list[Delivery]:
        """Remove and return the next messages: for consumers that never acknowledge."""
        return self._next(queue, _TAKE, (queue, time.time(), limit))

    def _next(self, queue: str, statement: str, parameters: tuple[object, ...]) -> list[Delivery]:
        with self._database.transaction() as db:
            rows = db.execute(statement, parameters).fetchall()
            if rows and self._strategy_of(queue) == "WEIGHTED_RANDOM":
                advance = "UPDATE queues SET virtual_time = max(virtual_time, ?) WHERE name = ?"
                db.execute(advance, (max(row[1] for row in rows), queue))
        rows.sort(key=lambda row: (-row[0], row[1], row[2]))  # RETURNING promises no order
        return [Delivery(*row[2:]) for row in rows]

    def _strategy_of(self, queue: str) -> str:
        return self._strategies.get(queue) or self._strategies["*"]

    def ack(self, ids: Iterable[int], owner: str) -> None:
        """Delete what this owner has reserved; what is no longer its own stays untouched."""
        with self._database.transaction() as db:
            db.executemany("DELETE FROM messages WHERE id = ? AND owner = ?", [(id_, owner) for id_ in ids])

    def requeue(self, ids: Iterable[int], owner: str) -> None:
        """Give back what this owner has reserved, to where it stood in its queue."""
        with self._database.transaction() as db:
            db.executemany("UPDATE messages SET owner = NULL WHERE id = ? AND owner = ?", [(id_, owner) for id_ in ids])

    def held(self, correlation_ids: Iterable[str]) -> set[str]:
        """Return those ids (Celery: task ids) of which the broker has a message, ready or reserved."""
        with self._database.transaction(write=False) as db:
            find = "SELECT 1 FROM messages WHERE correlation_id = ? LIMIT 1"
            return {id_ for id_ in correlation_ids if db.execute(find, (id_,)).fetchone()}

    def addressed(self, after: int, limit: int) -> list[Addressed]:
        """Return the messages with a correlation id that follow the one with that id, ready or reserved."""
        with self._database.transaction(write=False) as db:
            return [Addressed(*row) for row in db.execute(_ADDRESSED, (after, limit))]

    def purge(self, queue: str) -> int:
        """Delete the ready messages of a queue and return their number."""
        purged, batch = 0, _PURGE_BATCH
        while batch == _PURGE_BATCH:
            with self._database.transaction() as db:
                batch = db.execute(_PURGE, (queue, _PURGE_BATCH)).rowcount
                purged += batch
        return purged

    # Queues and bindings

    def declare(
        self,
        queue: str,
        *,
        owner: str | None = None,
        auto_delete: bool = False,
        message_ttl_s: float | None = None,
        expires_s: float | None = None,
    ) -> None:
        """Make a queue, or change it. With an owner it is exclusive and goes when that owner does."""
        with self._database.transaction() as db:
            db.execute(_DECLARE, (queue, auto_delete, owner, message_ttl_s, expires_s, time.time()))

    def exclusive_owner(self, queue: str) -> str | None:
        with self._database.transaction(write=False) as db:
            for (owner,) in db.execute("SELECT owner FROM queues WHERE name = ?", (queue,)):
                return str(owner) if owner is not None else None
            return None

    def sizes(self) -> dict[str, int]:
        """Ready messages by queue; empty queues are listed too."""
        with self._database.transaction(write=False) as db:
            return dict(db.execute("SELECT name, ready FROM queues"))

    def size(self, queue: str) -> int | None:
        """Ready messages, or None if there is no such queue."""
        with self._database.transaction(write=False) as db:
            row: tuple[int] | None = db.execute("SELECT ready FROM queues WHERE name = ?", (queue,)).fetchone()
            return None if row is None else row[0]

    def delete(self, queue: str) -> None:
        """Remove a queue with its bindings, consumers and messages, reserved ones included."""
        self.purge(queue)
        with self._database.transaction() as db:
            db.execute("DELETE FROM messages WHERE queue = ? AND owner IS NULL", (queue,))
            db.execute("DELETE FROM messages WHERE owner IS NOT NULL AND queue = ?", (queue,))
            db.execute("DELETE FROM bindings WHERE queue = ?", (queue,))
            db.execute("DELETE FROM consumers WHERE queue = ?", (queue,))
            db.execute("DELETE FROM queues WHERE name = ?", (queue,))

    def bind(self, queue: str, exchange: str, routing_key: str, pattern: str | None) -> None:
        with self._database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?)", (exchange, routing_key, pattern, queue))

    def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        with self._database.transaction() as db:
            forget = "DELETE FROM bindings WHERE (exchange, routing_key, queue) = (?, ?, ?)"
            db.execute(forget, (exchange, routing_key, queue))

    def bindings(self, exchange: str) -> list[tuple[str, str | None, str]]:
        """Routing key, pattern and queue of each binding of an exchange."""
        with self._database.transaction(write=False) as db:
            find = "SELECT routing_key, pattern, queue FROM bindings WHERE exchange = ?"
            return db.execute(find, (exchange,)).fetchall()

    # Consumers and other owners

    def add_consumer(self, queue: str, owner: str, tag: str) -> None:
        with self._database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO consumers VALUES (?, ?, ?)", (queue, owner, tag))

    def remove_consumer(self, queue: str, owner: str, tag: str) -> None:
        """Forget a consumer. The last one takes an auto-delete queue with it."""
        with self._database.transaction() as db:
            forget = "DELETE FROM consumers WHERE (queue, owner, tag) = (?, ?, ?)"
            if db.execute(forget, (queue, owner, tag)).rowcount:
                touch = "UPDATE queues SET used_at = ? WHERE name = ? RETURNING auto_delete"
                is_auto_delete = db.execute(touch, (time.time(), queue)).fetchall() == [(1,)]
                if is_auto_delete and not self.consumers_of([queue]):
                    self.delete(queue)

    def consumers_of(self, queues: Collection[str]) -> set[str]:
        """Owners that consume from any of the queues."""
        find = "SELECT owner FROM consumers WHERE queue = ?"
        with self._database.transaction(write=False) as db:
            return {owner for queue in queues for (owner,) in db.execute(find, (queue,))}

    def owners(self) -> set[str]:
        """All that hold messages, consume or own an exclusive queue, dead or alive."""
        with self._database.transaction(write=False) as db:
            return {owner for (owner,) in db.execute(_OWNERS)}

    def release(self, owner: str) -> set[str]:
        """Undo all that an owner holds, and return the queues that got messages back. For the dead and the leaving."""
        with self._database.transaction() as db:
            returned = {queue for (queue,) in db.execute("SELECT queue FROM messages WHERE owner = ?", (owner,))}
            db.execute("UPDATE messages SET owner = NULL WHERE owner = ?", (owner,))
            for queue, tag in db.execute("SELECT queue, tag FROM consumers WHERE owner = ?", (owner,)).fetchall():
                self.remove_consumer(queue, owner, tag)
            for (queue,) in db.execute("SELECT name FROM queues WHERE owner = ?", (owner,)).fetchall():
                self.delete(queue)
        return returned

    def expire(self) -> None:
        """Delete messages past their time to live, and queues that were unused for longer than they may."""
        now = time.time()
        with self._database.transaction(write=False) as db:
            is_due = db.execute(_EXPIRED, (now,)).fetchone() or db.execute(_UNUSED_QUEUES, (now,)).fetchone()
        if is_due:
            with self._database.transaction() as db:
                db.execute(_EXPIRE, (now,))
                for (queue,) in db.execute(_UNUSED_QUEUES, (now,)).fetchall():
                    self.delete(queue)
