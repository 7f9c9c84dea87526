"""A port that leads to a broker which refuses some of what is published, with a reason code of MQTT 5."""

import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

PUBLISH = 3
QOS = 6
PUBACK = 0x40


class Judge:
    """Open from `with` on. Of what is published with QoS 1, what it refuses does not reach the broker.

    Args:
        port: Where it leads to, on this host.
        refuses: Is asked about each packet, from one thread for each connection.
        code: Answers what is refused.
    """

    def __init__(self, port: int, refuses: Callable[[bytes], bool], code: int) -> None:
        self._far_port, self._refuses, self._code = port, refuses, code
        self.refusals = 0
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one in (self._server, *self._sockets):
            one.close()

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
            threading.Thread(target=self._pass_on, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(far, near, False), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, is_judged: bool) -> None:
        try:
            with one.makefile("rb") as stream:
                while packet := _packet(stream):
                    if is_judged and self._is_refused(packet):
                        self.refusals += 1
                        one.sendall(bytes([PUBACK, 3, *_number(packet), self._code]))
                    else:
                        other.sendall(packet)
        except OSError:
            pass
        for end in (one, other):
            end.close()

    def _is_refused(self, packet: bytes) -> bool:
        return packet[0] >> 4 == PUBLISH and bool(packet[0] & QOS) and self._refuses(packet)


def _packet(stream: BinaryIO) -> bytes:
    head = stream.read(2)
    if len(head) < 2:
        return b""
    length, shift = head[1] & 127, 7
    while head[-1] & 128:
        head += stream.read(1)
        length |= (head[-1] & 127) << shift
        shift += 7
    return head + stream.read(length)


def _number(packet: bytes) -> bytes:
    """Of a PUBLISH: behind its topic."""
    start = 2
    while packet[start - 1] & 128:
        start += 1
    end = start + 2 + int.from_bytes(packet[start : start + 2])
    return packet[end : end + 2]
