"""A port that leads to a broker, over a road that can be slow, or lost without a word as a network is."""

import socket
import threading
import time
from types import TracebackType
from typing import Self

LOOK_EVERY_S = 0.05


class Road:
    """Open from `with` on.

    Args:
        port: Where it leads to, on this host.
        bytes_per_s: In each direction; None: as fast as it goes.
        refuses: A connection on which this is sent is closed; it may be changed at any time.
        says: Sent to whoever sent that, before.
    """

    def __init__(
        self, port: int, bytes_per_s: int | None = None, refuses: bytes | None = None, says: bytes = b""
    ) -> None:
        self._far_port, self._bytes_per_s, self.refuses, self._says = port, bytes_per_s, refuses, says
        self.refusals = 0
        self._is_lost = self._is_closed = False
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        for one in (self._server, *self._sockets):
            one.close()

    def lose(self) -> None:
        """From now on nothing arrives on either side, not even that a connection has ended; none is broken off."""
        self._is_lost = True

    def mend(self) -> None:
        self._is_lost = False

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._far_port))
            except OSError:  # the broker has ended
                near.close()
                continue
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _part(self, one: socket.socket) -> None:
        """Say why, and wait until the other side closes: what it goes on sending would wipe out what was said."""
        one.sendall(self._says)
        one.shutdown(socket.SHUT_WR)
        while one.recv(20_000):
            continue

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(20_000 if self.refuses else 2000):
                if self.refuses and self.refuses in data:
                    self.refusals += 1
                    if self._says:
                        self._part(one)
                    break
                if not self._is_lost:
                    other.sendall(data)
                if self._bytes_per_s is not None:
                    time.sleep(len(data) / self._bytes_per_s)
        except OSError:
            pass
        while self._is_lost and not self._is_closed:
            time.sleep(LOOK_EVERY_S)
        for end in (one, other):
            end.close()
