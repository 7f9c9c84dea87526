"""How a sleeping consumer learns of a message: an empty datagram to the Unix socket that it waits on.

In: the path of a consumer's socket. Out: `Inbox`, a descriptor that turns readable, and `wake`. It is a hint and never
more: a lost datagram costs one poll interval, and no message.
"""

import os
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_ADDRESS = 100  # bytes; sun_path holds 108 on Linux and 104 on macOS


class Inbox:
    """The socket of one consumer.

    Raises:
        OSError: the socket can't be made at `path`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pid = os.getpid()
        self._woken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with _address(path) as address:
            self._socket.bind(address)

    def fileno(self) -> int:
        return self._socket.fileno()

    def wake(self) -> None:
        """Make the socket readable, from any thread of this process; once until it is drained."""
        if not self._woken:
            self._woken = True
            _send(self._socket, self._path)

    def drain(self) -> None:
        """Take what is there. Look for messages after this, never before: what comes later wakes again."""
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        self._woken = False

    def wait(self, timeout_s: float) -> None:
        """Return after a wake-up or the timeout."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.poll(timeout_s * 1000)
        self.drain()

    def close(self) -> None:
        """Close the socket; its file goes too, unless it belongs to the process that forked this one."""
        self._socket.close()
        if self._pid == os.getpid():
            self._path.unlink(missing_ok=True)


def wake(paths: Iterable[Path]) -> None:
    """Send each a datagram. A full socket wakes anyway, and one that is gone belongs to a dead consumer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        for path in paths:
            _send(sender, path)


def _send(sender: socket.socket, path: Path) -> None:
    with suppress(OSError), _address(path) as address:
        sender.sendto(b"", address)


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket address: on Linux a long one is reached through its directory."""
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
