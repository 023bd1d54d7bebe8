"""Benchmark of the experts of one rank at given rows per expert: time, bytes and operations.

    python -m benchmarks.bench_expert_gemm --out=benchmarks/results/expert_gemm.jsonl
    python -m benchmarks.bench_expert_gemm --tune --shapes=8,64,512   # a table of configurations

Rows lie in an array and are listed by slot beforehand; in serving, dispatch does both.
"""

import dataclasses
import functools
import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

from benchmarks import command
from benchmarks.gpu_rates import add_rate, matmul_rate, read_rate
from benchmarks.gpu_timing import (
    Chained,
    Program,
    Timing,
    add_times,
    calling,
    chain,
    compile_all,
    measure_one,
    open_gpu,
)
from benchmarks.harness import Record, Sheet, Unfit
from benchmarks.world import draw_experts
from launch.errors import UsageError
from pallas_kernels.expert_gemm import mosaic_gpu
from pallas_kernels.expert_gemm.config import STAGES_MIN, GemmConfig, config_for
from pallas_kernels.expert_gemm.reference import expert_gemm_reference
from pallas_kernels.grouping import group_rows, tile_rows_for
from pallas_kernels.handover import InArray

CHOICES = 8
CHECKED_TOKENS = 32  # compared with the reference at once
READ_AIM, MATMUL_AIM = 0.85, 0.65  # of the measured rates, for few and for many rows
MANY_ROWS = 512
SHARED_MEMORY_BYTES = 232_448  # of one block, on an H100
COMPARED_ROWS = (32, 512)  # rows per expert at which others' kernels are timed
HUGE = 1e30


@dataclasses.dataclass(frozen=True)
class Experts:
    """A rank's experts, and the rows per expert that are timed."""

    slots: int
    hidden: int
    width: int  # F
    rows: tuple[int, ...]

    @property
    def bank_shape(self) -> tuple[int, ...]:
        return (self.slots, 1, 3, self.width, self.hidden)

    @property
    def expert_bytes(self) -> int:
        return 3 * self.width * self.hidden * 2


EXPERTS = (
    Experts(32, 7168, 2048, (8, 16, 32, 64)),
    Experts(32, 2048, 768, (8, 16, 32, 64)),
    Experts(16, 7168, 2048, (512, 1024)),
    Experts(32, 2048, 768, (512,)),
)
QUICK = (Experts(32, 2048, 768, (8, 64)), Experts(16, 7168, 2048, (512,)))


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: `rows` for each expert, from T tokens of one source with 8 choices each."""

    experts: Experts
    rows: int

    @property
    def tokens(self) -> int:
        return self.experts.slots * self.rows // CHOICES

    @property
    def pairs(self) -> int:
        return self.tokens * CHOICES

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, self.tokens, CHOICES)

    @property
    def config(self) -> GemmConfig:
        """The configuration that serving uses."""
        experts = self.experts
        rows = self.pairs / experts.slots
        return config_for(
            tile_rows_for(rows), experts.slots, experts.width, experts.hidden, rows_per_slot=rows
        )

    @property
    def flop(self) -> float:
        return 2 * 3 * self.pairs * self.experts.width * self.experts.hidden

    def weight_bytes(self, slots: np.ndarray) -> int:
        """Bytes of the experts that have a row, each once."""
        return len(np.unique(slots)) * self.experts.expert_bytes

    def bound_us(self, slots: np.ndarray, read_per_s: float, flop_per_s: float) -> float:
        """Reading the weights once, or the operations, whichever takes longer."""
        return max(self.weight_bytes(slots) / read_per_s, self.flop / flop_per_s) * 1e6

    def __str__(self) -> str:
        e = self.experts
        return f"rows={self.rows:<5} S={e.slots} D={e.hidden} F={e.width}"


def cases_of(experts: tuple[Experts, ...], rows: tuple[int, ...] | None) -> list[Case]:
    """All cases, or those with these rows; rows that no experts have are timed for the first.

    Raises UsageError where experts cannot share tokens of 8 choices evenly.
    """
    known = {n for each in experts for n in each.rows}
    found = []
    for index, each in enumerate(experts):
        extra = tuple(n for n in rows or () if n not in known) if index == 0 else ()
        wanted = [n for n in each.rows if rows is None or n in rows] + list(extra)
        found += [Case(each, n) for n in wanted]
    for case in found:
        if case.tokens % CHECKED_TOKENS:
            raise UsageError(
                f"{case} are {case.tokens} tokens; they must be a multiple of {CHECKED_TOKENS}"
            )
    return found


def balanced(case: Case) -> np.ndarray:
    """Slots `[1 T K]`: every slot exactly as often."""
    return (np.arange(case.pairs) % case.experts.slots).astype(np.int32).reshape(case.shape)


def at_random(case: Case, seed: int = 0) -> np.ndarray:
    """Slots `[1 T K]`: eight different ones for each token."""
    keys = np.random.default_rng(seed).random((case.tokens, case.experts.slots))
    return np.argsort(keys, axis=1)[None, :, :CHOICES].astype(np.int32)


ROUTINGS = {"balanced": balanced, "random": at_random}


class After(typing.NamedTuple):
    """`handover.InArray`, and an array that has to be there first."""

    rows: jax.Array
    after: jax.Array
    choices: int = CHOICES

    @property
    def operands(self):
        return (self.rows, self.after)

    start = InArray.start


# Programs. `lists` are those of `group_rows`.


def gemm_step(case: Case, config: GemmConfig):
    """`(y, rows, lists, bank) -> y`; the earlier y is a dependency only."""

    def step(y, rows, lists, bank):
        source, experts = After(rows, y), mosaic_gpu.Experts(bank, layer=0)
        return mosaic_gpu.expert_gemm_mosaic(source, case.shape, lists, experts, config)

    return step


def gate_up_step(case: Case, config: GemmConfig):
    def step(h, rows, lists, bank):
        experts = mosaic_gpu.Experts(bank, layer=0)
        return mosaic_gpu.gate_up(After(rows, h), lists, experts, config)

    return step


def down_step(case: Case, config: GemmConfig):
    """The counts, plus a zero that depends on the kernel's result: repetitions form a chain."""

    def step(counts, h, lists, bank):
        lists = lists._replace(counts=counts)
        y = mosaic_gpu.down(h, case.shape, lists, mosaic_gpu.Experts(bank, layer=0), config)
        return counts + (y[0, 0, 0, 0] > HUGE).astype(jnp.int32)

    return step


def abstract(case: Case, tile_rows: int):
    """Shapes of rows, lists, bank and y."""
    of, experts = jax.ShapeDtypeStruct, case.experts
    slots = of(case.shape, jnp.int32)
    lists = jax.eval_shape(lambda slots: group_rows(slots, experts.slots, tile_rows), slots)
    rows = of((1, case.tokens, experts.hidden), jnp.bfloat16)
    bank = of(experts.bank_shape, jnp.bfloat16)
    return rows, lists, bank, of((*case.shape, experts.hidden), jnp.bfloat16)


def hidden_rows(lists, tile_rows: int, experts: Experts):
    """Shape of what is between gate-up and down."""
    return jax.ShapeDtypeStruct((lists.tiles_max * tile_rows, experts.width), jnp.bfloat16)


def timed_program(case: Case, repetitions: int) -> Program:
    rows, lists, bank, y = abstract(case, case.config.tile_rows)
    run = chain(gemm_step(case, case.config), repetitions)
    return Program(run, (y, rows, lists, bank), ("carry",))


def lists_program(case: Case) -> Program:
    make = lambda s: group_rows(s, case.experts.slots, case.config.tile_rows)
    return Program(make, (jax.ShapeDtypeStruct(case.shape, jnp.int32),))


def part_program(part: str, case: Case, config: GemmConfig, repetitions: int) -> Program:
    """One of the two kernels alone, for --tune."""
    rows, lists, bank, _ = abstract(case, config.tile_rows)
    h = hidden_rows(lists, config.tile_rows, case.experts)
    if part == "gate_up":
        run = chain(gate_up_step(case, config), repetitions)
        return Program(run, (h, rows, lists, bank), ("carry",))
    return Program(chain(down_step(case, config), repetitions), (lists.counts, h, lists, bank))


def reference_program(experts: Experts) -> Program:
    """`(y, rows, slots, bank) -> how far off`, of CHECKED_TOKENS tokens; up to 1 is right.

    The reference in float32, slot by slot. The kernels round `silu(gate) * up` and the result to
    bfloat16, 2**-9 of each; sums of thousands of such errors are normal, of 0.2 % of a usual
    result. So 2 % of a usual result and 1 % of this one are five times what may happen by chance.
    """

    def worst(y, rows, slots, bank):
        wide = rows.astype(jnp.float32)

        def of_slot(total, slot):
            mine = jnp.where(slots == slot, 0, -1)
            weights = jax.lax.dynamic_index_in_dim(bank, slot, keepdims=True)[:, 0]
            return total + expert_gemm_reference(wide, mine, weights.astype(jnp.float32)), None

        with jax.default_matmul_precision("highest"):
            zero = jnp.zeros(y.shape, jnp.float32)
            expected, _ = jax.lax.scan(of_slot, zero, jnp.arange(experts.slots))
        return distance(y, expected)

    of = jax.ShapeDtypeStruct
    rows = of((1, CHECKED_TOKENS, experts.hidden), jnp.bfloat16)
    slots = of((1, CHECKED_TOKENS, CHOICES), jnp.int32)
    y = of((*slots.shape, experts.hidden), jnp.bfloat16)
    return Program(worst, (y, rows, slots, of(experts.bank_shape, jnp.bfloat16)))


def distance(y, expected):
    """The largest error, where 1 is `0.02 * usual + 0.01 * |expected|`; NaN is far off."""
    expected = expected.astype(jnp.float32)
    usual = jnp.sqrt(jnp.mean(expected**2))
    error = jnp.abs(y.astype(jnp.float32) - expected) / (0.02 * usual + 0.01 * jnp.abs(expected))
    # XLA's maximum may pass over NaN.
    return jnp.max(jnp.where(jnp.isfinite(error), error, jnp.inf))


# Others' kernels: rows sorted by expert beforehand, results left in that order.


def _silu_product(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(jnp.bfloat16)


def ragged_dot_mgpu_experts(case: Case):
    """`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`; not tuned beyond the block of rows."""
    block_rows = 64 if case.rows <= 64 else 128

    def product(lhs, rhs, group_sizes, transposed):
        return ragged_dot_mgpu.ragged_dot(
            lhs,
            rhs,
            group_sizes=group_sizes,
            block_m=block_rows,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=2,
            transpose_rhs=transposed,
        )

    def experts(rows, group_sizes, bank):
        gate, up, down = bank
        h = _silu_product(
            product(rows, gate, group_sizes, True), product(rows, up, group_sizes, True)
        )
        return product(h, down, group_sizes, False)

    return experts


def plain_ragged_dot(ragged_dot):
    """Experts by a function with the arguments of `jax.lax.ragged_dot`; `rhs` is `[S K N]`."""

    def experts(rows, group_sizes, bank):
        gate, up, down = bank
        dot = lambda lhs, rhs: ragged_dot(lhs, rhs, group_sizes=group_sizes)
        return dot(_silu_product(dot(rows, gate), dot(rows, up)), down)

    return experts


@dataclasses.dataclass(frozen=True)
class Other:
    """Another implementation; `turned` wants gate and up as `[S D F]`."""

    experts: typing.Callable
    turned: bool
    repetitions: int


def others(case: Case) -> dict[str, Other]:
    found = {
        "ragged_dot_mgpu": Other(ragged_dot_mgpu_experts(case), False, 10),
        "lax_ragged_dot": Other(plain_ragged_dot(jax.lax.ragged_dot), True, 2),
    }
    try:
        import tokamax
    except ImportError:
        return found
    return found | {"tokamax": Other(plain_ragged_dot(tokamax.ragged_dot), True, 10)}


def other_program(case: Case, other: Other, repetitions: int) -> Program:
    """`((group_sizes, y), rows, bank) -> (group_sizes, y)`."""

    def step(carry, rows, bank):
        sizes, _ = carry
        y = other.experts(rows, sizes, bank).astype(jnp.bfloat16)
        return sizes + (y[0, 0] > HUGE).astype(jnp.int32), y

    of, experts = jax.ShapeDtypeStruct, case.experts
    as_they_are, turned = (
        of((experts.slots, *shape), jnp.bfloat16)
        for shape in ((experts.width, experts.hidden), (experts.hidden, experts.width))
    )
    first = turned if other.turned else as_they_are
    y = of((case.pairs, experts.hidden), jnp.bfloat16)
    carry = (of((experts.slots,), jnp.int32), y)
    operands = (carry, y, (first, first, as_they_are))
    return Program(chain(step, repetitions), operands, ("carry",))


# The run.


def make_bank(experts: Experts, seed: int):
    """Random weights `[S 1 3 F D]`; products of normal rows are of the size of one."""
    return draw_experts(np.arange(experts.slots) + seed, experts.bank_shape[1:], experts.width)


def make_rows(case: Case):
    shape = (1, case.tokens, case.experts.hidden)
    return jax.random.normal(jax.random.key(case.rows), shape, jnp.bfloat16)


def repetitions_of(case: Case) -> int:
    """Repetitions of one run, which then takes some milliseconds."""
    seconds = max(case.experts.slots * case.experts.expert_bytes / 3e12, case.flop / 6e14)
    return max(4, min(30, math.ceil(5e-3 / seconds)))


def require_right(reference, y, rows, slots, bank, what: str) -> None:
    """Compares all tokens with the reference. Raises Unfit."""
    for start in range(0, rows.shape[1], CHECKED_TOKENS):
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, np.int32(start), CHECKED_TOKENS, axis=1)
        error = float(reference(cut(y), cut(rows), cut(slots), bank))
        if not error <= 1:
            raise Unfit(f"{what}: tokens from {start} are {error:.3g} times as far off as allowed")


@dataclasses.dataclass(frozen=True)
class Rates:
    read_per_s: float
    flop_per_s: float


def shape_of(case: Case, routing: str) -> dict:
    experts = case.experts
    return {
        "tokens": case.tokens,
        "rows_per_expert": case.rows,
        "hidden": experts.hidden,
        "expert_hidden": experts.width,
        "experts": experts.slots,
        "top_k": CHOICES,
        "dtype": "bfloat16",
        "routing": routing,
    }


def add_rates(sheet: Sheet, case: Case, timing: Timing, weight_bytes: int, rates: Rates):
    """Adds and returns the bytes of weights per second and the operations per second."""
    return [
        sheet.add(
            metric,
            amount / timing.p50_us / 1e6,
            unit,
            bound=best / 1e12,
            baseline=best / 1e12,
            samples=len(timing.samples_us),
        )
        for metric, amount, best, unit in (
            ("weights_rate", weight_bytes, rates.read_per_s, "TB/s"),
            ("flop_rate", case.flop, rates.flop_per_s, "TFLOP/s"),
        )
    ]


def describe(case: Case, routing: str, timing: Timing, bound_us: float, records) -> str:
    weights, flop = records
    many = case.rows >= MANY_ROWS
    aim = MATMUL_AIM if many else READ_AIM
    met = (flop.ratio if many else weights.ratio) >= aim
    goal = f"{'matmul' if many else 'read'} rate x {aim}: {command.verdict(met)}"
    text = (
        f"expert_gemm {case} {routing:8} {timing.p50_us:8.1f} us p50 {timing.p99_us:8.1f} us p99   "
        f"bound {bound_us:7.1f} us   {weights.value:5.2f} TB/s ({weights.ratio:.2f})   "
        f"{flop.value:6.1f} TFLOP/s ({flop.ratio:.2f})   n={len(timing.samples_us)}   {goal}"
    )
    return text + (f"\n    {timing.note}" if timing.note else "")


def run_case(sheet: Sheet, case: Case, bank, executables, rates: Rates, samples: int, others: bool):
    """Checks and times balanced and random rows; adds and prints each. Raises Unfit."""
    rows = make_rows(case)
    for routing, make in ROUTINGS.items():
        slots = make(case)
        lists = executables[f"lists {case}"](jnp.asarray(slots))
        run = calling(executables[f"time {case}"], rows, lists, bank)
        y = run(jnp.zeros((*case.shape, case.experts.hidden), jnp.bfloat16))
        reference = executables[f"reference {case.experts}"]
        require_right(reference, y, rows, jnp.asarray(slots), bank, f"{case} {routing}")
        chained = Chained(run, y, repetitions_of(case))
        timing, of = measure_one(chained, samples), sheet.of(**shape_of(case, routing))
        bound_us = case.bound_us(slots, rates.read_per_s, rates.flop_per_s)
        derived = add_rates(of, case, timing, case.weight_bytes(slots), rates)
        print(describe(case, routing, timing, bound_us, derived), flush=True)
        rivals, best = {}, None
        if routing == "balanced" and others:
            rivals = run_others(case, bank, rows, slots, chained.carry, max(3, samples // 4))
        if rivals:
            name = min(rivals, key=lambda name: rivals[name].p50_us)
            best = rivals[name]
            print(f"    fastest other: {name}, x {timing.p50_us / best.p50_us:.3f}", flush=True)
        add_times(of, timing, baseline=best, bound=bound_us)
        for name, other in rivals.items():
            add_times(of, other, f"time_{name}", bound=bound_us)


def run_others(case: Case, bank, rows, slots: np.ndarray, y, samples: int) -> dict[str, Timing]:
    """Times others' kernels on the same rows, sorted beforehand, which is not counted."""
    order = np.argsort(slots.reshape(-1), kind="stable")
    ordered = rows[0][order // CHOICES]
    expected = y.reshape(case.pairs, -1)[order]
    sizes = jnp.asarray(np.bincount(slots.reshape(-1), minlength=case.experts.slots), jnp.int32)
    gate, up, down = (bank[:, 0, matrix] for matrix in range(3))
    found = {}
    for name, other in others(case).items():
        turn = (lambda a: jnp.swapaxes(a, 1, 2)) if other.turned else (lambda a: a)
        matrices = (turn(gate), turn(up), down)
        try:
            run = compile_all({"": other_program(case, other, other.repetitions)})[""]
            chained = Chained(
                calling(run, ordered, matrices),
                (jnp.copy(sizes), jnp.zeros_like(expected)),
                other.repetitions,
            )
            chained.go(1)
            error = float(distance(chained.carry[1], expected))
            if not error <= 2:  # both are rounded
                raise Unfit(f"its results are {error:.3g} times as far off as allowed")
            count = samples if other.repetitions > 2 else 3
            found[name] = measure_one(chained, count)
        except Exception as error:  # another project's kernel may refuse a shape in any way
            reason = str(error).strip().splitlines() or [""]
            print(f"    {name}: not measured: {type(error).__name__}: {reason[0][:160]}")
            continue
        print(f"    {name:18} {found[name].p50_us:9.1f} us p50", flush=True)
    return found


# --tune.


def shared_bytes(part: str, config: GemmConfig) -> int:
    """Shared memory of a block, as the kernels ask for it, up to barriers."""
    depth, rows = mosaic_gpu.DEPTH, config.tile_rows
    if part == "gate_up":
        stage = (rows + 2 * config.tile_columns) * depth * 2
        return config.stages * stage + rows * config.tile_columns * 2 + 8 * rows
    stage = (rows + config.down_columns) * depth * 2
    return config.down_stages * stage + rows * config.down_columns * 2


def variants(part: str, case: Case) -> list[GemmConfig]:
    """Configurations that fit, with as many stages as there is room for and with one less."""
    experts, found = case.experts, []
    columns, all_columns = (
        (experts.width, (64, 128)) if part == "gate_up" else (experts.hidden, (64, 128, 256))
    )
    for tile_rows, tile_columns in itertools.product((64, 128), all_columns):
        if columns % tile_columns:
            continue
        names = ("tile_columns", "stages") if part == "gate_up" else ("down_columns", "down_stages")
        make = lambda stages: GemmConfig(
            tile_rows=tile_rows, **dict(zip(names, (tile_columns, stages), strict=True))
        )
        fitting = [
            n
            for n in range(STAGES_MIN if part == "gate_up" else 2, 11)
            if shared_bytes(part, make(n)) <= SHARED_MEMORY_BYTES - 1024
        ]
        found += [make(n) for n in fitting[-2:]]
    return found


def variant_name(part: str, config: GemmConfig) -> str:
    columns, stages = (
        (config.tile_columns, config.stages)
        if part == "gate_up"
        else (config.down_columns, config.down_stages)
    )
    return f"{part:8} rows {config.tile_rows:3}  columns {columns:3}  stages {stages:2}"


def tune(cases: list[Case], samples: int) -> None:
    """Prints the time of each kernel for each variant, the fastest first."""
    for case in cases:
        bank, rows = make_bank(case.experts, 0), make_rows(case)
        slots, repetitions = jnp.asarray(at_random(case)), repetitions_of(case)
        print(f"\n{case}, random rows; serving takes {case.config}", flush=True)
        listed = {
            tile_rows: jax.jit(
                functools.partial(group_rows, num_slots=case.experts.slots, tile_rows=tile_rows)
            )(slots)
            for tile_rows in (64, 128)
        }
        for part in ("gate_up", "down"):
            named = {variant_name(part, config): config for config in variants(part, case)}
            failures: dict[str, Exception] = {}
            programs = {n: part_program(part, case, c, repetitions) for n, c in named.items()}
            times = []
            for name, run in compile_all(programs, failures).items():
                lists, tile_rows = listed[named[name].tile_rows], named[name].tile_rows
                shape = hidden_rows(lists, tile_rows, case.experts).shape
                h = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
                first, second = (h, rows) if part == "gate_up" else (lists.counts, h)
                call = calling(run, second, lists, bank)
                timing = measure_one(Chained(call, first, repetitions), samples)
                times.append((timing.p50_us, name))
            for time_us, name in sorted(times):
                print(f"  {name}  {time_us:9.1f} us", flush=True)
            for name, error in failures.items():
                print(f"  {name}  {type(error).__name__}: {str(error)[:120]}", flush=True)


def main() -> list[Record]:
    device, quick = open_gpu(), absl_flags.FLAGS.quick
    wanted = command.numbers("shapes", ()) or None
    cases = cases_of(QUICK if quick and wanted is None else EXPERTS, wanted)
    samples, sheet = 10 if quick else 30, Sheet("expert_gemm", device, 1, {})
    if absl_flags.FLAGS.tune:
        tune(cases, max(5, samples // 3))
        return []
    rates = Rates(read_rate(samples // 2), matmul_rate(samples // 2))
    print(
        f"{device}: reads {rates.read_per_s / 1e12:.2f} TB/s, "
        f"multiplies {rates.flop_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    add_rate(sheet, "read_rate", rates.read_per_s, samples // 2)
    add_rate(sheet, "matmul_rate", rates.flop_per_s, samples // 2)
    programs = {f"reference {case.experts}": reference_program(case.experts) for case in cases}
    for case in cases:
        programs[f"time {case}"] = timed_program(case, repetitions_of(case))
        programs[f"lists {case}"] = lists_program(case)
    executables = compile_all(programs)
    for experts, group in itertools.groupby(cases, lambda case: case.experts):
        bank = make_bank(experts, 0)
        for case in group:
            others = absl_flags.FLAGS.others and case.rows in COMPARED_ROWS
            run_case(sheet, case, bank, executables, rates, samples, others)
        del bank
    return sheet.records


def define() -> None:
    command.define_gpu()
    absl_flags.DEFINE_bool("tune", False, "Print a table of configurations instead.")
    absl_flags.DEFINE_bool("others", True, "Time others' kernels as well, at some sizes.")


if __name__ == "__main__":
    define()
    command.run(main)
