"""The heap between real processes: one is killed, and the others never notice in their memory."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from eep_jax.errors import HeapError
from eep_jax.heap.fd_passing import FdServer, receive_fd
from eep_jax.heap.posix_shm import PosixShmHeap

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
    with pytest.raises(HeapError, match="rank 1 does not hand out its slab"):
        heap.attach(1, first.handle)
    heap.detach(1)
    heap.whole()[1] = 0

    second = Owner(12)
    heap.attach(1, second.handle)
    assert set(heap.whole()[1]) == {12}
    heap.whole()[1, 7] = 97
    assert second.reads(7) == 97
    second.kill()
    heap.close()
    assert not [name for name in os.listdir("/dev/shm") if "eep" in name]


def test_a_descriptor_arrives_as_the_same_file():
    fd = os.memfd_create("eep-test")
    server = FdServer(fd)
    copy = receive_fd(server.name, 2_000)
    os.write(copy, b"abc")
    assert os.pread(fd, 3, 0) == b"abc"
    for opened in (fd, copy):
        os.close(opened)
    server.close()


def test_many_may_ask_a_server_at_once():
    fd = os.memfd_create("eep-test")
    server = FdServer(fd)
    inode = os.fstat(fd).st_ino
    copies = [receive_fd(server.name, 2_000) for _ in range(20)]
    assert {os.fstat(copy).st_ino for copy in copies} == {inode}
    for opened in (fd, *copies):
        os.close(opened)
    server.close()


@pytest.mark.parametrize("name", ["nobody", "eep-1-00", "x" * 90])
def test_a_name_that_nobody_serves_is_an_os_error(name):
    with pytest.raises(OSError):
        receive_fd(name, 200)


def test_a_closed_server_answers_nobody():
    server = FdServer(0)
    server.close()
    with pytest.raises(OSError):
        receive_fd(server.name, 200)


def test_a_silent_server_is_given_up_at_the_deadline():
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("\0eep-test-silent-" + str(os.getpid()))
        silent.listen(1)
        with pytest.raises(TimeoutError):
            receive_fd(f"eep-test-silent-{os.getpid()}", 50)


def test_slabs_are_zero_at_first():
    heap = PosixShmHeap(0, 2, SLAB_BYTES)
    assert not np.any(heap.whole())
    heap.close()
