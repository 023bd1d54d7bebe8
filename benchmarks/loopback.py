"""All ranks of an exchange on one GPU, in one process: for kernel tests and benchmarks.

Every rank's window is a row of one array. Ranks take turns, so each phase is run by all of them
before the next one begins; the kernels are the ones that processes run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.combine import mosaic_gpu as combine_gpu
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.dispatch import mosaic_gpu as dispatch_gpu
from pallas_kernels.dispatch.config import config_for
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec, address_words
from pallas_kernels.exchange.signals import first_round
from pallas_kernels.window import WindowLayout


@dataclasses.dataclass
class Loopback:
    """Windows of R ranks on this GPU, and the phases of an exchange, one rank at a time.

    No rank may wait before all have posted: all `send`, then all run `dispatch`, the kernel of
    serving, which finds the flags there. The rank is part of the call, so all ranks share
    the executables. Memory is made at its first use.
    """

    layout: WindowLayout
    slots_per_rank: int
    poison: int = 0xFF  # bytes of rows that were never written: NaN in bf16
    tokens: int | None = None  # of one exchange; as many as the window holds if not given

    def __post_init__(self):
        layout, tokens = self.layout, self.tokens or self.layout.tokens
        self.spec = ExchangeSpec(layout, self.slots_per_rank)
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

    def call(
        self, rank: int, active=None, epoch: int = 1, steps: int = 0, deadline_ms: int = 1000
    ) -> Call:
        """The Call of one of all ranks or of `active`, `steps` exchanges into the epoch."""
        ranks, address = self.layout.ranks, self.abort.unsafe_buffer_pointer()
        return Call(
            rank=np.int32(rank),
            active=np.ones(ranks, np.int32) if active is None else np.asarray(active, np.int32),
            epoch=np.uint32(epoch),
            round=np.uint32(first_round(epoch) + steps),
            deadline_ms=np.uint32(deadline_ms),
            vote=np.uint32(1),
            suspicion=np.zeros(ranks, np.int32),
            abort_address=address_words(address),
        )

    @functools.cached_property
    def send(self):
        """`(x [T D], slots [T K], weights [T K], heap, call) -> sent`; posts the flags."""

        def run(x, slots, weights, *at):
            config = self.dispatch_config
            return dispatch_gpu.send(x, Choices(slots, weights), *at, self.spec, config)

        return jax.jit(run)

    @functools.cached_property
    def dispatch(self):
        """As `send`, and then `-> (rows, slots, weights, suspicion, vote)`."""
        return jax.jit(functools.partial(self._dispatch, self.dispatch_config))

    @functools.cached_property
    def dispatch_alone(self):
        """As `dispatch` without anybody's `send`: the rank posts the others' flags, too."""
        alone = dataclasses.replace(self.dispatch_config, stand_in=True)
        return jax.jit(functools.partial(self._dispatch, alone))

    @functools.cached_property
    def receive(self):
        """`(heap, call, sent, tokens)`: what `dispatch` does after it has sent."""

        def run(heap, call, sent, tokens):
            shape = (tokens, self.layout.choices)
            config = self.dispatch_config
            return _flat(dispatch_gpu.receive(shape, heap, call, sent, self.spec, config))

        return jax.jit(run, static_argnames="tokens")

    def _dispatch(self, config, x, slots, weights, *at):
        choices = Choices(slots, weights)
        return _flat(dispatch_gpu.dispatch_mosaic(x, choices, *at, self.spec, config))

    @functools.cached_property
    def send_home(self):
        """`(results [R T K D], slots, weights [R T K], heap, call) -> sent`; posts flags."""
        return jax.jit(functools.partial(self._send_home, self.combine_config))

    @functools.cached_property
    def send_home_alone(self):
        """As `send_home`; the rank posts the others' flags, too."""
        alone = dataclasses.replace(self.combine_config, stand_in=True)
        return jax.jit(functools.partial(self._send_home, alone))

    def _send_home(self, config, results, slots, weights, *at):
        return combine_gpu.send_home(results, Choices(slots, weights), *at, self.spec, config)

    @functools.cached_property
    def receive_home(self):
        """`(slots [T K], weights [T K], heap, call, sent) -> (y [T D], suspicion)`."""
        return jax.jit(functools.partial(self._receive_home, self.combine_config))

    @functools.cached_property
    def receive_home_alone(self):
        """As `receive_home` without anybody's `send_home`: the rank posts the others' flags."""
        alone = dataclasses.replace(self.combine_config, stand_in=True)
        return jax.jit(functools.partial(self._receive_home, alone))

    def _receive_home(self, config, slots, weights, *at):
        return combine_gpu.receive_home(Choices(slots, weights), *at, self.spec, config)


def _flat(received):
    rows, choices, *others = received
    return rows, *choices, *others


def random_routing(rng: np.random.Generator, ranks, tokens, choices, experts, skew=0.0):
    """Expert ids int32 [R T K], distinct for each token; `skew` is a Zipf exponent, 0 uniform."""
    share = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    keys = rng.exponential(size=(ranks, tokens, experts)) / share
    return np.argsort(keys, axis=-1)[..., :choices].astype(np.int32)
