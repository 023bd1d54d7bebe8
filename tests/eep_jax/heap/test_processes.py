"""The heap between real processes: one is killed, and the others never notice in their memory."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.fd_passing import MESSAGE_BYTES_MAX, FdServer, close_all, receive_fds
from eep_jax.heap.posix_shm import PosixShmHeap
from tests.eep_jax.heap.test_heap import named_files

SLAB_BYTES = 8192

# No JAX in the owner: it starts in a moment. It fills its slab and tells its handle.
OWNER = f"""
import sys
from eep_jax.heap.posix_shm import PosixShmHeap
heap = PosixShmHeap(1, 2, {SLAB_BYTES})
heap.whole()[1] = int(sys.argv[1])
print(heap.export(), flush=True)
for line in sys.stdin:
    print(int(heap.whole()[1, int(line)]), flush=True)
"""

# It reads all of the slab of rank 1, and writes where it may and then where it may not.
VANDAL = f"""
import sys
from eep_jax.heap.posix_shm import PosixShmHeap
heap = PosixShmHeap(0, 2, {SLAB_BYTES}, writable_bytes={SLAB_BYTES // 2 - 1})
heap.whole()[0] = 1  # its own is its own
heap.attach(1, sys.argv[1])
for _ in range(2):
    heap.copy_in({SLAB_BYTES // 2}, 1, {SLAB_BYTES // 2}, {SLAB_BYTES // 2})
    print(int(heap.whole()[0, -1]), flush=True)
    heap.whole()[1, {SLAB_BYTES // 2 - 1}] += 1
    heap.detach(1), heap.attach(1, sys.argv[1])
heap.whole()[1, {SLAB_BYTES // 2}] = 99
print("written", flush=True)
"""


class Owner:
    """A process that owns the slab of rank 1."""

    def __init__(self, value: int):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.handle = self.process.stdout.readline().strip()

    def reads(self, offset: int) -> int:
        self.process.stdin.write(f"{offset}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.process.stdin.close(), self.process.stdout.close()


@pytest.mark.timeout(60)
def test_a_peer_reads_a_bank_and_cannot_write_it():
    heap = PosixShmHeap(1, 2, SLAB_BYTES)
    heap.whole()[1] = 17
    command = [sys.executable, "-c", VANDAL, heap.export()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    vandal = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    assert (vandal.stdout, vandal.returncode) == ("17\n17\n", -signal.SIGSEGV), vandal.stderr
    bank = SLAB_BYTES // 2
    assert heap.whole()[1, bank - 1] == 19 and set(heap.whole()[1, bank:]) == {17}
    heap.close()


@pytest.mark.timeout(60)
def test_a_survivor_keeps_its_memory_when_a_peer_is_killed_and_takes_the_next_one():
    heap = PosixShmHeap(0, 2, SLAB_BYTES)
    first = Owner(11)
    heap.attach(1, first.handle)
    assert set(heap.whole()[1]) == {11}
    heap.whole()[1, 3] = 99
    assert first.reads(3) == 99

    first.kill()
    heap.whole()[1, 4] = 98
    assert heap.whole()[1, :5].tolist() == [11, 11, 11, 99, 98]
    with pytest.raises(HeapError, match="rank 1 does not export its slab"):
        heap.attach(1, first.handle)
    heap.detach(1)
    heap.whole()[1] = 0

    second = Owner(12)
    heap.attach(1, second.handle)
    assert set(heap.whole()[1]) == {12}
    heap.whole()[1, 7] = 97
    assert second.reads(7) == 97
    second.kill()
    assert named_files(heap) == [], "whatever is killed, no memory stays behind"
    heap.close()


@pytest.fixture
def serve():
    """Serves memory files beside a message; everything is closed after the test."""
    servers, files = [], []

    def a_server(count: int = 1, message: bytes = b"") -> tuple[FdServer, list[int]]:
        made = [os.memfd_create("eep-test") for _ in range(count)]
        files.extend(made)
        servers.append(FdServer(made, message))
        return servers[-1], made

    yield a_server
    for server in servers:
        server.close()
    close_all(files)


@pytest.mark.parametrize("message", [b"", b"4096", bytes(MESSAGE_BYTES_MAX)], ids=len)
def test_descriptors_arrive_as_the_same_files_in_order_beside_the_message(serve, message):
    server, files = serve(2, message)
    said, copies = receive_fds(server.name, 2, 2_000)
    os.write(copies[1], b"abc")
    assert os.pread(files[1], 3, 0) == b"abc" and os.pread(files[0], 3, 0) == b""
    assert said == message
    assert not any(os.get_inheritable(copy) for copy in copies)
    close_all(copies)


def test_a_message_that_is_too_long_is_refused_by_the_server():
    with pytest.raises(ValueError, match=str(MESSAGE_BYTES_MAX)):
        FdServer([0], bytes(MESSAGE_BYTES_MAX + 1))


@pytest.mark.parametrize(("sent", "expected"), [(1, 2), (2, 1), (3, 1)])
def test_another_number_of_descriptors_is_an_error_and_leaks_none(serve, sent, expected):
    server, _ = serve(sent)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConnectionError, match=f"expected {expected}"):
        receive_fds(server.name, expected, 2_000)
    deadline = time.monotonic() + 60  # the server's thread closes its end of the connection
    while len(os.listdir("/proc/self/fd")) > open_files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= open_files


def test_many_may_ask_a_server_at_once(serve):
    server, (fd,) = serve()
    inode = os.fstat(fd).st_ino
    copies = [receive_fds(server.name, 1, 2_000)[1][0] for _ in range(20)]
    assert {os.fstat(copy).st_ino for copy in copies} == {inode}
    close_all(copies)


@pytest.mark.parametrize("name", ["nobody", "eep-1-00", "x" * 90])
def test_a_name_that_nobody_serves_is_an_os_error(name):
    with pytest.raises(OSError):
        receive_fds(name, 1, 200)


def test_a_closed_server_answers_nobody():
    server = FdServer([0])
    server.close()
    server.close()
    with pytest.raises(OSError):
        receive_fds(server.name, 1, 200)


def test_a_silent_server_is_given_up_at_the_deadline():
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("\0eep-test-silent-" + str(os.getpid()))
        silent.listen(1)
        with pytest.raises(TimeoutError):
            receive_fds(f"eep-test-silent-{os.getpid()}", 1, 50)


def test_a_server_that_stops_half_way_is_given_up_at_the_deadline_and_leaks_nothing(serve):
    _, (fd,) = serve()
    name = f"eep-test-half-{os.getpid()}"
    open_files = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind("\0" + name)
        slow.listen(1)
        held = []

        def serve_half():
            held.append(slow.accept()[0])
            socket.send_fds(held[0], [b"f12"], [fd])

        thread = threading.Thread(target=serve_half)
        thread.start()
        with pytest.raises(TimeoutError):
            receive_fds(name, 1, 200)
        thread.join(5)
        held[0].close()
    assert len(os.listdir("/proc/self/fd")) <= open_files


def test_slabs_are_zero_at_first():
    heap = PosixShmHeap(0, 2, SLAB_BYTES)
    assert not np.any(heap.whole())
    heap.close()
