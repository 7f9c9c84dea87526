"""A Celery broker in one SQLite file: nothing to install, nothing to run, several workers on one host.

    import tasks.broker
    tasks.broker.register()
    app = Celery(broker="sqlite:////var/lib/media/broker.db")

Four slashes begin an absolute path, three a relative one. Producers and workers name the same file. Transport options:

- `queue_strategy`: claim order per queue, `{"image_resize": "LIFO", "*": "PRIORITY"}`; FIFO, LIFO, PRIORITY (the
  default; higher numbers first) or WEIGHTED_RANDOM (a message of priority 10 is ten times as likely to be next as one
  of 1, so that nothing starves). The key is computed when a message is put, so producers need the same setting.
- `poll_interval`: seconds between two looks of an idle consumer (1). They notice dead consumers and a replaced file;
  new messages are announced by datagram and do not wait for it.
- `busy_timeout`: seconds to wait for another writer (5).

Delivery is at least once: a message stays until it is acknowledged, and comes back when its holder dies, with
`delivery_info["redelivered"]` and a `delivery_count`. Beside the file stands a directory `<file>.own`, with a lock and
a socket for each consumer. Who wants to look inside opens a `tasks.broker.messages.MessageStore` on the file: it tells
the sizes of queues and which task ids the broker still has. One host only; kombu and the standard library suffice.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.broker.transport import Transport as Transport

__all__ = ["Transport", "register"]


def register() -> None:
    """Let the URL scheme `sqlite` select this transport, in this process."""
    from kombu.transport import TRANSPORT_ALIASES

    TRANSPORT_ALIASES["sqlite"] = "tasks.broker:Transport"


def __getattr__(name: str) -> Any:
    """Load the transport when it is first named, so that registering costs next to nothing."""
    if name == "Transport":
        from tasks.broker.transport import Transport

        return Transport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
