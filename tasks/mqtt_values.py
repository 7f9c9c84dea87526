"""What can be a host, a topic or a name for MQTT. In: the text of a setting or a command. Out: what is wrong with it.

No answer holds the text itself: a URL in the place of a host may hold a password.
"""

import socket
from typing import Final

# https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html, 1.5.4; a worker's name follows its prefix.
LONGEST_BYTES: Final = 65_535
LONGEST_TOPIC_BYTES: Final = 60_000


def host_fault(value: str) -> str | None:
    """Why it can't be a host."""
    if value.startswith("["):
        return "is an address with brackets; write it without"
    if not value.isprintable() or set(value) & set(" /@?#") or (":" in value and not _is_address(value)):
        return "is a host name or an address, no URL; write only that, and its port in MQTT_PORT"
    return None


def topic_fault(value: str) -> str | None:
    """Why nothing can be published there: a wildcard, an outer slash, the broker's own, or no room for a name."""
    if any(c in value for c in "#+\0") or value != value.strip("/") or value.startswith("$"):
        return "is no topic to publish to; write it without #, +, outer slashes and a leading $"
    if not is_sendable(value, LONGEST_TOPIC_BYTES):
        return f"can't be a topic; it must be UTF-8, of at most {LONGEST_TOPIC_BYTES:,} bytes"
    return None


def secret_fault(value: str) -> str | None:
    """Why it can't be a user's name or password."""
    return None if is_sendable(value) else f"can't be sent; it must be UTF-8, of at most {LONGEST_BYTES:,} bytes"


def is_sendable(text: str, most_bytes: int = LONGEST_BYTES) -> bool:
    """Whether MQTT can carry it as a name, topic or pattern."""
    try:
        return "\0" not in text and len(text.encode()) <= most_bytes
    except UnicodeEncodeError:
        return False


def _is_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except OSError:
        return False
    return True
