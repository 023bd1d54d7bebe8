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
        if suspicion_out[self.rank]:
            return
        turn = self.begin(heap, active, scalars, suspicion_out)

        # Send home. Invariant: all that a window holds of this rank is written before its flag.
        for home in turn.peers:
            returns, mine = turn.windows[home]["returns"][turn.half, self.rank], received[home] >= 0
            if self.layout.combine == "per_choice":
                token, choice = np.nonzero(mine)
                returns[token, choice] = results[home, token, choice]
            else:
                token = np.flatnonzero(mine.any(axis=1))
                share = np.where(mine, np.asarray(sent_weights)[home], 0)[token]
                returns[token] = ordered_sum(share, results[home, token])
            self.signal(turn, home)

        # Receive. Invariant: nothing of a rank is read before its flag holds this round.
        heard = self.wait(turn, suspicion_out)
        if heard is None:
            return
        returns = turn.windows[self.rank]["returns"][turn.half]
        self._reduce(y, returns, np.asarray(slots), np.asarray(weights), heard)

    def _reduce(self, y, returns, slots, weights, heard) -> None:
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
