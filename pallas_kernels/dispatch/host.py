"""Dispatch over a heap in host memory: the send and receive phases of one rank, as numpy."""

import numpy as np

from pallas_kernels.host import HostExchange


class HostDispatch(HostExchange):
    """Called back from inside the compiled step."""

    flag = "sent"

    def __call__(self, _, outs, heap, x, slots, weights, active, scalars, suspicion) -> None:
        rows_out, slots_out, weights_out, suspicion_out, wish_out = map(np.asarray, outs)
        x, slots, weights = np.asarray(x), np.asarray(slots), np.asarray(weights)
        suspicion_out[...] = np.asarray(suspicion)
        turn = self.begin(heap, active, scalars, suspicion_out)
        slots_out[...], weights_out[...], wish_out[...] = -1, 0.0, turn.wish
        rows_out[...] = 0
        if suspicion_out[self.rank]:
            return
        half, tokens = turn.half, x.shape[0]

        # Send. Invariant: all that a window holds of this rank is written before its flag.
        owner = np.where(slots >= 0, slots // self.slots_per_rank, -1)
        local = slots % self.slots_per_rank
        for peer in turn.peers:
            window, here = turn.windows[peer], owner == peer
            chosen = np.flatnonzero(here.any(axis=1))
            window["rows"][half, self.rank, chosen] = x[chosen]
            window["slots"][half, self.rank, :tokens] = np.where(here, local, -1)
            window["weights"][half, self.rank, :tokens] = weights
            window["header"][half, self.rank, 0] = turn.wish
            self.signal(turn, peer)

        # Receive. Invariant: nothing of a source is read before its flag holds this round.
        heard = self.wait(turn, suspicion_out)
        if heard is None:
            return
        own = turn.windows[self.rank]
        for source in heard:
            received = own["slots"][half, source, :tokens]
            slots_out[source] = received
            weights_out[source] = own["weights"][half, source, :tokens]
            chosen = np.flatnonzero((received >= 0).any(axis=1))
            rows_out[source, chosen] = own["rows"][half, source, chosen]
            wish_out[...] = max(int(wish_out), int(own["header"][half, source, 0]))
