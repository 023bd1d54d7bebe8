"""All ranks of an exchange on one GPU, in one process: for kernel tests and benchmarks.

Every rank's window is a row of one array. Ranks take turns, so each phase is run by all of them
before the next one begins; the kernels are the ones that processes run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.call import Call, address_words
from pallas_kernels.combine import mosaic_gpu as combine_gpu
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.dispatch import mosaic_gpu as dispatch_gpu
from pallas_kernels.dispatch.config import config_for
from pallas_kernels.gpu import Place, post_round
from pallas_kernels.signals import first_round
from pallas_kernels.window import WindowLayout


@dataclasses.dataclass
class Loopback:
    """Windows of R ranks on this GPU, and the four phases of an exchange, one rank at a time.

    The rank is an argument of the compiled phases, so all ranks share four executables. Memory is
    made at its first use.
    """

    layout: WindowLayout
    slots_per_rank: int
    poison: int = 0xFF  # bytes of rows nobody has written: NaN in bf16
    tokens: int | None = None  # of one exchange; as many as the window holds if not given

    def __post_init__(self):
        layout, tokens = self.layout, self.tokens or self.layout.tokens
        self.place = Place(layout, self.slots_per_rank)
        self.dispatch_config = config_for(tokens, layout.choices, self.slots_per_rank)
        self.combine_config = CombineConfig()

    @functools.cached_property
    def heap(self) -> jax.Array:
        """The windows `[R B]`: flags are zero, the rest is poison."""
        clean = self.layout.regions["slots"].offset
        shape = (self.layout.ranks, self.layout.window_bytes)

        def fill():
            byte = jnp.where(jnp.arange(shape[1]) < clean, 0, self.poison).astype(jnp.uint8)
            return jnp.broadcast_to(byte, shape)

        return jax.block_until_ready(jax.jit(fill)())

    @functools.cached_property
    def abort(self) -> jax.Array:
        return jax.block_until_ready(jnp.zeros(8, jnp.uint32))

    def call(self, active=None, epoch: int = 1, steps: int = 0, deadline_ms: int = 1000) -> Call:
        """A call of all ranks (or of `active`), `steps` exchanges after the epoch's first."""
        ranks, address = self.layout.ranks, self.abort.unsafe_buffer_pointer()
        return Call(
            active=np.ones(ranks, np.int32) if active is None else np.asarray(active, np.int32),
            epoch=np.uint32(epoch),
            round=np.uint32(first_round(epoch) + steps),
            deadline_ms=np.uint32(deadline_ms),
            wish=np.uint32(1),
            suspicion=np.zeros(ranks, np.int32),
            abort_address=address_words(address),
        )

    @functools.cached_property
    def send(self):
        """`(x [T D], slots [T K], weights [T K], heap, call, rank) -> sent`; posts the flags."""

        def run(x, slots, weights, heap, call, rank):
            config = self.dispatch_config
            sent = dispatch_gpu.send(x, slots, weights, heap, call, rank, self.place, config)
            return post_round("sent", self.place, heap, call, rank, sent)

        return jax.jit(run)

    @functools.cached_property
    def receive(self):
        """`(heap, call, rank, sent, tokens) -> (rows, slots, weights, suspicion, wish)`."""

        def run(heap, call, rank, sent, tokens):
            shape = (tokens, self.layout.choices)
            return dispatch_gpu.receive(
                shape, heap, call, rank, sent, self.place, self.dispatch_config
            )

        return jax.jit(run, static_argnames="tokens")

    @functools.cached_property
    def send_home(self):
        """`(results [R T K D], slots, weights [R T K], heap, call, rank) -> sent`; posts flags."""

        def run(results, slots, weights, heap, call, rank):
            data, config = (results, slots, weights), self.combine_config
            sent = combine_gpu.send_home(*data, heap, call, rank, self.place, config)
            return post_round("returned", self.place, heap, call, rank, sent)

        return jax.jit(run)

    @functools.cached_property
    def receive_home(self):
        """`(slots [T K], weights [T K], heap, call, rank, sent) -> (y [T D], suspicion)`."""
        return jax.jit(
            lambda slots, weights, heap, call, rank, sent: combine_gpu.receive_home(
                slots, weights, heap, call, rank, sent, self.place, self.combine_config
            )
        )

    def dispatch(self, x, slots, weights, call: Call, ranks=None) -> list:
        """What each of `ranks` (all) receives; those left out neither send nor receive."""
        ranks = range(self.layout.ranks) if ranks is None else ranks
        numbers = {r: np.int32(r) for r in ranks}
        sent = [
            self.send(x[r], slots[r], weights[r], self.heap, call, n) for r, n in numbers.items()
        ]
        jax.block_until_ready(sent)
        tokens = x.shape[1]
        return {
            r: self.receive(self.heap, call, n, sent[0], tokens=tokens) for r, n in numbers.items()
        }

    def combine(self, results, received, slots, weights, calls) -> dict:
        """y and suspicion of each rank in `received`, which is what `dispatch` gave."""
        sent = [
            self.send_home(results[r], got[1], got[2], self.heap, calls[r], np.int32(r))
            for r, got in received.items()
        ]
        jax.block_until_ready(sent)
        return {
            r: self.receive_home(slots[r], weights[r], self.heap, calls[r], np.int32(r), sent[0])
            for r in received
        }


def random_routing(rng: np.random.Generator, ranks, tokens, choices, experts, skew=0.0):
    """Expert ids int32 [R T K], distinct for each token; `skew` is a Zipf exponent, 0 uniform."""
    share = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    keys = rng.exponential(size=(ranks, tokens, experts)) / share
    return np.argsort(keys, axis=-1)[..., :choices].astype(np.int32)
