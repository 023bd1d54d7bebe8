"""One rank's heap as a process of another network namespace, for test_mirror_networks.py.

It answers each line of JSON on its standard input with one on its standard output.
"""

import json
import sys

import numpy as np

from eep_jax.errors import HeapError
from eep_jax.heap.mirror.heap import MirrorHeap, MirrorOptions
from pallas_kernels.exchange.signals import post
from tests.support.mirrors import LAYOUT, SLAB_BYTES, TOKEN, until


class Rank:
    """The commands that a test may give."""

    def __init__(self, rank: int, host: str, transport: str):
        options = MirrorOptions(
            host=host, host_id=f"host{rank}", token=TOKEN, layout=LAYOUT, transport=transport
        )
        self.heap = MirrorHeap(rank, LAYOUT.ranks, SLAB_BYTES, options)
        self.windows = LAYOUT.views(self.heap.whole())
        self.heap.write(SLAB_BYTES - 4096, np.full(4096, 40 + rank, np.uint8))

    def handle(self) -> str:
        return self.heap.export()

    def attach(self, rank: int, handle: str) -> str:
        try:
            self.heap.attach(rank, handle)
        except HeapError as error:
            return f"HeapError: {error}"
        return type(self.heap._peers[rank].sender._stream).__name__

    def write(self, peer: int, number: int, value: float) -> None:
        there, half, me = self.windows[peer], number & 1, self.heap.rank
        there["slots"][half, me], there["slots"][half, me, 0] = -1, 0
        there["rows"][half, me, 0] = value
        post(there["sent"][half, me : me + 1], number)

    def wait(self, peer: int, number: int) -> list[float]:
        """The row that came with a round."""
        own, half = self.windows[self.heap.rank], number & 1
        until(lambda: int(own["sent"][half, peer]) == number, f"round {number}")
        return own["rows"][half, peer, 0].tolist()

    def seen(self, peer: int) -> list[int]:
        return self.windows[self.heap.rank]["sent"][:, peer].tolist()

    def read(self, peer: int, offset: int, nbytes: int) -> list[int]:
        return sorted(set(self.heap.read(peer, offset, nbytes).tolist()))


def main(rank: str, host: str, transport: str) -> None:
    process = Rank(int(rank), host, transport)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(process, verb)(*arguments)), flush=True)
    process.heap.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
