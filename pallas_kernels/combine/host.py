"""Combine over a heap in host memory: results home, wait, weighted sum, as numpy."""

import time

import numpy as np

from pallas_kernels.dispatch.host import HeapViews, partners
from pallas_kernels.signals import parity, post, wait_round
from pallas_kernels.window import WindowLayout


class HostCombine:
    """Called back from inside the compiled step; keeps only views of the heap between calls."""

    def __init__(self, layout: WindowLayout, rank: int, slots_per_rank: int):
        self.layout, self.rank, self.slots_per_rank = layout, rank, slots_per_rank
        self._views = HeapViews(layout)

    def __call__(
        self,
        _,
        outs,
        heap,
        results,
        received,
        sent_weights,
        slots,
        weights,
        active,
        scalars,
        suspicion,
    ) -> None:
        y, suspicion_out = map(np.asarray, outs)
        results, received = np.asarray(results), np.asarray(received)
        epoch, current, deadline_ms, _ = (int(v) for v in np.asarray(scalars))
        suspicion_out[...] = np.asarray(suspicion)
        y[...] = 0
        if suspicion_out[self.rank]:
            return
        windows, half, tokens = self._views.of(heap), parity(current), y.shape[0]
        deadline_ns = time.monotonic_ns() + deadline_ms * 1_000_000
        peers = partners(np.asarray(active), suspicion_out)

        # Send home. Invariant: all that a window holds of this rank is written before its flag.
        for home in peers:
            returns, mine = windows[home]["returns"][half, self.rank], received[home] >= 0
            if self.layout.combine == "per_choice":
                token, choice = np.nonzero(mine)
                returns[token, choice] = results[home, token, choice]
            else:
                token = np.flatnonzero(mine.any(axis=1))
                share = np.where(mine, np.asarray(sent_weights)[home], 0)[token]
                returns[token] = ordered_sum(share, results[home, token])
            post(windows[home]["returned"][half, self.rank : self.rank + 1], current)

        # Receive. Invariant: nothing of a rank is read before its flag holds this round.
        own = windows[self.rank]
        missing, aborted = wait_round(
            own["returned"][half], current, peers, own["abort"], epoch, deadline_ns
        )
        suspicion_out[missing] = 1
        suspicion_out[self.rank] = aborted
        if aborted:
            return
        heard = [p for p in peers if p not in missing]
        self._reduce(y, own["returns"][half], np.asarray(slots), np.asarray(weights), heard, tokens)

    def _reduce(self, y, returns, slots, weights, heard, tokens) -> None:
        owner = np.where(slots >= 0, slots // self.slots_per_rank, -1)
        valid = np.isin(owner, heard)
        if self.layout.combine == "per_choice":
            token, choice = np.indices(owner.shape)
            # Windows keep rows of earlier rounds, which must not be read even with weight zero:
            # they may hold NaN.
            home = np.where(valid[..., None], returns[np.maximum(owner, 0), token, choice], 0)
            y[...] = ordered_sum(np.where(valid, weights, 0), home)
            return
        for rank in heard:
            token = np.flatnonzero((owner == rank).any(axis=1))
            y[token] += returns[rank, token]


def ordered_sum(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`sum_k weights[n, k] * rows[n, k]` in the order of k: same bits wherever rows came from."""
    total = weights[:, 0, None] * rows[:, 0]
    for k in range(1, rows.shape[1]):
        total += weights[:, k, None] * rows[:, k]
    return total
