"""A process that owns a rank's slab on a GPU, without JAX: it does what lines on its input say.

python -m tests.gpu.heap_process RANK RANKS SLAB_BYTES     # prints its handle, then answers
"""

import os
import signal
import subprocess
import sys

import numpy as np

from tests.support.waiting import is_readable

REPLY_DEADLINE_S = 60  # the first reply includes the start of CUDA


class HeapProcess:
    """The other end: every answer has a deadline, and only this process is ever killed."""

    def __init__(self, rank: int, ranks: int, slab_bytes: int, gpu: str | None = None):
        visible = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.heap_process", *map(str, (rank, ranks, slab_bytes))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | visible,
        )
        self._unread = b""
        try:
            self.handle = self._answer()
        except BaseException:
            self.kill()
            raise

    def ask(self, *words) -> str:
        """`write OFFSET VALUE COUNT`, `read RANK OFFSET`, `attach RANK HANDLE`, `detach RANK`, or
        `control RANK OFFSET`; the answer is a number, or `ok`."""
        self._process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        """Ends it as a crash does; may be called twice."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(REPLY_DEADLINE_S)
        self._process.stdin.close(), self._process.stdout.close()

    def _answer(self) -> str:
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready = is_readable(descriptor, REPLY_DEADLINE_S)
            read = os.read(descriptor, 4096) if ready else b""
            if not read:
                raise TimeoutError(f"no answer in {REPLY_DEADLINE_S} s, or the process ended")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


def main(rank: int, ranks: int, slab_bytes: int) -> None:
    from eep_jax.heap.cuda.vmm import CudaVmmHeap

    heap = CudaVmmHeap(rank, ranks, slab_bytes)
    print(heap.export(), flush=True)
    for line in sys.stdin:
        print(answer(heap, *line.split()), flush=True)


def answer(heap, verb: str, *words: str):
    match verb:
        case "write":
            offset, value, count = map(int, words)
            heap.write(offset, np.full(count, value, np.uint8))
        case "read":
            return int(heap.read(int(words[0]), int(words[1]), 1)[0])
        case "control":
            return int(heap.control()[int(words[0]), int(words[1])])
        case "attach":
            heap.attach(int(words[0]), words[1])
        case "detach":
            heap.detach(int(words[0]))
        case _:
            return f"what is {verb}?"
    return "ok"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
