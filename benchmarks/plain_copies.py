"""Plain copies to compare sources of experts with: over a socket, and to a GPU."""

import ctypes
import socket
import threading

import numpy as np

WHAT = "the benchmark"


class PlainSocket:
    """Sends the same bytes to every client: the most that a socket alone can do."""

    def __init__(self, data: np.ndarray):
        self._data = data.reshape(-1).view(np.uint8)
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def receive(self) -> np.ndarray:
        found, done = np.empty(self._data.nbytes, np.uint8), 0
        with socket.create_connection(self._socket.getsockname(), 30) as connection:
            while done < found.nbytes:
                received = connection.recv_into(memoryview(found)[done:])
                if not received:
                    raise ConnectionError("the plain socket closed too early")
                done += received
        return found

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self._data)


class PinnedCopy:
    """Copies arrays to the GPU, one copy each, out of host memory that is already pinned."""

    def __init__(self, sources: list[np.ndarray]):
        from eep_jax.heap.cuda.libcuda import Device

        self._device, self._bytes = Device(0, WHAT), [source.nbytes for source in sources]
        self._event = self._device.new_event(WHAT)
        self._target = self._device.allocate(max(self._bytes), WHAT)
        self._hosts = [self._device.allocate_pinned(nbytes, WHAT) for nbytes in self._bytes]
        for address, source in zip(self._hosts, sources, strict=True):
            ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def copy(self) -> None:
        for address, nbytes in zip(self._hosts, self._bytes, strict=True):
            self._device.begin_upload(self._target, address, nbytes, WHAT)
        self._device.record(self._event, WHAT)
        self._device.wait(self._event, WHAT)

    def close(self) -> None:
        for address in self._hosts:
            self._device.free_pinned(address, WHAT)
        self._device.free(self._target, WHAT)
        self._device.free_event(self._event, WHAT)
        self._device.close()
