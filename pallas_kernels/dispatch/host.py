"""Dispatch over a heap in host memory: the send and receive phases of one rank, as numpy."""

from collections.abc import Sequence

import numpy as np
from jax.experimental.buffer_callback import Buffer

from pallas_kernels.exchange.host import HostExchange, every_or


class HostDispatch(HostExchange):
    """Called back by the compiled step."""

    flag = "sent"

    def __call__(
        self,
        _,
        outs: Sequence[Buffer],
        heap: Buffer,
        x: Buffer,
        slots: Buffer,
        weights: Buffer,
        active: Buffer,
        scalars: Buffer,
        suspicion: Buffer,
    ) -> None:
        rows_out, slots_out, weights_out, suspicion_out, vote_out = map(np.asarray, outs)
        x, slots, weights = np.asarray(x), np.asarray(slots), np.asarray(weights)
        suspicion_out[...] = np.asarray(suspicion)
        turn = self.begin(heap, active, scalars, suspicion_out)
        slots_out[...], weights_out[...], vote_out[...] = -1, 0.0, turn.vote
        rows_out[...] = 0
        if suspicion_out[turn.rank]:
            return
        half, tokens = turn.half, x.shape[0]

        # Send. Invariant: everything written into a window precedes its flag.
        owner = np.where(slots >= 0, slots // self.spec.slots_per_rank, -1)
        theirs = np.where(owner == self._ranks, slots % self.spec.slots_per_rank, -1)  # [R T K]
        for peer in turn.peers:
            window = turn.windows[peer]
            # All rows in one copy: selecting the needed ones costs more than their bytes.
            window["rows"][half, turn.rank, :tokens] = x
            window["slots"][half, turn.rank, :tokens] = theirs[peer]
            window["weights"][half, turn.rank, :tokens] = weights
            window["votes"][half, turn.rank, 0] = turn.vote
            self.signal(turn, peer)

        # Receive. Invariant: rows of a source are read only after its flag holds this round.
        arrived = self.wait(turn, suspicion_out)
        if arrived is None:
            return
        own = turn.windows[turn.rank]
        sources = every_or(arrived, len(slots_out))
        received = own["slots"][half, sources, :tokens]
        slots_out[sources] = received
        weights_out[sources] = own["weights"][half, sources, :tokens]
        here = (received >= 0).any(axis=2)[..., None]
        rows_out[sources] = np.where(here, own["rows"][half, sources, :tokens], 0)
        if arrived:
            vote_out[...] = max(turn.vote, int(own["votes"][half, sources, 0].max()))
