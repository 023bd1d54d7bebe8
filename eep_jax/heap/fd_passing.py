"""File descriptors passed between processes of one host, over an abstract UNIX socket."""

import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

ACCEPT_PAUSE_S = 0.05
MESSAGE_BYTES_MAX = 1024

_FIRST_BYTE = b"f"  # descriptors need at least one byte beside them


class FdServer:
    """Sends copies of file descriptors and a short message to any process of the same user."""

    def __init__(self, fds: Sequence[int], message: bytes = b""):
        if len(message) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(message)} bytes exceeds {MESSAGE_BYTES_MAX=}")
        self.name = f"eep-{os.getpid()}-{secrets.token_hex(8)}"
        self._fds, self._message = tuple(fds), message
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.bind("\0" + self.name)
        self._socket.listen(64)
        threading.Thread(target=self._serve, name="fd-server", daemon=True).start()

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        # shutdown, unlike close, wakes a thread that is blocked in accept.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(ACCEPT_PAUSE_S)  # out of descriptors, for example: transient
                continue
            with peer:
                try:
                    peer.settimeout(1.0)
                    if _user_of(peer) == os.geteuid():
                        socket.send_fds(peer, [_FIRST_BYTE + self._message], self._fds)
                except OSError:
                    continue  # that client is gone; serve the next


def receive_fds(name: str, count: int, deadline_ms: int) -> tuple[bytes, list[int]]:
    """The message and the `count` descriptors served under `name`; the caller closes them.

    Raises OSError at the deadline, or for another number of descriptors.
    """
    end = time.monotonic() + deadline_ms / 1000
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as server:
        server.settimeout(deadline_ms / 1000)
        server.connect("\0" + name)
        if _user_of(server) != os.geteuid():
            raise PermissionError(f"socket {name} belongs to user {_user_of(server)}")
        # Room for one descriptor too many: the kernel silently drops those that do not fit.
        received, fds, _, _ = socket.recv_fds(server, 1 + MESSAGE_BYTES_MAX, count + 1)
        try:
            for fd in fds:
                os.set_inheritable(fd, False)
            if len(fds) != count:
                raise ConnectionError(
                    f"socket {name} sent {len(fds)} descriptors, expected {count}"
                )
            while len(received) <= MESSAGE_BYTES_MAX:
                server.settimeout(max(0.001, end - time.monotonic()))
                more = server.recv(1 + MESSAGE_BYTES_MAX - len(received))
                if not more:
                    break
                received += more
        except BaseException:
            close_all(fds)
            raise
    return received[len(_FIRST_BYTE) :], fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
