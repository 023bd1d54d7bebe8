"""Attention to pages on Hopper: keys are read once for a tile of queries and all of their heads.

One kernel is a loop of every multiprocessor over (tile, chunk of keys, key head). One warpgroup
loads pages by the copy engine, two multiply, each for its own queries: the rows of their products
are `queries x heads that share the key head`. Keys are taken in pages of 64 from the sequence's
start, whatever else is in the step, so the bits of a row depend on its query and its keys alone:
a decode step and a prompt's chunk give the same.

Softmax is the usual running one, in base 2, within one chunk of 4,096 keys. Where a row sees more
than one chunk, each leaves its sums in float32, and a second kernel adds them in their order.

Barriers, one of each per stage: `keys_there` and `values_there` complete when the copy engine has
written a page; `keys_free` and `values_free` take an arrival of each multiplying warpgroup once its
products with the stage are done, and the loader waits for both before it loads the stage anew.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels import simt
from pallas_kernels.attention.plan import CHUNK_TOKENS, FIELDS, GROUP_ROWS, GROUPS, PAGE_TOKENS
from pallas_kernels.device import SM_COUNT
from pallas_kernels.simt import GROUP_THREADS, entry

STAGES = 3  # pages of keys and of values under way
LOG2E = math.log2(math.e)
LOWEST = -1e30  # of a running maximum: finite, so that a page without visible keys changes nothing
HALF_ROW = 64  # bf16 channels of the copy engine's widest swizzle, 128 bytes
NARROW = (plgpu.TilingTransform((8, HALF_ROW)), plgpu.SwizzleTransform(128))
WIDE_ROW = 32  # float32 channels of 128 bytes
WIDE = (plgpu.TilingTransform((8, WIDE_ROW)), plgpu.SwizzleTransform(128))


# Layers of one shape share a trace, a lowering and a compilation.
@functools.partial(jax.jit, static_argnames=("kv_heads", "scale", "window", "blocks"))
def attend_mosaic(
    q: BFloat16[Array, "T Hq C"],
    keys: BFloat16[Array, "N G C"],
    values: BFloat16[Array, "N G C"],
    table: Int32[Array, "B J"],
    items: Int32[Array, "W 5"],
    count: Int32[Array, "1"],
    positions: Int32[Array, "T"],
    *,
    kv_heads: int,
    scale: float,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
    blocks: int = SM_COUNT,
) -> BFloat16[Array, "T Hq C"]:
    """As `attention_reference`, for the first `count` of `items` (see `plan.plan_items`).

    Page j of key head h of sequence b is `table[b, j] + h`. Rows that no item has are
    undefined.
    """
    tokens, query_heads, channels = q.shape
    heads = query_heads // kv_heads
    queries = GROUP_ROWS // heads  # of one warpgroup
    chunks = -(-table.shape[1] * PAGE_TOKENS // CHUNK_TOKENS)
    kept = (chunks, tokens, query_heads) if chunks > 1 else (1, 1, 1)  # sums of each chunk

    def body(q, keys, values, table, items, count, sinks, out, partial, sums, *scratch):
        q_smem, k_smem, v_smem, out_smem, sums_smem, *barriers = scratch
        keys_there, values_there, keys_free, values_free = barriers
        group, block = lax.axis_index("group"), lax.axis_index("block")
        mine = jnp.maximum((count[0] * kv_heads - block + blocks - 1) // blocks, 0)

        def item_at(i):
            """Fields of this block's i-th item, its key head, and the pages that it reads."""
            unit = block + i * blocks
            index = unit // kv_heads
            row, size, sequence, position, chunk = (
                items[index, field] for field in range(len(FIELDS))
            )
            end = jnp.minimum((chunk + 1) * CHUNK_TOKENS, position + size)
            first = chunk * CHUNK_TOKENS
            if window:
                first = jnp.maximum(first, position - window + 1)
            first_page, end_page = first // PAGE_TOKENS, (end + PAGE_TOKENS - 1) // PAGE_TOKENS
            pages = jnp.maximum(end_page - first_page, 0)
            return row, size, sequence, position, chunk, unit % kv_heads, first_page, pages

        @pl.when(group == GROUPS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def unit(i, step):
                _, _, sequence, _, _, head, first_page, pages = item_at(i)

                def page(j, step):
                    at = lax.rem(step, STAGES)
                    number = table[sequence, first_page + j] + head

                    @pl.when(step >= STAGES)
                    def _():
                        plgpu.barrier_wait(keys_free.at[at])

                    plgpu.copy_gmem_to_smem(keys.at[number], k_smem.at[at], keys_there.at[at])

                    @pl.when(step >= STAGES)
                    def _():
                        plgpu.barrier_wait(values_free.at[at])

                    plgpu.copy_gmem_to_smem(values.at[number], v_smem.at[at], values_there.at[at])
                    return step + 1

                return lax.fori_loop(0, pages, page, step)

            lax.fori_loop(0, mine, unit, jnp.int32(0))

        @pl.when(group < GROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            def unit(i, step):
                row, size, _, position, chunk, head, first_page, pages = item_at(i)
                own_first = group * queries  # of this warpgroup's queries within the tile
                own = jnp.minimum(size - own_first, queries)

                @pl.when(own > 0)
                def _():
                    at = q_smem.at[group]
                    _load_queries(q, at, row + own_first, own, head, kv_heads)
                    plgpu.commit_smem()
                    place = position + own_first, position + size - 1
                    tile = functools.partial(
                        _page, at, k_smem, v_smem, barriers, first_page, step, heads, scale, window
                    )
                    acc, top, total = lax.fori_loop(
                        0, pages, functools.partial(tile, place), _empty(channels)
                    )
                    _leave(
                        acc,
                        top,
                        total,
                        (out_smem.at[group], sums_smem.at[group]),
                        sinks,
                        (out, partial, sums),
                        (row + own_first, own, place[0], chunk, head),
                        (heads, kv_heads, tokens),
                    )

                @pl.when(own <= 0)
                def _():
                    def pass_by(j, _):
                        at = lax.rem(step + j, STAGES)
                        plgpu.barrier_wait(keys_there.at[at])
                        plgpu.barrier_arrive(keys_free.at[at])
                        plgpu.barrier_wait(values_there.at[at])
                        plgpu.barrier_arrive(values_free.at[at])

                    lax.fori_loop(0, pages, pass_by, None)

                return step + pages

            lax.fori_loop(0, mine, unit, jnp.int32(0))

    body.__name__ = "attention"
    page = plgpu.SMEM((STAGES, PAGE_TOKENS, channels), jnp.bfloat16, transforms=NARROW)
    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((tokens, query_heads, channels), jnp.bfloat16),
            jax.ShapeDtypeStruct((*kept, channels), jnp.float32),
            jax.ShapeDtypeStruct((*kept, 2), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((GROUPS, GROUP_ROWS, channels), jnp.bfloat16, transforms=NARROW),
            page,
            page,
            plgpu.SMEM((GROUPS, GROUP_ROWS, channels), jnp.float32, transforms=WIDE),
            plgpu.SMEM((GROUPS, 2, GROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    factors = (
        jnp.full(query_heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    )
    out, partial, sums = run(q, keys, values, table, items, count, factors)
    if chunks == 1:
        return out
    return _add_chunks(out, partial, sums, factors, positions)


def _empty(channels: int):
    """Accumulator, running maximum (base 2) and sum of no keys."""
    of_rows = lambda value: plgpu.layout_cast(
        jnp.full((GROUP_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
    )
    acc = plgpu.layout_cast(jnp.zeros((GROUP_ROWS, channels), jnp.float32), plgpu.Layout.WGMMA)
    return acc, of_rows(LOWEST), of_rows(0.0)


def _load_queries(q, tile, first, count, head, kv_heads: int) -> None:
    """Rows of `count` queries from the first on, for all heads of a key head, as wgmma reads them.

    Rows beyond them are undefined.
    """
    query_heads, channels = q.shape[-2:]
    heads, pieces = query_heads // kv_heads, channels * 2 // simt.VECTOR_BYTES
    chunks = HALF_ROW * 2 // simt.VECTOR_BYTES

    @plgpu.inline_mgpu(
        arg_types=(simt.ref, plgpu.RefType(NARROW), simt.scalar, simt.scalar, simt.scalar)
    )
    def load(_, q, tile, first, count, head):
        index, first, head = simt.lane(), simt.splat(first), simt.splat(head)
        piece = index % pieces
        simt.group_barrier()

        def one(line):
            token = first + line // heads
            flat = (token * kv_heads + head) * heads + line % heads
            at = flat.wide() * (channels * 2) + piece.wide() * simt.VECTOR_BYTES
            block = line // 8 * (channels // HALF_ROW) + piece // chunks
            inside = (line & 7) * (HALF_ROW * 2) + (
                (piece % chunks) ^ (line & 7)
            ) * simt.VECTOR_BYTES
            to = simt.address(tile, block * (8 * HALF_ROW * 2) + inside)
            simt.store_wide(to, simt.load_wide(simt.address(q, at)))

        stop = simt.splat(count) * heads
        simt.each(index // pieces, stop, GROUP_THREADS // pieces, one)
        simt.group_barrier()

    load(q, tile, first, count, head)


def _page(
    q_smem, k_smem, v_smem, barriers, first_page, step, heads, scale, window, place, j, carry
):
    """One page of keys and values; see the module's docstring for the barriers."""
    keys_there, values_there, keys_free, values_free = barriers
    acc, top, total = carry
    position, last = place
    at = lax.rem(step + j, STAGES)
    start = (first_page + j) * PAGE_TOKENS
    shape, channels = (GROUP_ROWS, PAGE_TOKENS), acc.shape[1]

    plgpu.barrier_wait(keys_there.at[at])

    def multiply(scores):
        plgpu.wgmma(scores, q_smem, k_smem.at[at].transpose((1, 0)))
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(keys_free.at[at])

    of_row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) // heads
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start
    seen = key <= of_row + position
    if window:
        seen &= key > of_row + (position - window)
    scores = jnp.where(seen, scores * (scale * LOG2E), -jnp.inf)

    new_top = jnp.maximum(top, scores.max(axis=1))
    alpha = jnp.exp2(top - new_top)
    shares = jnp.exp2(scores - lax.broadcast_in_dim(new_top, shape, [0]))
    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
    total = total * alpha + shares.sum(axis=1)

    plgpu.barrier_wait(values_there.at[at])

    # Rows beyond the last query hold what an earlier sequence left: 0 x NaN would be NaN.
    @pl.when(start + PAGE_TOKENS > last + 1)
    def _():
        _clear_rows(v_smem.at[at], last + 1 - start, channels)
        plgpu.commit_smem()

    def weigh(acc):
        plgpu.wgmma(acc, shares.astype(jnp.bfloat16), v_smem.at[at])

    acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(values_free.at[at])
    return acc, new_top, total


def _clear_rows(page, first, channels: int) -> None:
    """Zeros in rows `first ...` of a page in shared memory. Both warpgroups may do it."""
    halves, chunks = channels // HALF_ROW, HALF_ROW * 2 // simt.VECTOR_BYTES

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(NARROW), simt.scalar))
    def clear(_, page, first):
        index, zero = simt.lane(), [simt.word(0)] * 4
        inside = index % chunks * simt.VECTOR_BYTES

        def row(row):
            for half in range(halves):
                block = row // 8 * halves + half
                at = block * (8 * HALF_ROW * 2) + (row & 7) * (HALF_ROW * 2) + inside
                simt.store_words(simt.address(page, at), zero)

        start = simt.splat(first) + index // chunks
        simt.each(start, PAGE_TOKENS, GROUP_THREADS // chunks, row)

    clear(page, first)


def _leave(acc, top, total, smem, sinks, outs, place, sizes) -> None:
    """Writes a tile's rows: results, or the sums of those that see several chunks."""
    acc_smem, sums_smem = smem
    heads, kv_heads, tokens = sizes
    channels = acc.shape[1]
    acc_smem[...] = acc
    sums_smem[0] = top
    sums_smem[1] = total
    plgpu.commit_smem()
    pieces = channels // 8  # of a row, of eight channels each

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(WIDE), simt.ref, simt.ref, (simt.ref,) * 3, (simt.scalar,) * 5)
    )
    def leave(_, acc, sums, sinks, outs, place):
        out, partial, partial_sums = outs
        row, own, position, chunk, head = map(simt.splat, place)
        index = simt.lane()
        piece = index % pieces
        simt.group_barrier()

        def one(line):
            query, of_head = line // heads, line % heads
            token = row + query
            flat = (token * kv_heads + head) * heads + of_head
            line_top = simt.load(simt.address(sums, line * 4))
            line_total = simt.load(simt.address(sums, (line + GROUP_ROWS) * 4))
            block = line // 8 * (channels // WIDE_ROW) + piece // 4
            base = block * (8 * WIDE_ROW * 4) + (line & 7) * (WIDE_ROW * 4)
            values = simt.load_f32x8(
                *(
                    simt.address(acc, base + (((piece % 4) * 2 + half) ^ (line & 7)) * 16)
                    for half in range(2)
                )
            )
            alone = position + query < CHUNK_TOKENS
            with simt.when(alone & (chunk == 0)):
                sink = simt.as_float(simt.load(entry(sinks, head * heads + of_head)))
                share = simt.exp2(simt.subtract_float(sink, simt.as_float(line_top)))
                whole = simt.splat_f32x8(simt.add_float(simt.as_float(line_total), share))
                at = flat.wide() * (channels * 2) + piece.wide() * 16
                simt.store_bf16x8(simt.address(out, at), simt.divide_float(values, whole))
            with simt.when(alone.narrow() == 0):
                at = (chunk * (tokens * kv_heads * heads) + flat).wide()
                simt.store_f32x8(
                    simt.address(partial, at * (channels * 4) + piece.wide() * 32), values
                )
                with simt.when(piece == 0):
                    simt.store_words(simt.address(partial_sums, at * 8), [line_top, line_total])

        simt.each(index // pieces, own * heads, GROUP_THREADS // pieces, one)
        simt.group_barrier()

    leave(acc_smem, sums_smem, sinks, outs, place)


def _add_chunks(out, partial, sums, sinks, positions) -> BFloat16[Array, "T Hq C"]:
    """`out`, with the rows that see several chunks: `sum_c f_c acc_c / (sum_c f_c total_c + sink)`.

    `f_c` is `2 ** (top_c - top)`, top being the largest of the chunks'; the sums are in order of c.
    """
    tokens, heads, channels = out.shape
    pieces = channels // 8
    lines = GROUP_THREADS // pieces  # rows of a block
    blocks = -(-tokens * heads // lines)

    def body(out, partial, sums, sinks, positions, result):
        index = simt.thread()
        piece = index % pieces
        line = simt.block() * lines + index // pieces
        with simt.when(line < tokens * heads):
            position = simt.load(entry(positions, line // heads))
            at = line.wide() * (channels * 2) + piece.wide() * 16
            with simt.when(position < CHUNK_TOKENS):
                simt.store_wide(simt.address(result, at), simt.load_wide(simt.address(out, at)))
            with simt.when(position >= CHUNK_TOKENS):
                count = position // CHUNK_TOKENS + 1
                entry_at = lambda chunk: (chunk * (tokens * heads) + line).wide()
                sums_at = lambda chunk: simt.load_words(simt.address(sums, entry_at(chunk) * 8), 2)
                first = simt.word(0)
                larger = lambda chunk, top: simt.float_word(
                    simt.max_float(simt.as_float(top), simt.as_float(sums_at(chunk)[0]))
                )
                top = simt.as_float(simt.fold(first, count, 1, sums_at(first)[0], larger))

                def add(chunk, carry):
                    values, total = carry
                    chunk_top, chunk_total = map(simt.as_float, sums_at(chunk))
                    factor = simt.exp2(simt.subtract_float(chunk_top, top))
                    start = entry_at(chunk) * (channels * 4) + piece.wide() * 32
                    found = simt.load_f32x8(
                        *(simt.address(partial, start + half * 16) for half in range(2))
                    )
                    scaled = simt.multiply_float(found, simt.splat_f32x8(factor))
                    more = simt.multiply_float(chunk_total, factor)
                    return simt.add_float(values, scaled), simt.add_float(total, more)

                nothing = simt.zero_f32x8(), simt.as_float(simt.word(0))
                values, total = simt.fold_values(first, count, 1, nothing, add)
                sink = simt.as_float(simt.load(entry(sinks, line % heads)))
                total = simt.add_float(total, simt.exp2(simt.subtract_float(sink, top)))
                simt.store_bf16x8(
                    simt.address(result, at), simt.divide_float(values, simt.splat_f32x8(total))
                )

    shape = {"result": (out.shape, out.dtype)}
    operands = (out, partial, sums, sinks, positions)
    return simt.kernel(body, *operands, out=shape, grid=blocks, name="attention_chunks")["result"]
