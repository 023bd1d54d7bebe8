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
from jaxtyping import Array, BFloat16, Int32, UInt32

from pallas_kernels import peers
from pallas_kernels.combine.mosaic_gpu import ResultsAtHome
from pallas_kernels.expert_gemm.config import GROUP_ROWS, GemmConfig
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp
from pallas_kernels.gpu import (
    GROUP_THREADS,
    ExchangeSpec,
    RowLists,
    entry,
    exchange_scalars,
    open_heap,
)
from pallas_kernels.peers import Word

DEPTH = 64  # channels of one stage: 128 bytes, the copy engine's widest swizzle
CHUNKS = DEPTH * 2 // peers.VECTOR_BYTES  # 16-byte pieces of a row in one stage
LAG = 2  # stages of gathered rows under way before the oldest is handed over
SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
LOAD_REGISTERS, MULTIPLY_REGISTERS = 56, {1: 232, 2: 216}


class ExpertRows(typing.NamedTuple):
    """The lists of `gpu.RowLists`."""

    grouped: Int32[Array, "_"]
    counts: Int32[Array, "S"]
    tiles: Int32[Array, "_"]


class InWindow(typing.NamedTuple):
    """Rows at their place in the own window of this round."""

    place: ExchangeSpec
    heap: Array
    round: UInt32[Array, "1"]
    rank: Int32[Array, "1"]

    @property
    def operands(self):
        return (self.heap, self.round, self.rank)

    def start(self, refs, row: Word, tokens: int) -> Word:
        """Address of row `s * tokens + t`."""
        heap = open_heap(self.place, *refs)
        return heap.region("rows", heap.rank, row // tokens, row % tokens)


class Homes(typing.NamedTuple):
    """The windows of the rows' sources: there `returns[this rank, t, k]` takes a result."""

    place: ExchangeSpec
    heap: Array
    round: UInt32[Array, "1"]
    rank: Int32[Array, "1"]
    tokens: int
    choices: int

    @property
    def operands(self):
        return (self.heap, self.round, self.rank)

    def start(self, refs, pair: Word) -> Word:
        """Address for the result of choice `(s * tokens + t) * choices + k`."""
        heap, of_source = open_heap(self.place, *refs), self.tokens * self.choices
        inside = pair % of_source
        token, choice = inside // self.choices, inside % self.choices
        return heap.region("returns", pair // of_source, heap.rank, token, choice)


class InArray(typing.NamedTuple):
    """Rows in an array `[R T D]`."""

    rows: Array

    @property
    def operands(self):
        return (self.rows,)

    def start(self, refs, row: Word, tokens: int) -> Word:
        del tokens
        return peers.address(refs[0], row.wide() * (self.rows.shape[-1] * 2))


def expert_gemm_mosaic(
    source: InWindow | InArray,
    shape: tuple[int, int, int],
    lists: ExpertRows,
    bank: BFloat16[Array, "S L 3 F D"],
    layer,
    config: GemmConfig,
    homes: Homes | None = None,
    mlp: ExpertMlp = SWIGLU,
) -> BFloat16[Array, "R T K D"] | ResultsAtHome:
    """As `expert_gemm.api.expert_gemm` for shape (R, T, K); other choices' rows stay unwritten.

    With `homes` results are written there, and nothing else is.
    """
    h = gate_up(source, shape, lists, bank, layer, config, mlp)
    return down(h, shape, lists, bank, layer, config, homes, mlp)


def group_rows(slots: Int32[Array, "R T K"], num_slots: int, tile_rows: int) -> ExpertRows:
    """The lists for rows that did not come through a window."""
    ranks, tokens, _ = slots.shape
    flat, pairs = slots.reshape(-1), slots.size
    cap, tiles_max = ranks * tokens, pairs // tile_rows + min(num_slots, pairs)
    one_hot = (flat[:, None] == jnp.arange(num_slots)).astype(jnp.int32)
    place = jnp.sum((jnp.cumsum(one_hot, axis=0) - 1) * one_hot, axis=1)
    counts = jnp.sum(one_hot, axis=0)
    at = jnp.where(flat >= 0, flat * cap + place, num_slots * cap)
    grouped = jnp.zeros(num_slots * cap, jnp.int32).at[at].set(jnp.arange(pairs), mode="drop")
    ends = jnp.cumsum(-(-counts // tile_rows))
    tile = jnp.arange(tiles_max)
    slot = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), num_slots - 1)
    first = (tile - jnp.where(slot > 0, ends[slot - 1], 0)) * tile_rows
    entries = jnp.stack([slot, first], axis=1).reshape(-1)
    tiles = jnp.concatenate([ends[-1:], entries]).astype(jnp.int32)
    return ExpertRows(grouped, counts, tiles)


def _as_data(layer) -> Int32[Array, "1"]:
    """The layer is read by the kernels, so all layers of a model share two of them."""
    return jnp.full(1, layer, jnp.int32)


def _tiles_max(lists: ExpertRows) -> int:
    return (lists.tiles.shape[0] - 1) // 2


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
    source, shape, lists: ExpertRows, bank, layer, config: GemmConfig, mlp: ExpertMlp = SWIGLU
) -> BFloat16[Array, "N F"]:
    """`silu(gate(x)) * up(x)` of all received choices, tile by tile: N rows, `tile_rows` per tile.

    Or what else `mlp` makes of gate and up.
    """
    (_, tokens, choices), (_, _, _, width, hidden) = shape, bank.shape
    width = mlp.bias_width or width  # below F are biases, and padding
    rows, columns, stages, groups = (
        config.tile_rows,
        config.tile_columns,
        config.stages,
        config.groups,
    )
    column_blocks, steps = width // columns, hidden // DEPTH
    cap = lists.grouped.shape[0] // lists.counts.shape[0]

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
                _find_rows(
                    source, given, grouped, offsets, slot * cap + first, here, tokens, choices, rows
                )

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
    out = jax.ShapeDtypeStruct((_tiles_max(lists) * rows, width), jnp.bfloat16)
    operands = (*source.operands, _as_data(layer), bank, *lists)
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
    h,
    shape,
    lists: ExpertRows,
    bank,
    layer,
    config: GemmConfig,
    homes: Homes | None = None,
    mlp: ExpertMlp = SWIGLU,
) -> BFloat16[Array, "R T K D"] | ResultsAtHome:
    """`h` through the down projection, each row to its choice's place in `[R T K D]`.

    Or in the window of its source, where `homes` says so.
    """
    (ranks, tokens, choices), (_, _, _, width, hidden) = shape, bank.shape
    width = mlp.bias_width or width
    rows, columns, stages, groups = (
        config.tile_rows,
        config.down_columns,
        config.down_stages,
        config.groups,
    )
    column_blocks, steps = hidden // columns, width // DEPTH
    cap = lists.grouped.shape[0] // lists.counts.shape[0]

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
    operands = (*windows, h, _as_data(layer), bank, *lists)
    full = (ranks, tokens, choices, hidden)
    if homes:
        # Nothing is written to this array; what comes after the kernel is given it.
        out = jax.ShapeDtypeStruct((1,), jnp.bfloat16)
        written = _launch(body, "expert_down_home", config, out, scratch, operands)
        return ResultsAtHome(written=written, shape=full)
    out = jax.ShapeDtypeStruct(full, jnp.bfloat16)
    return _launch(body, "expert_down", config, out, scratch, operands)


def _find_rows(source, given, grouped, offsets, first, here, tokens, choices, rows: int) -> None:
    """Puts the address of each of a tile's rows into shared memory, two words each."""

    @plgpu.inline_mgpu(
        arg_types=((peers.ref,) * len(given), peers.ref, peers.ref, peers.scalar, peers.scalar)
    )
    def find(_, given, grouped, offsets, first, here):
        index = peers.lane()
        # Earlier gathers of this warpgroup may still read the last tile's addresses.
        peers.meet()
        with peers.when(index < peers.splat(here)):
            pair = peers.load(entry(grouped, peers.splat(first) + index))
            start = source.start(given, pair // choices, tokens)
            low, high = start.narrow(), (start >> 32).narrow()
            peers.store_words(peers.address(offsets, index * 8), [low, high])
        peers.meet()

    assert rows <= GROUP_THREADS
    find(tuple(given), grouped, offsets, first, here)


def _gather(x_smem, offsets, here, k, rows: int) -> None:
    """Starts the copies of one stage of a tile's rows, as the matrix unit's swizzle wants them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(SWIZZLED), peers.ref, peers.scalar, peers.scalar))
    def gather(_, x_smem, offsets, here, k):
        index, here = peers.lane(), peers.splat(here)
        chunk, base = index % CHUNKS, peers.address(x_smem)
        deep = peers.splat(k).wide() * (DEPTH * 2) + (chunk * peers.VECTOR_BYTES).wide()
        for first in range(0, rows, GROUP_THREADS // CHUNKS):
            row = index // CHUNKS + first
            with peers.when(row < here):
                low, high = peers.load_words(peers.address(offsets, row * 8), 2)
                start = low.wide() | (high.wide() << 32)
                place = row // 8 * (8 * DEPTH * 2) + _swizzle(row & 7, chunk)
                peers.copy_async(base + place, start + deep)
        peers.commit_async()

    gather(x_smem, offsets, here, k)


def _swizzle(row: Word, chunk: Word) -> Word:
    """Where the matrix unit wants a row's chunk within 8 rows of 128 bytes."""
    return row * (DEPTH * 2) + (chunk ^ row) * peers.VECTOR_BYTES


def _await_rows(groups_left: int) -> None:
    """All but the newest `groups_left` stages of this warpgroup's copies are there for all."""

    @plgpu.inline_mgpu()
    def wait(_):
        peers.await_async(groups_left)
        peers.meet()

    wait()


def _store_rows(tile, out, grouped, first, here, column, homes=None, windows=()) -> None:
    """Copies the first `here` rows of a warpgroup's tile in shared memory to rows of `out`.

    Row i goes to row `grouped[first + i]`, or `first + i` where there is no list, from `column` on;
    with `homes` to the place it has there.
    """
    width = tile.shape[-1]
    chunks = width * 2 // peers.VECTOR_BYTES
    lists = () if grouped is None else (grouped,)
    swizzled = plgpu.RefType(SWIZZLED)
    types = (swizzled, peers.ref, (peers.ref,) * len(lists), (peers.ref,) * len(windows))

    @plgpu.inline_mgpu(arg_types=(*types, *(peers.scalar,) * 3))
    def store(_, tile, out, lists, windows, first, here, column):
        index, here, first = peers.lane(), peers.splat(here), peers.splat(first)
        chunk = index % chunks
        peers.meet()
        for start in range(0, GROUP_ROWS, GROUP_THREADS // chunks):
            row = index // chunks + start
            with peers.when(row < here):
                to = peers.load(entry(lists[0], first + row)) if lists else first + row
                if homes:
                    target = homes.start(windows, to)
                else:
                    target = peers.address(out, to.wide() * (out.type.shape[-1] * 2))
                inside = (peers.splat(column) * 2).wide() + (chunk * peers.VECTOR_BYTES).wide()
                block = row // 8 * (width // DEPTH) + chunk // CHUNKS
                at = peers.address(tile, block * (8 * DEPTH * 2) + _swizzle(row & 7, chunk & 7))
                peers.store_wide(target + inside, peers.load_wide(at))
        peers.meet()

    store(tile, out, lists, tuple(windows), first, here, column)


def expert_rows_of(rows) -> tuple[InWindow | InArray, ExpertRows]:
    """Source and lists of the rows that dispatch left in the window.

    Rows in fp8 are widened into an array `[R T D]` first.
    """
    lists: RowLists = rows.lists
    if lists.place.layout.dispatch_dtype:
        source = InArray(rows.array())
    else:
        refs = exchange_scalars(rows.call)
        source = InWindow(lists.place, rows.heap, refs.round, refs.rank)
    return source, ExpertRows(rows.grouped, rows.counts, rows.tiles)


def homes_of(rows) -> Homes | None:
    """Where results may be written at once; None if they are summed before they travel."""
    lists: RowLists = rows.lists
    if lists.place.layout.combine != "per_choice":
        return None
    refs = exchange_scalars(rows.call)
    at = (lists.place, rows.heap, refs.round, refs.rank)
    return Homes(*at, lists.tokens, lists.choices)
