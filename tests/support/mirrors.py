"""Heaps of ranks on several hosts, in one process: each host is a name, the network is loopback."""

import dataclasses
import time

from eep_jax.heap.mirror.heap import MirrorHeap, MirrorOptions
from pallas_kernels.window import WindowLayout, round_up

TRANSPORT = "tcp"  # of mirrors that do not say
TOKEN = "a token of enough letters"
LAYOUT = WindowLayout(ranks=3, tokens=4, choices=2, hidden=8)
SLAB_BYTES = round_up(LAYOUT.window_bytes, 4096) + 8192
EVENT_S = 20.0


def a_mirror(rank: int, host_id: str, layout: WindowLayout = LAYOUT, **changes) -> MirrorHeap:
    slab_bytes = changes.pop("slab_bytes", round_up(layout.window_bytes, 4096) + 8192)
    options = MirrorOptions(
        host="127.0.0.1", host_id=host_id, token=TOKEN, layout=layout, transport=TRANSPORT
    )
    return MirrorHeap(rank, layout.ranks, slab_bytes, dataclasses.replace(options, **changes))


def attach_all(heaps) -> None:
    for heap in heaps:
        for peer in heaps:
            if peer is not heap:
                heap.attach(peer.rank, peer.export())


def on_hosts(layout: WindowLayout, hosts: str):
    """Opens heaps for `LoopbackRanks`: rank r is on host `hosts[r]`."""

    def open_heaps(ranks: int, slab_bytes: int) -> list[MirrorHeap]:
        heaps = [a_mirror(r, hosts[r], layout, slab_bytes=slab_bytes) for r in range(ranks)]
        attach_all(heaps)
        return heaps

    return open_heaps


def until(condition, what: str = "it") -> None:
    """Waits for another thread's doing."""
    ends_s = time.monotonic() + EVENT_S
    while not condition():
        assert time.monotonic() < ends_s, f"{what} did not happen within {EVENT_S} s"
        time.sleep(0.002)
