"""Benchmark of dispatch and combine on one GPU that plays all eight ranks, per rank.

    python -m benchmarks.bench_dispatch_combine --out=benchmarks/results/dispatch_combine.jsonl

The kernels are those of serving. `combine` is timed with the kernel that sends results, which
serving does not need in the mode `per_choice`: there the expert GEMM writes them home, and
`combine_home` is what is left. Ranks take turns, each with its whole exchange, and no byte leaves
the GPU.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import command
from benchmarks.gpu_rates import Copies, add_rate, copy_rate
from benchmarks.gpu_timing import (
    Chained,
    Program,
    Timing,
    add_times,
    calling,
    chain,
    compile_all,
    measure,
    open_gpu,
    shapes_of,
)
from benchmarks.harness import Record, Sheet, Unfit
from benchmarks.loopback import Loopback, random_routing
from benchmarks.wide.exchange import FP8, Family, at_carry, carry_of, is_near
from pallas_kernels.combine.reference import combine_reference
from pallas_kernels.dispatch.reference import dispatch_reference
from pallas_kernels.exchange.call import Call
from pallas_kernels.exchange.fp8 import unpack_rows
from pallas_kernels.exchange.gpu import read_region
from pallas_kernels.window import WindowLayout

RANKS, CHOICES, EXPERTS, SLOTS = 8, 8, 256, 32
SLACK, SLACK_US = 1.3, 5.0  # the aim: within 1.3 x the bound + 5 us
FIXED_TOKENS = 128  # at which membership as a constant is compared


def family_of(
    hidden: int, tokens: tuple[int, ...], dispatch_dtype: str = "", combine: str = "per_choice"
) -> Family:
    """Windows of one kind between RANKS ranks, and how many tokens each sends through them."""
    sizes = {"ranks": RANKS, "choices": CHOICES, "experts": EXPERTS, "hidden": hidden}
    return Family(tokens=tokens, dispatch_dtype=dispatch_dtype, combine=combine, **sizes)


def loopback_of(family: Family, tokens: int) -> Loopback:
    return Loopback(family.layout, SLOTS, tokens=tokens)


FAMILIES = (
    family_of(7168, (1, 16, 32, 64, 128, 256, 512)),
    family_of(7168, (16, 128, 512), FP8, "per_rank"),
    family_of(2048, (16, 128)),
)
QUICK = (family_of(7168, (16, 128)), family_of(7168, (16, 128), FP8, "per_rank"))


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes that one rank sends in an exchange on average: rows, without slots, weights, flags."""

    dispatch: float
    combine: float
    combine_home: float = 0.0  # bytes whose copy takes as long as reading results and writing sums


def bytes_of(slots: np.ndarray, layout: WindowLayout) -> Bytes:
    """For slots `[R T K]`: dispatch sends a row once to each rank that has one of its experts.

    With 2 slots a rank, choices `[0 1 5]` of one token are rows to 2 ranks; `per_choice` sends 3
    rows home and `per_rank` 2.
    """
    owner = np.where(slots >= 0, slots // SLOTS, -1)
    pairs = sum(int((owner == rank).any(-1).sum()) for rank in range(layout.ranks))
    home = int((slots >= 0).sum()) if layout.combine == "per_choice" else pairs
    row_bytes = layout.hidden * np.dtype(layout.row_dtype).itemsize
    ranks = slots.shape[0]
    sums = slots.shape[1] * layout.hidden * 4
    home = home * row_bytes / ranks
    return Bytes(pairs * layout.row_bytes / ranks, home, (home + sums) / 2)


def reached(time_us: float, bound_us: float) -> bool:
    return time_us <= SLACK * bound_us + SLACK_US


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """Data that the ranks exchange; entries of tuples are of one rank."""

    x: tuple  # [T D] each
    slots: tuple  # [T K]
    weights: tuple  # [T K]
    shares: jax.Array  # [R T K], the weights of all ranks
    results: jax.Array  # [R T K D] of all ranks' experts
    received: tuple  # [R T K]
    heap: jax.Array


def make_data(seed: int, tokens: int, layout: WindowLayout, heap) -> tuple[np.ndarray, Data]:
    """Returns all slots `[R T K]`, on the host, and the data. Slot and expert ids are equal."""
    slots = random_routing(np.random.default_rng(seed), RANKS, tokens, CHOICES, EXPERTS)

    @jax.jit
    def make(slots, key):
        x_key, weights_key, results_key = jax.random.split(key, 3)
        x = jax.random.normal(x_key, (RANKS, tokens, layout.hidden), jnp.bfloat16)
        weights = jax.nn.softmax(jax.random.normal(weights_key, slots.shape))
        results = jax.random.normal(results_key, (*slots.shape, layout.hidden), jnp.bfloat16)
        owner, local = slots // SLOTS, slots % SLOTS
        received = tuple(jnp.where(owner == rank, local, -1) for rank in range(RANKS))
        return tuple(x), tuple(slots), tuple(weights), weights, results, received

    return slots, Data(*make(slots, jax.random.key(seed)), heap)


def abstract_data(tokens: int, layout: WindowLayout) -> Data:
    """Shapes of `make_data`, without making any."""
    of = jax.ShapeDtypeStruct
    per_rank = lambda shape, dtype: (of(shape, dtype),) * RANKS
    return Data(
        x=per_rank((tokens, layout.hidden), jnp.bfloat16),
        slots=per_rank((tokens, CHOICES), jnp.int32),
        weights=per_rank((tokens, CHOICES), jnp.float32),
        shares=of((RANKS, tokens, CHOICES), jnp.float32),
        results=of((RANKS, tokens, CHOICES, layout.hidden), jnp.bfloat16),
        received=per_rank((RANKS, tokens, CHOICES), jnp.int32),
        heap=of((layout.ranks, layout.window_bytes), jnp.uint8),
    )


# One exchange of all ranks, one after the other. In the answer that is checked all send before any
# of them waits. What is timed is one kernel after the other as serving runs them, a rank's whole
# exchange at a time: the rank also posts the flags that its peers would (`stand_in`), whose rows
# are those of the round before.


def dispatch_all(loop: Loopback, call: Call, data: Data) -> tuple[list, Call]:
    """Returns what each rank received, and the call for the next exchange."""
    mine = [(data.x[r], data.slots[r], data.weights[r], data.heap) for r in range(RANKS)]
    turn, sent, received = call, [], []
    for rank in range(RANKS):
        sent.append(loop.send(*mine[rank], _at(rank, _after(turn, sent))))
    for rank in range(RANKS):
        received.append(loop.dispatch(*mine[rank], _at(rank, _after(turn, sent))))
        turn = turn.after(received[-1][3])
    vote = functools.reduce(jnp.maximum, [got[4] for got in received])
    return received, dataclasses.replace(turn.next(), vote=vote)


def combine_all(loop: Loopback, call: Call, data: Data) -> tuple[list, Call]:
    """Returns y of each rank, and the call for the next exchange."""
    turn, sent, sums = call, [], []
    for rank in range(RANKS):
        outgoing = (data.results, data.received[rank], data.shares, data.heap)
        sent.append(loop.send_home(*outgoing, _at(rank, _after(turn, sent))))
    everyone = jnp.concatenate(sent)
    for rank in range(RANKS):
        own = (data.slots[rank], data.weights[rank], data.heap)
        y, suspicion = loop.receive_home(*own, _at(rank, turn), everyone)
        sums.append(y)
        turn = turn.after(suspicion)
    return sums, turn.next()


def _at(rank: int, call: Call) -> Call:
    return dataclasses.replace(call, rank=np.int32(rank))


def _after(call: Call, sent: list) -> Call:
    """The call, dependent on all that was sent: each output is a 1 that only a kernel makes."""
    if not sent:
        return call
    zero = jnp.sum(jnp.concatenate(sent)) - len(sent)
    return dataclasses.replace(call, round=call.round + zero.astype(jnp.uint32))


def dispatch_alone(loop: Loopback, call: Call, data: Data) -> Call:
    """The timed dispatch. A rank gets the suspicion of the one before, so that they take turns."""
    for rank in range(RANKS):
        mine = (data.x[rank], data.slots[rank], data.weights[rank], data.heap)
        received = loop.dispatch_alone(*mine, _at(rank, call))
        call = dataclasses.replace(call.after(received[3]), vote=received[4])
    return call.next()


def combine_alone(loop: Loopback, call: Call, data: Data) -> Call:
    """The timed combine: sending, posting, waiting and summing."""
    for rank in range(RANKS):
        at = (data.heap, _at(rank, call))
        outgoing = (data.results, data.received[rank], data.shares)
        sent = loop.send_home_alone(*outgoing, *at)
        own = (data.slots[rank], data.weights[rank])
        _, suspicion = loop.receive_home(*own, *at, sent)
        call = call.after(suspicion)
    return call.next()


def combine_home(loop: Loopback, call: Call, data: Data) -> Call:
    """The timed combine of serving, whose results the expert GEMM wrote home."""
    sent = jnp.zeros(1, jnp.int32)
    for rank in range(RANKS):
        own = (data.slots[rank], data.weights[rank], data.heap)
        _, suspicion = loop.receive_home_alone(*own, _at(rank, call), sent)
        call = call.after(suspicion)
    return call.next()


TIMED = {"dispatch": dispatch_alone, "combine": combine_alone, "combine_home": combine_home}


# Programs.


def live_step(name: str, loop: Loopback):
    """One repetition: `((round, suspicion, vote), call, data)`; membership is an argument."""

    def step(carry, call: Call, data: Data):
        return carry_of(TIMED[name](loop, at_carry(call, carry), data))

    return step


def timed_program(name: str, loop: Loopback, call: Call, data, repetitions: int) -> Program:
    run = chain(live_step(name, loop), repetitions)
    return Program(run, (carry_of(shapes_of(call)), shapes_of(call), shapes_of(data)))


def fixed_program(name: str, loop: Loopback, call: Call, data, repetitions: int) -> Program:
    """The same with members, epoch, deadline and the abort word's address compiled in."""
    step = live_step(name, loop)
    run = chain(lambda carry, data: step(carry, call, data), repetitions)
    return Program(run, (carry_of(shapes_of(call)), shapes_of(data)))


def dispatch_check(loop: Loopback):
    """`(call, data) -> (wrong rows, wrong slots, wrong lists, suspicion)`; all are to be zero."""

    def check(call: Call, data: Data):
        received, following = dispatch_all(loop, call, data)
        x, slots = jnp.stack(data.x), jnp.stack(data.slots)
        rows, local = dispatch_reference(x, slots, call.active, SLOTS)
        wrong_rows = wrong_slots = wrong_lists = 0
        for rank, (source, here, _, suspicion, _) in enumerate(received):
            arrived = read_window(loop, source, suspicion)
            near = is_near(arrived["rows"], rows[rank], loop.layout.dispatch_dtype)
            wanted = local[rank] >= 0
            wrong_rows += jnp.sum(~near & wanted.any(-1)[..., None])
            wrong_slots += jnp.sum(here != local[rank])
            wrong_slots += jnp.sum((arrived["weights"] != data.shares) & wanted)
            wrong_lists += jnp.sum(_listed(source) != local[rank].reshape(-1))
        return wrong_rows, wrong_slots, wrong_lists, jnp.sum(following.suspicion)

    return check


def read_window(loop: Loopback, source, after) -> dict[str, jax.Array]:
    """Rows `[R T D]` and weights `[R T K]` as they lie in the receiving rank's window.

    As `RowsInWindow.array` does it, but ordered by an array of the same shape for any T, so that
    all sizes share two kernels.
    """
    layout, tokens = loop.layout, source.shape[1]
    at = (loop.spec, source.heap, source.call, after)
    found = {name: read_region(name, *at)[:, :tokens] for name in ("rows", "weights")}
    if layout.dispatch_dtype:
        found["rows"] = unpack_rows(found["rows"], layout.hidden, jnp.bfloat16)
    return found


def _listed(source):
    """The slot of each choice as the lists of dispatch give it."""
    grouped = source.lists.grouped.reshape(SLOTS, -1)
    inside = jnp.arange(grouped.shape[1])[None] < source.lists.counts[:, None]
    slot = jnp.broadcast_to(jnp.arange(SLOTS)[:, None], grouped.shape)
    at = jnp.where(inside, grouped, source.slots.size)
    return jnp.full(source.slots.size, -1).at[at].set(slot, mode="drop")


def combine_check(loop: Loopback):
    """`(call, data) -> (wrong sums, suspicion)`; both are to be zero."""
    mode = loop.layout.combine
    # float32 sums in the same order; per_rank rounds up to 8 parts of about 1 to bfloat16.
    absolute = 1e-5 if mode == "per_choice" else 0.03

    def check(call: Call, data: Data):
        sums, following = combine_all(loop, call, data)
        everyone = jnp.broadcast_to(data.results, (RANKS, *data.results.shape))
        own = (jnp.stack(data.slots), data.shares)
        expected = combine_reference(everyone, *own, call.active, SLOTS, mode)
        near = jnp.abs(jnp.stack(sums) - expected) <= absolute
        return jnp.sum(~near), jnp.sum(following.suspicion)

    return check


CHECKS = {"dispatch": dispatch_check, "combine": combine_check}


# The run.


@dataclasses.dataclass(frozen=True)
class Line:
    """One result, of one rank."""

    bench: str
    family: Family
    tokens: int
    timing: Timing
    bound_us: float
    sent_bytes: float
    fixed: Timing | None = None

    @property
    def dtype(self) -> str:
        return (self.bench == "dispatch" and self.family.dispatch_dtype) or "bfloat16"

    @property
    def shape(self) -> dict:
        found = {
            "tokens": self.tokens,
            "hidden": self.family.hidden,
            "experts": EXPERTS,
            "top_k": CHOICES,
            "dtype": self.dtype,
            "gpus": 1,
        }
        mode = {} if self.bench == "dispatch" else {"combine": self.family.combine}
        return found | mode

    def add_to(self, sheet: Sheet) -> None:
        of = sheet.of(self.bench, **self.shape)
        add_times(of, self.timing, baseline=self.fixed, bound=self.bound_us)

    def __str__(self) -> str:
        aim = command.verdict(reached(self.timing.p50_us, self.bound_us))
        mode = "" if self.bench == "dispatch" else self.family.combine
        text = (
            f"{self.bench:12} T={self.tokens:<4} D={self.family.hidden} K={CHOICES} R={RANKS} "
            f"{self.dtype:13} {mode:10} {self.timing.p50_us:7.1f} us p50 "
            f"{self.timing.p99_us:7.1f} us p99   bound {self.bound_us:6.1f} us   "
            f"{self.sent_bytes / self.timing.p50_us / 1e3:6.0f} GB/s sent   "
            f"n={len(self.timing.samples_us)}   {SLACK} x bound + {SLACK_US:g} us: {aim}"
        )
        if self.fixed:
            ratio = self.timing.p50_us / self.fixed.p50_us
            text += f"\n         members compiled in: {self.fixed.p50_us:.1f} us, ratio {ratio:.4f}"
        return text + (f"\n         {self.timing.note}" if self.timing.note else "")


def repetitions_of(sent_bytes: float) -> int:
    """Repetitions of one run, which then takes some milliseconds and at most a second."""
    return max(10, min(40, math.ceil(40e6 / max(sent_bytes, 1))))


def run_family(family: Family, copies: Copies, samples: int, seed: int) -> list[Line]:
    """Checks and times all sizes of a family. Raises Unfit for a wrong answer."""
    memory, lines = loopback_of(family, max(family.tokens)), []
    programs, worlds = {}, {}
    for index, tokens in enumerate(family.tokens):
        loop = loopback_of(family, tokens)
        # An epoch of its own: no flag of the size before is ever right.
        call = jax.tree.map(jnp.asarray, memory.call(rank=0, epoch=index + 1))
        shapes = abstract_data(tokens, family.layout)
        slots = random_routing(np.random.default_rng(seed), RANKS, tokens, CHOICES, EXPERTS)
        worlds[tokens] = call, bytes_of(slots, family.layout)
        for name in family.exchanges:
            count = repetitions_of(getattr(worlds[tokens][1], name))
            key = f"{name} {tokens}"
            if name in CHECKS:
                programs[f"check {key}"] = Program(CHECKS[name](loop), (shapes_of(call), shapes))
            programs[f"time {key}"] = timed_program(name, loop, call, shapes, count)
            if tokens == FIXED_TOKENS and not family.dispatch_dtype:
                programs[f"fixed {key}"] = fixed_program(
                    name, loop, jax.tree.map(np.asarray, call), shapes, count
                )
    executables = compile_all(programs)
    for tokens in family.tokens:
        call, sent = worlds[tokens]
        _, data = make_data(seed, tokens, family.layout, memory.heap)
        for name in family.exchanges:
            key, sent_bytes = f"{name} {tokens}", getattr(sent, name)
            if name in CHECKS:
                _require_right(f"{family} {key}", executables[f"check {key}"](call, data))
            count = repetitions_of(sent_bytes)
            runs = {"live": calling(executables[f"time {key}"], call, data)}
            if f"fixed {key}" in executables:
                runs["fixed"] = calling(executables[f"fixed {key}"], data)
            chains = {kind: Chained(run, carry_of(call), count) for kind, run in runs.items()}
            found = measure(chains, samples)
            for run in chains.values():
                _require_right(f"{family} {key}, timed", (run.carry[1].sum(),))
            timings = {kind: timing.part(RANKS) for kind, timing in found.items()}
            bound_us = copies.microseconds(math.ceil(sent_bytes), 2 * RANKS)
            lines.append(
                Line(
                    bench=name,
                    family=family,
                    tokens=tokens,
                    timing=timings["live"],
                    bound_us=bound_us,
                    sent_bytes=sent_bytes,
                    fixed=timings.get("fixed"),
                )
            )
            print(lines[-1], flush=True)
    return lines


def _require_right(what: str, wrong: tuple) -> None:
    if any(int(count) for count in wrong):
        raise Unfit(f"{what}: wrong entries {[int(count) for count in wrong]}")


def chosen(families: tuple[Family, ...], wanted: tuple[int, ...] | None) -> tuple[Family, ...]:
    """Each family with the wanted sizes only, or as it is."""
    if wanted is None:
        return families
    return tuple(dataclasses.replace(family, tokens=wanted) for family in families)


def main() -> list[Record]:
    device, quick = open_gpu(), absl_flags.FLAGS.quick
    families = QUICK if quick else FAMILIES
    if absl_flags.FLAGS.shapes is not None:
        families = chosen(families, command.numbers("shapes", ()))
    samples, sheet = 10 if quick else 40, Sheet("", device, RANKS, {})
    print(f"{device}, as {RANKS} ranks that take turns", flush=True)
    copies = Copies(max(5, samples // 4))
    copies.check()
    rate = copy_rate(copies, samples // 2)
    print(f"copy of 1 GiB: {rate / 1e12:.2f} TB/s read and written", flush=True)
    add_rate(sheet, "copy_rate", rate, samples // 2)
    for seed, family in enumerate(families):
        for line in run_family(family, copies, samples, seed):
            line.add_to(sheet)
    return sheet.records


if __name__ == "__main__":
    command.define_gpu()
    command.run(main)
