"""Dispatch over a heap in host memory: the send and receive phases of one rank, as numpy."""

import ctypes
import time

import numpy as np

from pallas_kernels.signals import parity, post, wait_round
from pallas_kernels.window import WindowLayout


class HostDispatch:
    """Called back from inside the compiled step; keeps only views of the heap between calls."""

    def __init__(self, layout: WindowLayout, rank: int, slots_per_rank: int):
        self.layout, self.rank, self.slots_per_rank = layout, rank, slots_per_rank
        self._views = HeapViews(layout)

    def __call__(self, _, outs, heap, x, slots, weights, active, scalars, suspicion) -> None:
        rows_out, slots_out, weights_out, suspicion_out, wish_out = map(np.asarray, outs)
        x, slots, weights = np.asarray(x), np.asarray(slots), np.asarray(weights)
        epoch, current, deadline_ms, wish = (int(v) for v in np.asarray(scalars))
        suspicion_out[...] = np.asarray(suspicion)
        slots_out[...], weights_out[...], wish_out[...] = -1, 0.0, wish
        rows_out[...] = 0
        if suspicion_out[self.rank]:
            return
        windows, half, tokens = self._views.of(heap), parity(current), x.shape[0]
        deadline_ns = time.monotonic_ns() + deadline_ms * 1_000_000
        peers = partners(np.asarray(active), suspicion_out)

        # Send. Invariant: all that a window holds of this rank is written before its flag.
        owner = np.where(slots >= 0, slots // self.slots_per_rank, -1)
        local = slots % self.slots_per_rank
        for peer in peers:
            window, here = windows[peer], owner == peer
            chosen = np.flatnonzero(here.any(axis=1))
            window["rows"][half, self.rank, chosen] = x[chosen]
            window["slots"][half, self.rank, :tokens] = np.where(here, local, -1)
            window["weights"][half, self.rank, :tokens] = weights
            window["header"][half, self.rank, 0] = wish
            post(window["sent"][half, self.rank : self.rank + 1], current)

        # Receive. Invariant: nothing of a source is read before its flag holds this round.
        own = windows[self.rank]
        missing, aborted = wait_round(
            own["sent"][half], current, peers, own["abort"], epoch, deadline_ns
        )
        suspicion_out[missing] = 1
        suspicion_out[self.rank] = aborted
        if aborted:
            return
        for source in (p for p in peers if p not in missing):
            received = own["slots"][half, source, :tokens]
            slots_out[source] = received
            weights_out[source] = own["weights"][half, source, :tokens]
            chosen = np.flatnonzero((received >= 0).any(axis=1))
            rows_out[source, chosen] = own["rows"][half, source, chosen]
            wish_out[...] = max(int(wish_out), int(own["header"][half, source, 0]))


class HeapViews:
    """The window regions of all ranks, rebuilt only if the heap's address changes."""

    def __init__(self, layout: WindowLayout):
        self._layout = layout
        self._address, self._windows = None, None

    def of(self, heap) -> list[dict[str, np.ndarray]]:
        memory = np.asarray(heap)
        if memory.ctypes.data != self._address:
            # The heap is an input of the step, so numpy sees it as read-only; its pages are not.
            self._address, self._windows = memory.ctypes.data, self._layout.views(writable(memory))
        return self._windows


def writable(memory: np.ndarray) -> np.ndarray:
    """The same bytes without the read-only mark that inputs of a callback carry."""
    raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.ctypes.data)
    return np.frombuffer(raw, np.uint8).reshape(memory.shape)


def partners(active: np.ndarray, suspicion: np.ndarray) -> list[int]:
    """The ranks an exchange talks to: those of the epoch that did not time out in this step."""
    return [int(r) for r in np.flatnonzero((active > 0) & (suspicion == 0))]
