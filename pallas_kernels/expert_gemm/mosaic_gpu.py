"""Grouped GEMM + SwiGLU on Hopper: rows are gathered where they lie, weights stream past them.

Two kernels, each a loop of every multiprocessor over the tiles that hold rows: gate and up with the
activation (`h`), then down. One warpgroup loads, the others multiply. Weights come by the copy
engine; rows by 16-byte copies out of the window, since those of one expert lie anywhere in it.
A row's result does not depend on the tile it is in, nor on the other rows.
"""

import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from pallas_kernels import simt
from pallas_kernels.expert_gemm.config import GROUP_ROWS, GemmConfig
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp
from pallas_kernels.grouping import ExpertRows
from pallas_kernels.handover import Homes, InArray, InWindow, ResultsAtHome
from pallas_kernels.simt import GROUP_THREADS, Word, entry

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


def _as_data(layer) -> Int32[Array, "1"]:
    """The layer is read by the kernels, so all layers of a model share two of them."""
    return jnp.full(1, layer, jnp.int32)


def _units(tiles, columns: int, blocks: int):
    """How many (tile, column block) pairs this block computes, and which the i-th one is."""
    block = lax.axis_index("block")
    total = tiles[0] * columns
    mine = jnp.maximum((total - block + blocks - 1) // blocks, 0)

    def at(i):
        unit = block + i * blocks
        tile = unit // columns
        return tile, unit % columns, tiles[1 + 2 * tile], tiles[2 + 2 * tile]

    return mine, at


def _launch(body, name: str, config: GemmConfig, out, scratch: dict, operands):
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.groups + 1,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*operands)


def _multiply_stages(multiply, steps: int, step, stages: int, await_stage, free) -> None:
    """`multiply(at)` for each stage of a tile; lets a stage go once the next one is under way.

    `multiply` waits for all products but its own.
    """

    def stage(k, step):
        multiply(await_stage(step))

        @pl.when(k > 0)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)])

        return step + 1

    end = lax.fori_loop(0, steps, stage, step)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(free.at[lax.rem(end - 1, stages)])


def _pass_by(has_rows, steps: int, step, stages: int, await_stage, free) -> None:
    """What a warpgroup without rows in this tile does: it lets the stages go."""

    @pl.when(jnp.logical_not(has_rows))
    def _():
        def stage(k, step):
            plgpu.barrier_arrive(free.at[await_stage(step)])
            return step + 1

        lax.fori_loop(0, steps, stage, step)


def gate_up(
    source: InWindow | InArray, lists: ExpertRows, experts: Experts, config: GemmConfig
) -> BFloat16[Array, "N F"]:
    """`silu(gate(x)) * up(x)` of all received choices, tile by tile: N rows, `tile_rows` per tile.

    Or what else `mlp` makes of gate and up.
    """
    width, hidden, mlp = experts.width, experts.hidden, experts.mlp
    rows, columns, stages, groups = (
        config.tile_rows,
        config.tile_columns,
        config.stages,
        config.groups,
    )
    column_blocks, steps = width // columns, hidden // DEPTH
    cap = lists.rows_max

    def body(*refs):
        *given, layer, bank, grouped, counts, tiles, h = refs[: len(source.operands) + 6]
        x_smem, gate_smem, up_smem, out_smem, offsets, weights_there, rows_there, free = refs[
            len(source.operands) + 6 :
        ]
        group = lax.axis_index("group")
        mine, unit_at = _units(tiles, column_blocks, config.blocks)

        @pl.when(group == groups)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def hand_over(step, left):
                _await_rows(left)
                plgpu.barrier_arrive(rows_there.at[lax.rem(step, stages)])

            def unit(i, step):
                _, column, slot, first = unit_at(i)
                here = jnp.minimum(counts[slot] - first, rows)
                _find_rows(source, given, grouped, offsets, slot * cap + first, here)

                def stage(k, step):
                    at = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[at])

                    for matrix, smem in enumerate((gate_smem, up_smem)):
                        weights = bank.at[
                            slot,
                            layer[0],
                            matrix,
                            pl.ds(column * columns, columns),
                            pl.ds(k * DEPTH, DEPTH),
                        ]
                        plgpu.copy_gmem_to_smem(weights, smem.at[at], weights_there.at[at])
                    _gather(x_smem.at[at], offsets, here, k, rows)

                    @pl.when(step >= LAG)
                    def _():
                        hand_over(step - LAG, LAG)

                    return step + 1

                return lax.fori_loop(0, steps, stage, step)

            done = lax.fori_loop(0, mine, unit, jnp.int32(0))

            @pl.when(done > 0)
            def _():
                for left in reversed(range(LAG)):
                    hand_over(done - 1 - left, left)

        @pl.when(group < groups)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[groups], action="increase")

            def await_stage(step):
                at = lax.rem(step, stages)
                plgpu.barrier_wait(weights_there.at[at])
                plgpu.barrier_wait(rows_there.at[at])
                return at

            def unit(i, step):
                tile, column, slot, first = unit_at(i)
                here = counts[slot] - first - group * GROUP_ROWS

                def scope(gate_acc, up_acc):
                    def multiply(at):
                        x = x_smem.at[at, pl.ds(group * GROUP_ROWS, GROUP_ROWS)]
                        for acc, smem in ((gate_acc, gate_smem), (up_acc, up_smem)):
                            plgpu.wgmma(acc, x, smem.at[at].transpose((1, 0)))
                        plgpu.wgmma_wait(2)

                    _multiply_stages(multiply, steps, step, stages, await_stage, free)
                    return gate_acc[...], up_acc[...]

                @pl.when(here > 0)
                def _():
                    accumulator = plgpu.ACC((GROUP_ROWS, columns))
                    gate, up = pl.run_scoped(scope, accumulator, accumulator)
                    if mlp.bias_width:
                        at = (slot, layer[0], column * columns, columns, width)
                        gate, up = gate + _bias(bank, 0, *at), up + _bias(bank, 1, *at)
                    value = _activate(mlp, gate, up).astype(h.dtype)
                    start = group * GROUP_ROWS
                    out_smem[pl.ds(start, GROUP_ROWS)] = value
                    part = out_smem.at[pl.ds(start, GROUP_ROWS)]
                    _store_rows(part, h, None, tile * rows + start, here, column * columns)

                _pass_by(here > 0, steps, step, stages, await_stage, free)
                return step + steps

            lax.fori_loop(0, mine, unit, jnp.int32(0))

    weight_tile = plgpu.SMEM((stages, columns, DEPTH), jnp.bfloat16, transforms=SWIZZLED)
    scratch = [
        plgpu.SMEM((stages, rows, DEPTH), jnp.bfloat16, transforms=SWIZZLED),
        weight_tile,
        weight_tile,
        plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((2 * rows,), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    ]
    out = jax.ShapeDtypeStruct((lists.tiles_max * rows, width), jnp.bfloat16)
    operands = (*source.operands, _as_data(experts.layer), experts.bank, *lists)
    return _launch(body, "expert_gate_up", config, out, scratch, operands)


def _activate(mlp: ExpertMlp, gate, up):
    if mlp.activation == "swiglu":
        return gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
    gate = jnp.minimum(gate, mlp.limit)
    up = jnp.maximum(jnp.minimum(up, mlp.limit), -mlp.limit)
    return gate * (1.0 / (1.0 + jnp.exp(-mlp.slope * gate))) * (up + 1.0)


def _bias(bank, matrix: int, slot, layer, start, columns: int, width: int):
    """Columns `start ...` of a matrix's bias, for all rows; it lies in the rows below `width`."""
    hidden = bank.shape[-1]
    row = bank.at[slot, layer, matrix, width + start // hidden, pl.ds(start % hidden, columns)]
    values = plgpu.load(row, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), (GROUP_ROWS, columns), (1,))


def down(
    h: BFloat16[Array, "N F"],
    shape: tuple[int, int, int],
    lists: ExpertRows,
    experts: Experts,
    config: GemmConfig,
    homes: Homes | None = None,
) -> BFloat16[Array, "R T K D"] | ResultsAtHome:
    """`h` through the down projection, each row to its choice's place in `[R T K D]`.

    Or in the window of its source, where `homes` says so.
    """
    width, hidden, mlp = experts.width, experts.hidden, experts.mlp
    rows, columns, stages, groups = (
        config.tile_rows,
        config.down_columns,
        config.down_stages,
        config.groups,
    )
    column_blocks, steps = hidden // columns, width // DEPTH
    cap = lists.rows_max

    windows = homes.operands if homes else ()

    def body(*refs):
        refs, scratch = refs[: len(windows) + 7], refs[len(windows) + 7 :]
        *given, h, layer, bank, grouped, counts, tiles, results = refs
        h_smem, weight_smem, out_smem, there, free = scratch
        group = lax.axis_index("group")
        mine, unit_at = _units(tiles, column_blocks, config.blocks)

        @pl.when(group == groups)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def unit(i, step):
                tile, column, slot, _ = unit_at(i)

                def stage(k, step):
                    at = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[at])

                    deep = pl.ds(k * DEPTH, DEPTH)
                    weights = bank.at[slot, layer[0], 2, deep, pl.ds(column * columns, columns)]
                    plgpu.copy_gmem_to_smem(weights, weight_smem.at[at], there.at[at])
                    values = h.at[pl.ds(tile * rows, rows), deep]
                    plgpu.copy_gmem_to_smem(values, h_smem.at[at], there.at[at])
                    return step + 1

                return lax.fori_loop(0, steps, stage, step)

            lax.fori_loop(0, mine, unit, jnp.int32(0))

        @pl.when(group < groups)
        def _multiply():
            plgpu.set_max_registers(MULTIPLY_REGISTERS[groups], action="increase")

            def await_stage(step):
                at = lax.rem(step, stages)
                plgpu.barrier_wait(there.at[at])
                return at

            def unit(i, step):
                _, column, slot, first = unit_at(i)
                start = group * GROUP_ROWS
                here = counts[slot] - first - start

                def scope(acc):
                    def multiply(at):
                        x = h_smem.at[at, pl.ds(group * GROUP_ROWS, GROUP_ROWS)]
                        plgpu.wgmma(acc, x, weight_smem.at[at])
                        plgpu.wgmma_wait(1)

                    _multiply_stages(multiply, steps, step, stages, await_stage, free)
                    return acc[...]

                @pl.when(here > 0)
                def _():
                    value = pl.run_scoped(scope, plgpu.ACC((GROUP_ROWS, columns)))
                    if mlp.bias_width:
                        at = (slot, layer[0], column * columns, columns, width)
                        value = value + _bias(bank, 2, *at)
                    out_smem[pl.ds(start, GROUP_ROWS)] = value.astype(out_smem.dtype)
                    part = out_smem.at[pl.ds(start, GROUP_ROWS)]
                    rows_at = slot * cap + first + start
                    _store_rows(
                        part, results, grouped, rows_at, here, column * columns, homes, given
                    )

                _pass_by(here > 0, steps, step, stages, await_stage, free)
                return step + steps

            lax.fori_loop(0, mine, unit, jnp.int32(0))

    scratch = [
        plgpu.SMEM((stages, rows, DEPTH), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((stages, DEPTH, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    ]
    operands = (*windows, h, _as_data(experts.layer), experts.bank, *lists)
    full = (*shape, hidden)
    if homes:
        # Nothing is written to this array; what comes after the kernel is given it.
        out = jax.ShapeDtypeStruct((1,), jnp.bfloat16)
        written = _launch(body, "expert_down_home", config, out, scratch, operands)
        return ResultsAtHome(written=written, shape=full)
    out = jax.ShapeDtypeStruct(full, jnp.bfloat16)
    return _launch(body, "expert_down", config, out, scratch, operands)


def _find_rows(source: InWindow | InArray, given, grouped, offsets, first, here) -> None:
    """Puts the address of each of a tile's rows into shared memory, two words each."""

    @plgpu.inline_mgpu(
        arg_types=((simt.ref,) * len(given), simt.ref, simt.ref, simt.scalar, simt.scalar)
    )
    def find(_, given, grouped, offsets, first, here):
        index = simt.lane()
        # Earlier gathers of this warpgroup may still read the last tile's addresses.
        simt.group_barrier()
        with simt.when(index < simt.splat(here)):
            pair = simt.load(entry(grouped, simt.splat(first) + index))
            start = source.start(given, pair // source.choices)
            low, high = start.narrow(), (start >> 32).narrow()
            simt.store_words(simt.address(offsets, index * 8), [low, high])
        simt.group_barrier()

    find(tuple(given), grouped, offsets, first, here)


def _gather(x_smem, offsets, here, k, rows: int) -> None:
    """Starts the copies of one stage of a tile's rows, as the matrix unit's swizzle wants them."""

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
    """Where the matrix unit wants a row's chunk within 8 rows of 128 bytes."""
    return row * (DEPTH * 2) + (chunk ^ row) * simt.VECTOR_BYTES


def _await_rows(groups_left: int) -> None:
    """All but the newest `groups_left` stages of this warpgroup's copies are there for all."""

    @plgpu.inline_mgpu()
    def wait(_):
        simt.await_async(groups_left)
        simt.group_barrier()

    wait()


def _store_rows(tile, out, grouped, first, here, column, homes=None, windows=()) -> None:
    """Copies the first `here` rows of a warpgroup's tile in shared memory to rows of `out`.

    Row i goes to row `grouped[first + i]`, or `first + i` where there is no list, from `column` on;
    with `homes` to the place it has there.
    """
    width = tile.shape[-1]
    chunks = width * 2 // simt.VECTOR_BYTES
    lists = () if grouped is None else (grouped,)
    swizzled = plgpu.RefType(SWIZZLED)
    types = (swizzled, simt.ref, (simt.ref,) * len(lists), (simt.ref,) * len(windows))

    @plgpu.inline_mgpu(arg_types=(*types, *(simt.scalar,) * 3))
    def store(_, tile, out, lists, windows, first, here, column):
        index, here, first = simt.lane(), simt.splat(here), simt.splat(first)
        chunk = index % chunks
        simt.group_barrier()
        for start in range(0, GROUP_ROWS, GROUP_THREADS // chunks):
            row = index // chunks + start
            with simt.when(row < here):
                to = simt.load(entry(lists[0], first + row)) if lists else first + row
                if homes:
                    target = homes.start(windows, to)
                else:
                    target = simt.address(out, to.wide() * (out.type.shape[-1] * 2))
                inside = (simt.splat(column) * 2).wide() + (chunk * simt.VECTOR_BYTES).wide()
                block = row // 8 * (width // DEPTH) + chunk // CHUNKS
                at = simt.address(tile, block * (8 * DEPTH * 2) + _swizzle(row & 7, chunk & 7))
                simt.store_wide(target + inside, simt.load_wide(at))
        simt.group_barrier()

    store(tile, out, lists, tuple(windows), first, here, column)
