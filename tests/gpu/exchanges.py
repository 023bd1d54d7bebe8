"""Exchanges of all ranks on one GPU, phase by phase, in windows full of NaN.

A `Ranks` keeps what each rank knows between exchanges (its round and whom it suspects), so a test
only says who takes part. Executables are shared: one `Loopback` for each layout and session.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.loopback import Loopback, random_routing
from pallas_kernels.exchange.call import Call
from pallas_kernels.exchange.fp8 import pack_rows, unpack_rows
from pallas_kernels.window import WindowLayout
from tests.support.kernels import Exchange, check_lists, naive_combine, naive_dispatch

DEADLINE_MS = 10_000  # no healthy rank is late
# float32 sums of K products, in one order but perhaps with fused roundings: a few 2**-24.
CLOSE = 2e-6
BF16 = 2.0**-8  # a rounding to bfloat16, and as much again for what is summed before it


def some_loopback(
    ranks: int = 4,
    mode: str = "per_choice",
    fp8: bool = False,
    *,
    tokens: int = 16,
    choices: int = 4,
    hidden: int = 256,
    slots_per_rank: int = 8,
) -> Loopback:
    """Its four executables are compiled once in a session."""
    dispatch_dtype = "float8_e4m3fn" if fp8 else ""
    layout = WindowLayout(ranks, tokens, choices, hidden, mode, "bfloat16", dispatch_dtype)
    return _compiled(layout, slots_per_rank)


@functools.cache
def _compiled(layout: WindowLayout, slots_per_rank: int) -> Loopback:
    loopback = Loopback(layout, slots_per_rank)
    work = a_work(0, loopback)
    Ranks(loopback).exchange(work, some_results(0, work))
    return loopback


def a_work(
    seed: int,
    loopback: Loopback,
    routing: str = "random",
    *,
    none_share: float = 0.0,
    tokens: int | None = None,
    empty=(),
) -> Exchange:
    """Rows in bfloat16 and a routing in which no token has a slot twice.

    `random`, `zipf`: some slots much more often; `k_hot`: all tokens have the same K slots;
    `one_rank`: all slots lie on one rank; ranks in `empty` have no token with a slot.
    """
    layout, random = loopback.layout, np.random.default_rng(seed)
    ranks, choices, per_rank = layout.ranks, layout.choices, loopback.slots_per_rank
    tokens = tokens or layout.tokens
    skew = {"zipf": 1.5}.get(routing, 0.0)
    slots = random_routing(random, ranks, tokens, choices, ranks * per_rank, skew)
    if routing == "k_hot":
        slots[...] = random.permutation(ranks * per_rank)[:choices]
    if routing == "one_rank":
        slots = random_routing(random, ranks, tokens, choices, per_rank)
        slots += int(random.integers(ranks)) * per_rank
    slots[random.random(slots.shape) < none_share] = -1
    slots[list(empty)] = -1
    x = random.standard_normal((ranks, tokens, layout.hidden))
    return Exchange(
        x=x.astype(ml_dtypes.bfloat16).astype(np.float32),
        slots=slots.astype(np.int32),
        weights=random.random(slots.shape).astype(np.float32),
        active=np.ones(ranks, np.int32),
        slots_per_rank=per_rank,
    )


def some_results(seed: int, work: Exchange) -> np.ndarray:
    """Results `[R owner, R source, T, K, D]` of bfloat16 values; NaN where none was computed."""
    _, here = naive_dispatch(work)
    random = np.random.default_rng(seed)
    found = random.standard_normal((*here.shape, work.x.shape[-1]), np.float32)
    found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(here[..., None] >= 0, found, np.nan)


@functools.cache
def rows_of():
    """`RowsInWindow.array`, compiled."""
    return jax.jit(lambda rows: rows.array())


@functools.cache
def through_fp8(hidden: int):
    """Rows through fp8 and back, compiled."""
    return jax.jit(lambda x: unpack_rows(pack_rows(x), hidden, jnp.bfloat16))


class Ranks:
    """The ranks of one epoch. Windows start with NaN rows and flags of zero."""

    def __init__(self, loopback: Loopback, active=None, *, epoch: int = 1, **options):
        self.loopback, self.ranks = loopback, loopback.layout.ranks
        self.active = np.ones(self.ranks, np.int32) if active is None else np.asarray(active)
        self.seconds = dict.fromkeys(range(self.ranks), 0.0)  # spent waiting, by rank
        self.poison()
        self.start(epoch, **options)

    def start(self, epoch: int, *, active=None, steps: int = 0, deadline_ms: int = DEADLINE_MS):
        """An epoch begins: nobody is suspected. Votes differ by rank."""
        self.active = self.active if active is None else np.asarray(active, np.int32)
        call = lambda rank: self.loopback.call(rank, self.active, epoch, steps, deadline_ms)
        self.calls = {
            r: dataclasses.replace(call(r), vote=np.uint32(1 + r)) for r in range(self.ranks)
        }
        return self

    @property
    def members(self) -> list[int]:
        return np.flatnonzero(self.active).tolist()

    def poison(self, ranks=None) -> None:
        """Fills the windows (of these ranks) like earlier rounds may have: rows of NaN, real
        slots, no flag."""
        layout, heap = self.loopback.layout, self.windows()
        for rank in range(self.ranks) if ranks is None else ranks:
            heap[rank] = 0xFF
            heap[rank, : layout.regions["slots"].offset] = 0
            layout.views(heap[rank : rank + 1])[0]["slots"][...] = 0
        self.set_windows(heap)

    def windows(self) -> np.ndarray:
        """A copy of all windows, uint8 `[R B]`."""
        # Not of the array itself: JAX would keep what it read and not see later writes.
        return np.array(jnp.copy(self.loopback.heap))

    def set_windows(self, heap: np.ndarray) -> None:
        self.loopback.heap = jax.block_until_ready(jnp.asarray(heap))

    def send(self, work: Exchange, rank: int, call: Call | None = None):
        """The first phase of dispatch of one rank."""
        mine = (*self._mine(work, rank), call or self.calls[rank])
        return jax.block_until_ready(self.loopback.send(*mine))

    def _mine(self, work: Exchange, rank: int) -> tuple:
        own = (_narrow(work.x[rank]), work.slots[rank], work.weights[rank])
        return (*own, self.loopback.heap)

    def dispatch(self, work: Exchange, ranks=None) -> dict:
        """What each of `ranks` (all members) receives; the others do not come."""
        ranks = self.members if ranks is None else list(ranks)
        for rank in ranks:
            self.send(work, rank)
        received = {}
        for rank in ranks:
            mine = (*self._mine(work, rank), self.calls[rank])
            received[rank] = self._timed(rank, self.loopback.dispatch, *mine)
            self._learn(rank, received[rank][3])
        return received

    def combine(self, work: Exchange, results, received: dict, ranks=None) -> dict:
        """y of each of `ranks` (all that received); the others computed but do not answer."""
        ranks = list(received) if ranks is None else list(ranks)
        heap, sent, y = self.loopback.heap, {}, {}
        for rank in ranks:
            got = received[rank]
            mine = (_narrow(results[rank]), got[1], got[2])
            answered = self.loopback.send_home(*mine, heap, self.calls[rank])
            sent[rank] = jax.block_until_ready(answered)
        for rank in ranks:
            mine = (work.slots[rank], work.weights[rank], heap, self.calls[rank])
            y[rank], suspicion = self._timed(rank, self.loopback.receive_home, *mine, sent[rank])
            self._learn(rank, suspicion)
            self.calls[rank] = self.calls[rank].next()
        return {rank: np.asarray(part) for rank, part in y.items()}

    def exchange(self, work: Exchange, results, ranks=None) -> tuple[dict, dict]:
        received = self.dispatch(work, ranks)
        return received, self.combine(work, results, received)

    def accused_by(self, rank: int) -> list[int]:
        """In this step, the own entry included: the step was aborted."""
        return np.flatnonzero(self.calls[rank].suspicion).tolist()

    def _learn(self, rank: int, suspicion) -> None:
        self.calls[rank] = self.calls[rank].after(np.asarray(suspicion))

    def _timed(self, rank: int, function, *arguments):
        start = time.monotonic()
        out = jax.block_until_ready(function(*arguments))
        self.seconds[rank] += time.monotonic() - start
        return out


def check_received(loopback: Loopback, work: Exchange, received: dict, heard=None) -> None:
    """Checks that each rank holds the rows, slots, weights and lists of all it heard (all members).

    Nothing may be left of ranks that it did not hear.
    """
    layout = loopback.layout
    heard = work.members if heard is None else heard
    rows, here = naive_dispatch(work.among(heard))
    if layout.dispatch_dtype:
        narrow = np.asarray(through_fp8(layout.hidden)(work.x)).astype(np.float32)
        rows = np.where((here >= 0).any(-1)[..., None], narrow[None], 0)
    for rank, (found, slots, weights, suspicion, vote) in received.items():
        np.testing.assert_array_equal(slots, here[rank], err_msg=f"slots at rank {rank}")
        array = np.asarray(rows_of()(found)).astype(np.float32)
        if layout.dispatch_dtype:
            # Packed twice, in programs that may fuse differently: at most the next value of e4m3.
            error = np.abs(array - rows[rank])
            assert (error <= 2.0**-3 * np.abs(rows[rank]) + 2.0**-10).all(), f"rows at rank {rank}"
        else:
            np.testing.assert_array_equal(array, rows[rank], err_msg=f"rows at rank {rank}")
        shares = np.where(here[rank] >= 0, work.weights, 0)
        np.testing.assert_array_equal(weights, shares, err_msg=f"weights at rank {rank}")
        check_lists(found.lists, here[rank], loopback.slots_per_rank, found.tile_rows)
        assert int(vote) == 1 + max(heard), "the largest vote of those heard"
        missing = sorted(set(work.members) - set(heard))
        assert np.flatnonzero(suspicion).tolist() == missing


def check_sums(loopback: Loopback, work: Exchange, results, y: dict, heard=None) -> None:
    """Checks that each y is the weighted sum of what the ranks heard (all members) computed."""
    summed = work if heard is None else work.among(heard)
    wanted = naive_combine(summed, results)
    # Rounding errors scale with the sum of the magnitudes that are added.
    sizes = naive_combine(summed, np.abs(results))
    bound = CLOSE if loopback.layout.combine == "per_choice" else BF16
    for rank, found in y.items():
        assert found.dtype == np.float32 and np.isfinite(found).all(), f"y of rank {rank}"
        error = np.abs(found - wanted[rank])
        assert (error <= bound * sizes[rank]).all(), f"y of rank {rank} is off by {error.max()}"


def _narrow(values) -> np.ndarray:
    return np.asarray(values).astype(ml_dtypes.bfloat16)
