"""Combine over a heap in host memory: results home, wait, weighted sum, as numpy."""

import numpy as np

from pallas_kernels.host import HostExchange


class HostCombine(HostExchange):
    """Called back from inside the compiled step."""

    flag = "returned"

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
        suspicion_out[...] = np.asarray(suspicion)
        y[...] = 0
        turn = self.begin(heap, active, scalars, suspicion_out)
        if suspicion_out[turn.rank]:
            return

        # Send home. Invariant: all that a window holds of this rank is written before its flag.
        for home in turn.peers:
            returns = turn.windows[home]["returns"][turn.half, turn.rank]
            if self.layout.combine == "per_choice":
                # Rows of choices that lie elsewhere go along, and nobody reads them there: picking
                # the others costs more than their bytes.
                returns[: results.shape[1]] = results[home]
            else:
                mine = received[home] >= 0
                token = np.flatnonzero(mine.any(axis=1))
                share = np.where(mine, np.asarray(sent_weights)[home], 0)[token]
                returns[token] = ordered_sum(share, results[home, token])
            self.signal(turn, home)

        # Receive. Invariant: nothing of a rank is read before its flag holds this round.
        heard = self.wait(turn, suspicion_out)
        if heard is None:
            return
        returns = turn.windows[turn.rank]["returns"][turn.half]
        self._reduce(y, returns, np.asarray(slots), np.asarray(weights), heard)

    def _reduce(self, y, returns, slots, weights, heard) -> None:
        # The last entry is for choices without a slot, whose owner is -1.
        is_heard = np.zeros(self.layout.ranks + 1, np.bool_)
        is_heard[heard] = True
        owner = np.where(slots >= 0, slots // self.slots_per_rank, -1)
        valid = is_heard[owner]
        if self.layout.combine == "per_choice":
            _, places, choices, hidden = returns.shape
            token, choice = np.arange(len(slots))[:, None], np.arange(choices)
            at = (np.maximum(owner, 0) * places + token) * choices + choice
            home = returns.reshape(-1, hidden)[at]
            # Windows keep rows of earlier rounds, which must not be read even with weight zero:
            # they may hold NaN.
            if not valid.all():
                home[~valid] = 0
                weights = np.where(valid, weights, 0)
            y[...] = ordered_sum(weights, home)
            return
        for rank in heard:
            token = np.flatnonzero((owner == rank).any(axis=1))
            y[token] += returns[rank, token]


def ordered_sum(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`sum_k weights[n, k] * rows[n, k]` in the order of k: same bits wherever rows came from."""
    products = weights[..., None] * rows
    total = products[:, 0]
    for k in range(1, rows.shape[1]):
        total += products[:, k]
    return total
