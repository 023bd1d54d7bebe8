"""File descriptors between processes of one host, over a UNIX socket in the abstract namespace."""

import os
import secrets
import socket
import struct
import threading
import time

ACCEPT_PAUSE_S = 0.05


class FdServer:
    """Hands a copy of one file descriptor to every process of the same user that asks."""

    def __init__(self, fd: int):
        self.name = f"eep-{os.getpid()}-{secrets.token_hex(8)}"
        self._fd = fd
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.bind("\0" + self.name)
        self._socket.listen(64)
        threading.Thread(target=self._serve, name="fd-server", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        # Shutting down, not just closing, is what wakes a thread that sits in accept.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(ACCEPT_PAUSE_S)  # out of descriptors, say: it may pass
                continue
            with peer:
                try:
                    peer.settimeout(1.0)
                    if _user_of(peer) == os.geteuid():
                        socket.send_fds(peer, [b"f"], [self._fd])
                except OSError:
                    continue  # the asking process is gone; the next one may be well


def receive_fd(name: str, deadline_ms: int) -> int:
    """The descriptor served under `name`, opened here. Raises OSError within the deadline."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as server:
        server.settimeout(deadline_ms / 1000)
        server.connect("\0" + name)
        if _user_of(server) != os.geteuid():
            raise PermissionError(f"socket {name} belongs to user {_user_of(server)}")
        _, fds, _, _ = socket.recv_fds(server, 1, 1)
    if len(fds) != 1:
        raise ConnectionError(f"socket {name} sent {len(fds)} descriptors, expected 1")
    return fds[0]


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]
