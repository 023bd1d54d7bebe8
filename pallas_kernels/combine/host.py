"""Combine over a heap in host memory: results home, wait, weighted sum, as numpy."""

from collections.abc import Sequence

import numpy as np
from jax.experimental.buffer_callback import Buffer

from pallas_kernels.exchange.host import HostExchange


class HostCombine(HostExchange):
    """Called back by the compiled step."""

    flag = "returned"

    def __call__(
        self,
        _,
        outs: Sequence[Buffer],
        heap: Buffer,
        results: Buffer,
        received: Buffer,
        sent_weights: Buffer,
        slots: Buffer,
        weights: Buffer,
        active: Buffer,
        scalars: Buffer,
        suspicion: Buffer,
    ) -> None:
        y, suspicion_out = map(np.asarray, outs)
        results, received = np.asarray(results), np.asarray(received)
        suspicion_out[...] = np.asarray(suspicion)
        y[...] = 0
        turn = self.begin(heap, active, scalars, suspicion_out)
        if suspicion_out[turn.rank]:
            return

        # Send home. Invariant: everything written into a window precedes its flag.
        for home in turn.peers:
            returns = turn.windows[home]["returns"][turn.half, turn.rank]
            if self.spec.layout.combine == "per_choice":
                # Includes rows of choices that ran elsewhere, which are never read: selecting the
                # others costs more than their bytes.
                returns[: results.shape[1]] = results[home]
            else:
                mine = received[home] >= 0
                token = np.flatnonzero(mine.any(axis=1))
                share = np.where(mine, np.asarray(sent_weights)[home], 0)[token]
                returns[token] = ordered_sum(share, results[home, token])
            self.signal(turn, home)

        # Receive. Invariant: results of a rank are read only after its flag holds this round.
        arrived = self.wait(turn, suspicion_out)
        if arrived is None:
            return
        returns = turn.windows[turn.rank]["returns"][turn.half]
        self._reduce(y, returns, np.asarray(slots), np.asarray(weights), arrived)

    def _reduce(
        self,
        y: np.ndarray,
        returns: np.ndarray,
        slots: np.ndarray,
        weights: np.ndarray,
        arrived: list[int],
    ) -> None:
        # Index -1, the last entry, stands for choices without a slot.
        came = np.zeros(self.spec.layout.ranks + 1, np.bool_)
        came[arrived] = True
        owner = np.where(slots >= 0, slots // self.spec.slots_per_rank, -1)
        valid = came[owner]
        if self.spec.layout.combine == "per_choice":
            _, places, choices, hidden = returns.shape
            token, choice = np.arange(len(slots))[:, None], np.arange(choices)
            at = (np.maximum(owner, 0) * places + token) * choices + choice
            home = returns.reshape(-1, hidden)[at]
            # Windows keep rows of earlier rounds. They may hold NaN, so weight zero is not enough.
            if not valid.all():
                home[~valid] = 0
                weights = np.where(valid, weights, 0)
            y[...] = ordered_sum(weights, home)
            return
        for rank in arrived:
            token = np.flatnonzero((owner == rank).any(axis=1))
            y[token] += returns[rank, token]


def ordered_sum(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`sum_k weights[n, k] * rows[n, k]` in the order of k: the same bits for any placement."""
    products = weights[..., None] * rows
    total = products[:, 0]
    for k in range(1, rows.shape[1]):
        total += products[:, k]
    return total
