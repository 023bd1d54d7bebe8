"""Grouped GEMM + SwiGLU on Hopper: rows are gathered where they lie, weights stream past them.

Two kernels: `expert_gate_up` computes gate, up and the activation (`h`), `expert_down` the down
projection. In both, each block loops over units, a tile of rows times a block of columns. One
warpgroup loads, the others multiply 64 rows each. Weights come by the copy engine (TMA), rows by
16-byte copies out of the window, since the rows of one expert lie anywhere in it. A row's result
does not depend on the tile it is in, nor on other rows.

**Pipeline.** Operands pass through a ring of `stages` buffers, DEPTH channels of the sum each.
Stage number `step` uses buffer `step % stages`; steps count on over the units of a block. Each
buffer has one barrier of each kind:

- `weights_there` (gate_up), 2 arrivals: the copies of gate and of up. Multiplying warpgroups wait.
  After: both tiles of weights are in the buffer.
- `rows_there` (gate_up), 1 arrival: the loading warpgroup, LAG stages after it started the copies.
  Multiplying warpgroups wait. After: the rows are in the buffer, visible to the matrix unit.
- `there` (down), 2 arrivals: the copies of weights and of `h`. Multiplying warpgroups wait. After:
  both operands are in the buffer.
- `free`, `groups` arrivals: each multiplying warpgroup, once the products that read the buffer are
  complete. The loading warpgroup waits, from step `stages` on. After: the buffer may be
  overwritten.

A warpgroup without rows in a tile still waits for each stage and arrives at `free`.

**Example.** Tiles of 64 rows; 3 experts that get 67, 0 and 3 of 70 rows; D=128, F=256; columns of
128; 2 blocks. Tile 0 is expert 0 from row 0 (64 rows), tile 1 expert 0 from row 64 (3 rows), tile
2 expert 2 from row 0 (3 rows). Expert 1 has no tile, so its weights are not read. gate_up has 3 x
2 units: block 0 computes columns 0 to 127 of the tiles 0, 1, 2, block 1 columns 128 to 255. A unit
takes 128 / 64 = 2 stages, so a block passes 6. With 5 buffers stage 5 is the first that waits for
`free`, of buffer 0. In each stage `weights_there` counts 2 arrivals, `rows_there` 1, and `free` 1,
as a tile of 64 rows has one multiplying warpgroup. For tile 1 three rows are copied; the other 61
of the buffer hold leftovers, whose products are not stored.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import simt
from pallas_kernels.expert_gemm.config import GROUP_ROWS, GemmConfig
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp
from pallas_kernels.grouping import ExpertRows
from pallas_kernels.handover import Homes, InArray, InWindow, ResultsAtHome
from pallas_kernels.simt import GROUP_THREADS, Word, entry
from pallas_kernels.simt.mlir import KernelRef

DEPTH = 64  # channels of one stage: 128 bytes, the copy engine's widest swizzle
CHUNKS = DEPTH * 2 // simt.VECTOR_BYTES  # 16-byte pieces of a row in one stage
LAG = 2  # stages of gathered rows under way before the oldest is handed over
SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
LOAD_REGISTERS, MULTIPLY_REGISTERS = 56, {1: 232, 2: 216}


class Experts(typing.NamedTuple):
    """Weights of a rank's slots, and the layer and function that are computed."""

    bank: BFloat16[Array, "S L 3 F D"]
    layer: "int | Int32[Array, '']"
    mlp: ExpertMlp = SWIGLU

    @property
    def width(self) -> int:
        """F; the bank's rows below are biases and padding."""
        return self.mlp.bias_width or self.bank.shape[3]

    @property
    def hidden(self) -> int:
        return self.bank.shape[4]


def expert_gemm_mosaic(
    source: InWindow | InArray,
    shape: tuple[int, int, int],
    lists: ExpertRows,
    experts: Experts,
    config: GemmConfig,
    homes: Homes | None = None,
) -> BFloat16[Array, "R T K D"] | ResultsAtHome:
    """Like `expert_gemm.api.expert_gemm` for shape (R, T, K).

    Rows of choices that run elsewhere stay unwritten. With `homes` results are written there only.
    """
    h = gate_up(source, lists, experts, config)
    return down(h, shape, lists, experts, config, homes)


def _as_data(layer: "int | Int32[Array, '']") -> Int32[Array, "1"]:
    """The layer as an operand, so that all layers of a model share the two kernels."""
    return jnp.full(1, layer, jnp.int32)


class Tiles(typing.NamedTuple):
    """References to the tiles of ExpertRows."""

    count: Int32[Array, "1"]
    slots: Int32[Array, "N"]
    firsts: Int32[Array, "N"]


class Unit(typing.NamedTuple):
    """A tile of rows times a block of columns; all int32 scalars."""

    tile: Array
    column: Array  # number of the column block
    slot: Array
    first: Array  # position of the tile's first row among those of the slot


# (this warpgroup, how many units its block computes, the i-th of them)
Units = tuple[Array, Array, Callable[[Array], Unit]]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the warpgroups of a kernel agree on.

    Args:
        config: of the launch.
        columns: of a column block.
        column_blocks: column blocks of a tile.
        steps: stages of a unit.
        stages: buffers of the ring.
    """

    config: GemmConfig
    columns: int
    column_blocks: int
    steps: int
    stages: int

    def units(self, tiles: Tiles) -> Units:
        """Part of a kernel: the work of this block."""
        group, block, blocks = lax.axis_index("group"), lax.axis_index("block"), self.config.blocks
        total = tiles.count[0] * self.column_blocks
        mine = jnp.maximum((total - block + blocks - 1) // blocks, 0)

        def at(i: Array) -> Unit:
            unit = block + i * blocks
            tile = unit // self.column_blocks
            column = unit % self.column_blocks
            return Unit(tile, column, tiles.slots[tile], tiles.firsts[tile])

        return group, mine, at

    def load(
        self, units: Units, free: KernelRef, begin: Callable, start: Callable, finish: Callable
    ) -> None:
        """Part of a kernel: the loop of the loading warpgroup.

        `begin(unit)` returns what `start(unit, begun, k, step, at)` needs to start the copies of
        stage k into buffer `at`; `finish(steps)` runs after the last one.
        """
        _, mine, unit_at = units

        def load_unit(i, step):
            unit = unit_at(i)
            begun = begin(unit)

            def stage(k, step):
                at = lax.rem(step, self.stages)

                @pl.when(step >= self.stages)
                def _():
                    # After: all multiplying warpgroups are done with what the buffer held.
                    plgpu.barrier_wait(free.at[at])

                start(unit, begun, k, step, at)
                return step + 1

            return lax.fori_loop(0, self.steps, stage, step)

        finish(lax.fori_loop(0, mine, load_unit, jnp.int32(0)))

    def multiply(
        self,
        units: Units,
        counts: KernelRef,
        barriers: tuple[KernelRef, ...],
        product: Callable,
        sums: int,
        store: Callable,
    ) -> None:
        """Part of a kernel: the loop of a multiplying warpgroup; `barriers` are (there, free).

        `product(at, *accumulators)` starts the matrix instructions on buffer `at`, and waits until
        only they are in flight. `store(unit, start, here, *sums)` takes the sums of a unit: `here`
        rows from row `start` of the tile (more than 64 if the next warpgroup has some, too).
        """
        (*there, free), (group, mine, unit_at) = barriers, units

        def await_stage(step):
            at = lax.rem(step, self.stages)
            for barrier in there:
                plgpu.barrier_wait(barrier.at[at])  # After: all operands of the stage are there.
            return at

        def multiply_unit(i, step):
            unit = unit_at(i)
            start = group * GROUP_ROWS
            here = counts[unit.slot] - unit.first - start

            def scope(*accumulators):
                def stage(k, step):
                    product(await_stage(step), *accumulators)

                    @pl.when(k > 0)
                    def _():
                        # The products of the stage before are complete: its buffer is free.
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, self.stages)])

                    return step + 1

                end = lax.fori_loop(0, self.steps, stage, step)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(end - 1, self.stages)])
                return tuple(accumulator[...] for accumulator in accumulators)

            @pl.when(here > 0)
            def _():
                accumulator = plgpu.ACC((GROUP_ROWS, self.columns))
                store(unit, start, here, *pl.run_scoped(scope, *[accumulator] * sums))

            @pl.when(jnp.logical_not(here > 0))
            def _pass_by():
                def stage(k, step):
                    plgpu.barrier_arrive(free.at[await_stage(step)])
                    return step + 1

                lax.fori_loop(0, self.steps, stage, step)

            return step + self.steps

        lax.fori_loop(0, mine, multiply_unit, jnp.int32(0))

    def launch(
        self,
        body: Callable,
        name: str,
        out: jax.ShapeDtypeStruct,
        scratch: list,
        operands: tuple[Array, ...],
    ) -> Array:
        """Runs `body` in `config.blocks` blocks of one loading and `groups` other warpgroups."""
        body.__name__ = name
        return plgpu.kernel(
            body,
            out_type=out,
            grid=(self.config.blocks,),
            grid_names=("block",),
            num_threads=self.config.groups + 1,
            thread_name="group",
            scratch_types=scratch,
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
        )(*operands)


@jax.named_scope("gate_up")
def gate_up(
    source: InWindow | InArray, lists: ExpertRows, experts: Experts, config: GemmConfig
) -> BFloat16[Array, "N F"]:
    """`silu(gate(x)) * up(x)`, or what `experts.mlp` names, of all received choices.

    Row `i * tile_rows + j` of the result belongs to row j of tile i.
    """
    width, hidden, mlp = experts.width, experts.hidden, experts.mlp
    rows, columns, stages = config.tile_rows, config.tile_columns, config.stages
    work = Work(config, columns, width // columns, hidden // DEPTH, stages)

    def body(*refs: typing.Any) -> None:  # references, barriers and tuples of them
        count = len(source.operands)
        given, (layer, bank, grouped, counts, *rest) = refs[:count], refs[count:]
        tiles, (h, *scratch) = Tiles(*rest[:3]), rest[3:]
        x_smem, gate_smem, up_smem, out_smem, offsets, weights_there, rows_there, free = scratch
        units = group, *_ = work.units(tiles)

        @pl.when(group == config.groups)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def hand_over(step, left):
                # After: this warpgroup's copies of `step` are complete, for all of its threads.
                _await_rows(left)
                plgpu.barrier_arrive(rows_there.at[lax.rem(step, stages)])

            @jax.named_scope("find rows")
            def begin(unit: Unit):
                here = jnp.minimum(counts[unit.slot] - unit.first, rows)
                first = unit.slot * lists.rows_max + unit.first
                _find_rows(source, given, grouped, offsets, first, here)
                return here

            @jax.named_scope("load")
            def start(unit: Unit, here, k, step, at):
                for matrix, smem in enumerate((gate_smem, up_smem)):
                    weights = bank.at[
                        unit.slot,
                        layer[0],
                        matrix,
                        pl.ds(unit.column * columns, columns),
                        pl.ds(k * DEPTH, DEPTH),
                    ]
                    plgpu.copy_gmem_to_smem(weights, smem.at[at], weights_there.at[at])
                _gather(x_smem.at[at], offsets, here, k, rows)

                @pl.when(step >= LAG)
                def _():
                    hand_over(step - LAG, LAG)

            def finish(steps):
                @pl.when(steps > 0)
                def _():
                    for left in reversed(range(LAG)):
                        hand_over(steps - 1 - left, left)

            work.load(units, free, begin, start, finish)

        @pl.when(group < config.groups)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[config.groups], action="increase")

            @jax.named_scope("multiply")
            def product(at, gate_sum, up_sum):
                x = x_smem.at[at, pl.ds(group * GROUP_ROWS, GROUP_ROWS)]
                for total, smem in ((gate_sum, gate_smem), (up_sum, up_smem)):
                    plgpu.wgmma(total, x, smem.at[at].transpose((1, 0)))
                plgpu.wgmma_wait(2)

            @jax.named_scope("activate")
            def store(unit: Unit, start, here, gate, up):
                if mlp.bias_width:
                    at = (unit.slot, layer[0], unit.column * columns, columns, width)
                    gate, up = gate + _bias(bank, 0, *at), up + _bias(bank, 1, *at)
                value = _activate(mlp, gate, up).astype(h.dtype)
                out_smem[pl.ds(start, GROUP_ROWS)] = value
                part = out_smem.at[pl.ds(start, GROUP_ROWS)]
                _store_rows(part, h, unit.tile * rows + start, here, unit.column * columns)

            barriers = (weights_there, rows_there, free)
            work.multiply(units, counts, barriers, product, 2, store)

    weight_tile = plgpu.SMEM((stages, columns, DEPTH), jnp.bfloat16, transforms=SWIZZLED)
    scratch = [
        plgpu.SMEM((stages, rows, DEPTH), jnp.bfloat16, transforms=SWIZZLED),
        weight_tile,
        weight_tile,
        plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((2 * rows,), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=config.groups, num_barriers=stages),
    ]
    out = jax.ShapeDtypeStruct((lists.tiles_max * rows, width), jnp.bfloat16)
    operands = (*source.operands, _as_data(experts.layer), experts.bank, *lists)
    return work.launch(body, "expert_gate_up", out, scratch, operands)


def _activate(
    mlp: ExpertMlp, gate: Float32[Array, "N F"], up: Float32[Array, "N F"]
) -> Float32[Array, "N F"]:
    """As `mlp.activate`, in operations that Mosaic GPU lowers."""
    if mlp.activation == "swiglu":
        return gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
    gate = jnp.minimum(gate, mlp.limit)
    up = jnp.maximum(jnp.minimum(up, mlp.limit), -mlp.limit)
    return gate * (1.0 / (1.0 + jnp.exp(-mlp.slope * gate))) * (up + 1.0)


def _bias(
    bank: KernelRef, matrix: int, slot: Array, layer: Array, start: Array, columns: int, width: int
) -> Float32[Array, "N C"]:
    """Columns from `start` on of a matrix's bias, for all rows; the bank has it below `width`."""
    hidden = bank.shape[-1]
    row = bank.at[slot, layer, matrix, width + start // hidden, pl.ds(start % hidden, columns)]
    values = plgpu.load(row, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), (GROUP_ROWS, columns), (1,))


@jax.named_scope("down")
def down(
    h: BFloat16[Array, "N F"],
    shape: tuple[int, int, int],
    lists: ExpertRows,
    experts: Experts,
    config: GemmConfig,
    homes: Homes | None = None,
) -> BFloat16[Array, "R T K D"] | ResultsAtHome:
    """The down projection of `h`; each row goes to its choice's place in `[R T K D]`.

    With `homes` it goes to the window of its source instead.
    """
    width, hidden, mlp = experts.width, experts.hidden, experts.mlp
    rows, columns, stages = config.tile_rows, config.down_columns, config.down_stages
    work = Work(config, columns, hidden // columns, width // DEPTH, stages)
    windows = homes.operands if homes else ()

    def body(*refs: typing.Any) -> None:  # references, barriers and tuples of them
        count = len(windows)
        given, (h, layer, bank, grouped, counts, *rest) = refs[:count], refs[count:]
        tiles, (results, *scratch) = Tiles(*rest[:3]), rest[3:]
        h_smem, weight_smem, out_smem, there, free = scratch
        units = group, *_ = work.units(tiles)

        @pl.when(group == config.groups)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            @jax.named_scope("load")
            def start(unit: Unit, _, k, step, at):
                deep = pl.ds(k * DEPTH, DEPTH)
                weights = bank.at[
                    unit.slot, layer[0], 2, deep, pl.ds(unit.column * columns, columns)
                ]
                plgpu.copy_gmem_to_smem(weights, weight_smem.at[at], there.at[at])
                values = h.at[pl.ds(unit.tile * rows, rows), deep]
                plgpu.copy_gmem_to_smem(values, h_smem.at[at], there.at[at])

            work.load(units, free, lambda unit: None, start, lambda steps: None)

        @pl.when(group < config.groups)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[config.groups], action="increase")

            @jax.named_scope("multiply")
            def product(at, total):
                x = h_smem.at[at, pl.ds(group * GROUP_ROWS, GROUP_ROWS)]
                plgpu.wgmma(total, x, weight_smem.at[at])
                plgpu.wgmma_wait(1)

            @jax.named_scope("send home" if homes else "store")
            def store(unit: Unit, start, here, value):
                if mlp.bias_width:
                    at = (unit.slot, layer[0], unit.column * columns, columns, width)
                    value = value + _bias(bank, 2, *at)
                out_smem[pl.ds(start, GROUP_ROWS)] = value.astype(out_smem.dtype)
                part = out_smem.at[pl.ds(start, GROUP_ROWS)]
                first = unit.slot * lists.rows_max + unit.first + start
                target = Target(grouped, homes, given)
                _store_rows(part, results, first, here, unit.column * columns, target)

            work.multiply(units, counts, (there, free), product, 1, store)

    scratch = [
        plgpu.SMEM((stages, rows, DEPTH), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((stages, DEPTH, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=config.groups, num_barriers=stages),
    ]
    operands = (*windows, h, _as_data(experts.layer), experts.bank, *lists)
    full = (*shape, hidden)
    if homes:
        # Nothing is written to this array; it orders what follows after the kernel.
        out = jax.ShapeDtypeStruct((1,), jnp.bfloat16)
        written = work.launch(body, "expert_down_home", out, scratch, operands)
        return ResultsAtHome(written=written, shape=full)
    out = jax.ShapeDtypeStruct(full, jnp.bfloat16)
    return work.launch(body, "expert_down", out, scratch, operands)


def _find_rows(
    source: InWindow | InArray,
    given: tuple[KernelRef, ...],
    grouped: KernelRef,
    offsets: KernelRef,
    first: Array,
    here: Array,
) -> None:
    """Part of a kernel: writes the address of each row of a tile to shared memory, two words."""

    @plgpu.inline_mgpu(
        arg_types=((simt.ref,) * len(given), simt.ref, simt.ref, simt.scalar, simt.scalar)
    )
    def find(_, given, grouped, offsets, first, here):
        index = simt.lane()
        simt.group_barrier()  # After: no thread reads the last tile's addresses any more.
        with simt.when(index < simt.splat(here)):
            pair = simt.load(entry(grouped, simt.splat(first) + index))
            start = source.start(given, pair // source.choices)
            low, high = start.narrow(), (start >> 32).narrow()
            simt.store_words(simt.address(offsets, index * 8), [low, high])
        simt.group_barrier()  # After: all threads may read the addresses.

    find(tuple(given), grouped, offsets, first, here)


def _gather(x_smem: KernelRef, offsets: KernelRef, here: Array, k: Array, rows: int) -> None:
    """Part of a kernel: starts the copies of one stage of a tile's rows, swizzled."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), simt.ref, simt.scalar, simt.scalar))
    def gather(_, x_smem, offsets, here, k):
        index, here = simt.lane(), simt.splat(here)
        chunk, base = index % CHUNKS, simt.address(x_smem)
        deep = simt.splat(k).wide() * (DEPTH * 2) + (chunk * simt.VECTOR_BYTES).wide()
        for first in range(0, rows, GROUP_THREADS // CHUNKS):
            row = index // CHUNKS + first
            with simt.when(row < here):
                low, high = simt.load_words(simt.address(offsets, row * 8), 2)
                start = low.wide() | (high.wide() << 32)
                place = row // 8 * (8 * DEPTH * 2) + _swizzle(row & 7, chunk)
                simt.copy_async(base + place, start + deep)
        simt.commit_async()

    gather(x_smem, offsets, here, k)


def _swizzle(row: Word, chunk: Word) -> Word:
    """Offset of a row's chunk within 8 rows of 128 bytes, as the matrix unit reads them."""
    return row * (DEPTH * 2) + (chunk ^ row) * simt.VECTOR_BYTES


def _await_rows(groups_left: int) -> None:
    """Part of a kernel: waits for this warpgroup's copies but the newest `groups_left` stages."""

    @plgpu.inline_mgpu()
    def wait(_):
        simt.await_async(groups_left)
        simt.group_barrier()

    wait()


class Target(typing.NamedTuple):
    """Rows of choices: row i of a tile belongs to choice `grouped[first + i]`."""

    grouped: Int32[Array, "_"]
    homes: Homes | None
    windows: tuple  # references to the operands of `homes`


def _store_rows(
    tile: KernelRef,
    out: KernelRef,
    first: Array,
    here: Array,
    column: Array,
    target: Target | None = None,
) -> None:
    """Part of a kernel: copies the first `here` rows of a warpgroup's tile in shared memory.

    Row i goes to row `first + i` of `out`, from `column` on; with a target, to the row of its
    choice in `out` or at the choice's home.
    """
    width = tile.shape[-1]
    chunks = width * 2 // simt.VECTOR_BYTES
    lists, homes, windows = ((target.grouped,), *target[1:]) if target else ((), None, ())
    swizzled = plgpu.RefType(SWIZZLED)
    types = (swizzled, simt.ref, (simt.ref,) * len(lists), (simt.ref,) * len(windows))

    @plgpu.inline_mgpu(arg_types=(*types, *(simt.scalar,) * 3))
    def store(_, tile, out, lists, windows, first, here, column):
        index, here, first = simt.lane(), simt.splat(here), simt.splat(first)
        chunk = index % chunks
        simt.group_barrier()  # After: the tile in shared memory is complete.
        for start in range(0, GROUP_ROWS, GROUP_THREADS // chunks):
            row = index // chunks + start
            with simt.when(row < here):
                number = simt.load(entry(lists[0], first + row)) if lists else first + row
                if homes:
                    start_of_row = homes.start(windows, number)
                else:
                    start_of_row = simt.address(out, number.wide() * (out.type.shape[-1] * 2))
                inside = (simt.splat(column) * 2).wide() + (chunk * simt.VECTOR_BYTES).wide()
                block = row // 8 * (width // DEPTH) + chunk // CHUNKS
                at = simt.address(tile, block * (8 * DEPTH * 2) + _swizzle(row & 7, chunk & 7))
                simt.store_wide(start_of_row + inside, simt.load_wide(at))
        simt.group_barrier()  # After: the tile may be overwritten.

    store(tile, out, lists, tuple(windows), first, here, column)
