"""Dispatch and combine of one rank among others: its data, the check of an answer, timed programs.

Every rank draws the rows of all ranks from one seed, so it can compute what it must receive. The
expert of flat slot i multiplies by `(i % 8 + 1) / 4`, so it can also compute what must come home.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import Program, shapes_of
from benchmarks.loopback import random_routing
from benchmarks.wide.clock import UNROLLED, timed_chain
from pallas_kernels.combine.api import combine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.window import WindowLayout

FP8 = "float8_e4m3fn"
ROUTINGS = {"uniform": 0.0, "skewed": 1.2}  # exponents of Zipf over experts
TIMED_BYTES = 60e6  # of one run of a chain, about
REPETITIONS_MIN, REPETITIONS_MAX = 8, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Windows of one kind, and the sizes that go through them."""

    ranks: int
    tokens: tuple[int, ...]  # of each rank
    choices: int
    hidden: int
    experts: int
    combine: str = "per_choice"
    dispatch_dtype: str = ""
    row_dtype: str = "bfloat16"

    @property
    def layout(self) -> WindowLayout:
        return WindowLayout(
            self.ranks,
            max(self.tokens),
            self.choices,
            self.hidden,
            self.combine,
            self.row_dtype,
            self.dispatch_dtype,
        )

    @property
    def slots_per_rank(self) -> int:
        return -(-self.experts // self.ranks)

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names of the timed exchanges. The sending kernel makes the partial sums of `per_rank`."""
        home = self.row_dtype == "bfloat16" and self.combine == "per_choice"
        return ("dispatch", "combine", "combine_home") if home else ("dispatch", "combine")


@dataclasses.dataclass(frozen=True)
class RemoteBytes:
    """Rows that the busiest rank sends to other ranks; without slots, weights and flags."""

    dispatch: int
    combine: int


def routing_of(family: Family, tokens: int, routing: str, seed: int = 0) -> np.ndarray:
    """Flat slots `[R T K]`, the same on every rank. Slot and expert ids are equal."""
    random = np.random.default_rng((seed, tokens))
    sizes = (family.ranks, tokens, family.choices, family.experts)
    return random_routing(random, *sizes, skew=ROUTINGS[routing])


def remote_bytes(slots: np.ndarray, family: Family) -> RemoteBytes:
    """With 2 slots a rank, choices `[0 1 5]` of a token of rank 0 are one row to rank 2; home come
    one row `per_choice` and one `per_rank` from there; what stays on rank 0 is not counted."""
    ranks, layout = family.ranks, family.layout
    owner = np.where(slots >= 0, slots // family.slots_per_rank, -1)
    goes = np.stack([(owner == rank).sum(-1) for rank in range(ranks)])  # [owner, source, T]
    apart = ~np.eye(ranks, dtype=bool)[..., None]
    rows = (goes > 0) & apart
    home = rows if family.combine == "per_rank" else goes * apart
    most = lambda counts: int(counts.max(initial=0))
    return RemoteBytes(
        dispatch=most(rows.sum((0, 2))) * layout.row_bytes,
        combine=most(home.sum((1, 2))) * layout.hidden * np.dtype(layout.row_dtype).itemsize,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """Data that one rank brings to an exchange of T tokens, and data that it must receive."""

    x: jax.Array  # [T D]
    slots: jax.Array  # [T K]
    weights: jax.Array  # [T K]
    here: jax.Array  # [R T K], of all sources the slots on this rank
    shares: jax.Array  # [R T K], the weights of all sources
    results: jax.Array  # [R T K D], what this rank's experts make of what it receives

    @property
    def choices(self) -> Choices:
        return Choices(self.slots, self.weights)


@dataclasses.dataclass(frozen=True)
class Rank:
    """One rank of a family, in its own process."""

    family: Family
    rank: int
    slab_bytes: int

    @property
    def spec(self) -> ExchangeSpec:
        return ExchangeSpec(self.family.layout, self.family.slots_per_rank, self.slab_bytes)

    def data(self, slots: np.ndarray, seed: int = 0) -> Data:
        """The data of a routing; compiled as one program."""
        return jax.jit(self._data)(slots, jax.random.key(seed))

    def data_shapes(self, tokens: int) -> Data:
        slots = jax.ShapeDtypeStruct((self.family.ranks, tokens, self.family.choices), jnp.int32)
        return jax.eval_shape(self._data, slots, jax.random.key(0))

    def _data(self, slots, key) -> Data:
        x, weights = self._drawn(slots.shape, key)
        owner, local = slots // self.family.slots_per_rank, slots % self.family.slots_per_rank
        here = jnp.where((slots >= 0) & (owner == self.rank), local, -1)
        results = self._results(x, here)
        return Data(x[self.rank], slots[self.rank], weights[self.rank], here, weights, results)

    def _drawn(self, shape, key):
        """Rows `[R T D]` and weights `[R T K]` of all ranks."""
        ranks, tokens, _ = shape
        rows_key, weights_key = jax.random.split(key)
        draw = lambda k: jax.random.normal(k, (tokens, self.family.hidden), jnp.float32)
        x = jnp.stack(
            [draw(k).astype(self.family.row_dtype) for k in jax.random.split(rows_key, ranks)]
        )
        return x, jax.nn.softmax(jax.random.normal(weights_key, shape))

    def _results(self, rows, here):
        flat = here + self.rank * self.family.slots_per_rank
        scale = jnp.where(here >= 0, (flat % 8 + 1) / 4, 0).astype(jnp.float32)
        return (scale[..., None] * rows[:, :, None]).astype(self.family.row_dtype)

    def call(self, epoch: int, deadline_ms: int, abort_address: np.ndarray, first: int) -> Call:
        """The Call of this rank, all being active. `first` is the epoch's first round."""
        return Call(
            rank=np.int32(self.rank),
            active=np.ones(self.family.ranks, np.int32),
            epoch=np.uint32(epoch),
            round=np.uint32(first),
            deadline_ms=np.uint32(deadline_ms),
            vote=np.uint32(1),
            suspicion=np.zeros(self.family.ranks, np.int32),
            abort_address=abort_address,
        )

    # One repetition of what is timed: (carry, call, data, heap) -> carry.

    def dispatch(self, carry, call: Call, data: Data, heap):
        call, x = at_carry(call, carry), data.x
        if self.family.dispatch_dtype:
            # Else packing rows would be done once for all rounds: they do not change.
            x = x + call.suspicion[0].astype(x.dtype)
        *_, suspicion, vote = dispatch(x, data.choices, heap, call, self.spec)
        return call.next().round, suspicion, vote

    def combine(self, carry, call: Call, data: Data, heap):
        return self._combine(data.results, carry, call, data, heap)

    def combine_home(self, carry, call: Call, data: Data, heap):
        """Combine as in serving, where the expert GEMM wrote results into their owners' windows."""
        from pallas_kernels.handover import ResultsAtHome

        _, suspicion, _ = carry
        written = ResultsAtHome(written=suspicion, shape=data.results.shape)
        return self._combine(written, carry, call, data, heap)

    def _combine(self, results, carry, call: Call, data: Data, heap):
        call = at_carry(call, carry)
        received = Choices(data.here, data.shares)
        _, suspicion = combine(results, received, data.choices, heap, call, self.spec)
        return call.next().round, suspicion, call.vote

    def timed(self) -> dict:
        """The functions by name."""
        return {name: getattr(self, name) for name in self.family.exchanges}

    # Whether an exchange is right.

    def check(self, call: Call, slots, key, heap):
        """A dispatch and a combine: (wrong rows, slots, weights, sums, suspicion); all to be 0.

        The specifications are those of `reference.py` beside the kernels, for this rank alone.
        """
        family = self.family
        x, shares = self._drawn(slots.shape, key)
        data = self._data(slots, key)
        found, received, suspicion, _ = dispatch(data.x, data.choices, heap, call, self.spec)
        call, (here, sent) = call.after(suspicion), received
        rows = found.array() if hasattr(found, "array") else found
        wanted = (data.here >= 0).any(-1)[..., None]
        near = is_near(rows, x, family.dispatch_dtype)
        wrong_rows = jnp.sum(~near & wanted)
        wrong_slots = jnp.sum(here != data.here)
        wrong_weights = jnp.sum((sent != shares) & (data.here >= 0))
        results = self._results(jnp.where(wanted, rows, 0), here)
        y, suspicion = combine(results, received, data.choices, heap, call, self.spec)
        scale = jnp.where(data.slots >= 0, (data.slots % 8 + 1) / 4, 0)
        total = jnp.sum(scale * data.weights, axis=-1)[:, None]
        own = data.x.astype(jnp.float32)
        # Results, and the sums of per_rank, are rounded to the row's dtype; rows perhaps to fp8.
        share = 2.0**-7 if not family.dispatch_dtype else 2.0**-4 + 2.0**-6
        wrong_sums = jnp.sum(~(jnp.abs(y - total * own) <= share * total * jnp.abs(own) + 1e-3))
        return wrong_rows, wrong_slots, wrong_weights, wrong_sums, jnp.sum(suspicion)


def is_near(rows, x, dispatch_dtype: str):
    """e4m3 keeps 3 bits of a value; below its normal numbers it is this far off at most, for
    channels of up to 8: 2**-10 * 8 / 448. Then the row is rounded to bfloat16."""
    relative, absolute = (2**-4 + 2**-8, 2e-5) if dispatch_dtype else (0.0, 0.0)
    rows, x = rows.astype(jnp.float32), x.astype(jnp.float32)
    return jnp.abs(rows - x) <= relative * jnp.abs(x) + absolute  # NaN is not near


def at_carry(call: Call, carry) -> Call:
    """The call of the next exchange, after what an earlier one left."""
    round_, suspicion, vote = carry
    return dataclasses.replace(call, round=round_, suspicion=suspicion, vote=vote)


def carry_of(call: Call):
    return call.round, call.suspicion, call.vote


def repetitions_of(sent_bytes: int, shared: bool) -> int:
    """Repetitions of one run of a few milliseconds; fewer where ranks take turns on one GPU."""
    if shared:
        return REPETITIONS_MIN
    wanted = math.ceil(TIMED_BYTES / max(sent_bytes, 1))
    return max(REPETITIONS_MIN, min(REPETITIONS_MAX, wanted // UNROLLED * UNROLLED))


def programs_of(rank: Rank, tokens: int, call: Call, heap, repetitions: int) -> dict[str, Program]:
    """The programs of one size: `check`, and each of `timed`."""
    family = rank.family
    slots = jax.ShapeDtypeStruct((family.ranks, tokens, family.choices), jnp.int32)
    call, heap = shapes_of(call), jax.ShapeDtypeStruct(heap.shape, heap.dtype)
    programs = {"check": Program(rank.check, (call, slots, shapes_of(jax.random.key(0)), heap))}
    data = rank.data_shapes(tokens)
    for name, step in rank.timed().items():
        run = timed_chain(step, repetitions)
        programs[name] = Program(run, (carry_of(call), call, data, heap))
    return programs
