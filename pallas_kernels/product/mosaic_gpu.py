"""Product of rows and a weight matrix on Hopper: K is summed in one order, whatever the rows.

Each multiprocessor takes tiles of the result one after the other. One warpgroup loads `DEPTH`
channels of rows and weights a stage by the copy engine; the others multiply, 64 rows each. An
element of the result is one accumulator to which products of 16 channels are added from channel 0
on, so its bits depend on its row and its column of weights alone: not on the number of rows, the
tile, or the neighbours. Libraries choose split sums and tiles by shape, and do not keep that.

Barriers, one per stage: `there` completes when the copy engine has written rows and weights (two
arrivals); `free` takes one arrival of each multiplying warpgroup whose products with the stage are
done, and the loader waits for it before it loads the stage anew.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.device import SM_COUNT

DEPTH = 64  # channels of one stage: 128 bytes, the copy engine's widest swizzle
GROUP_ROWS = 64  # rows of one warpgroup's matrix instruction
ROW_MULTIPLE = 8  # of rows: the copy engine's tiles


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """A tile of the result is 64 rows per warpgroup times `columns`; `stages` are under way."""

    groups: int
    columns: int
    stages: int


def config_for(rows: int, columns: int, all_columns: int, out_bytes: int = 2) -> ProductConfig:
    """Small tiles where few rows make the weights' bytes count, so that many blocks read them.

    Args:
        rows: of the result.
        columns: of which each matrix has a multiple.
        all_columns: of all matrices together.
        out_bytes: of an element; a tile of the widest in float32 would not fit shared memory.
    """
    if rows <= GROUP_ROWS:
        return ProductConfig(groups=1, columns=64, stages=8)
    # Wide tiles read less, but there must be enough of them for all multiprocessors.
    if out_bytes == 2 and columns % 256 == 0 and rows * all_columns >= 128 * 256 * SM_COUNT:
        return ProductConfig(groups=2, columns=256, stages=3)
    return ProductConfig(groups=2, columns=128 if columns % 128 == 0 else 64, stages=4)


# Calls of one shape share a trace, a lowering and a compilation: a step has hundreds.
@functools.partial(jax.jit, static_argnames=("out_dtype", "transposed", "config"))
def products_mosaic(
    x: BFloat16[Array, "T D"],
    weights: Sequence[BFloat16[Array, "_ _"]],
    out_dtype=jnp.bfloat16,
    transposed: bool = False,
    config: ProductConfig | None = None,
) -> list[Float[Array, "T _"]]:
    """`x @ w` for each of `weights`, in one launch: few rows of one matrix alone fill no GPU.

    Sums are float32, from channel 0 on, and rounded once to `out_dtype`. D and every N are
    multiples of 64; any number of rows. With `transposed`, weights are `[N D]`.
    """
    (rows, depth), sizes = x.shape, [w.shape[0 if transposed else 1] for w in weights]
    if depth % DEPTH or any(size % 64 for size in sizes):
        raise NotImplementedError(f"{depth=} and {sizes=} must be multiples of {DEPTH} and 64")
    # The copy engine takes fewer rows than one of its tiles, or whole tiles.
    padded = x if rows < ROW_MULTIPLE else jnp.pad(x, ((0, -rows % ROW_MULTIPLE), (0, 0)))
    columns = math.gcd(*sizes)
    config = config or config_for(rows, columns, sum(sizes), jnp.dtype(out_dtype).itemsize)
    tile_rows, wide = config.groups * GROUP_ROWS, config.columns
    row_tiles, column_tiles = -(-rows // tile_rows), sum(sizes) // wide
    steps, stages = depth // DEPTH, config.stages
    blocks = min(SM_COUNT, row_tiles * column_tiles)
    out_channels = 128 // jnp.dtype(out_dtype).itemsize
    out_tiles = (plgpu.TilingTransform((8, out_channels)), plgpu.SwizzleTransform(128))
    swizzled = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
    starts = [sum(sizes[:m]) for m in range(len(sizes))]

    def body(x, *refs):
        weights, refs = refs[: len(sizes)], refs[len(sizes) :]
        outs, (x_smem, w_smem, out_smem, there, free) = refs[: len(sizes)], refs[len(sizes) :]
        group, block = lax.axis_index("group"), lax.axis_index("block")
        mine = (row_tiles * column_tiles - block + blocks - 1) // blocks

        def tile_at(i):
            # Consecutive blocks read the same columns of weights, which stay in the cache.
            unit = block + i * blocks
            return unit % row_tiles * tile_rows, unit // row_tiles * wide

        def in_matrix(column, use):
            """`use(m, column of it)` for the matrix that this column of all of them is in."""
            for m, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                if len(sizes) == 1:
                    use(m, column)
                else:
                    inside = (column >= start) & (column < start + size)
                    pl.when(inside)(functools.partial(use, m, column - start))

        @pl.when(group == config.groups)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def tile(i, step):
                row, column = tile_at(i)

                def stage(k, step):
                    at, deep = lax.rem(step, stages), pl.ds(k * DEPTH, DEPTH)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[at])

                    def load(m, column):
                        beside = pl.ds(column, wide)
                        part = weights[m].at[(beside, deep) if transposed else (deep, beside)]
                        plgpu.copy_gmem_to_smem(part, w_smem.at[at], there.at[at])

                    in_matrix(column, load)
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(row, tile_rows), deep], x_smem.at[at], there.at[at]
                    )
                    return step + 1

                return lax.fori_loop(0, steps, stage, step)

            lax.fori_loop(0, mine, tile, jnp.int32(0))

        @pl.when(group < config.groups)
        def _multiply():
            plgpu.set_max_registers(232 if config.groups == 2 else 240, action="increase")
            own = pl.ds(group * GROUP_ROWS, GROUP_ROWS)

            def tile(i, step):
                row, column = tile_at(i)

                def scope(acc):
                    def stage(k, step):
                        at = lax.rem(step, stages)
                        plgpu.barrier_wait(there.at[at])
                        w = w_smem.at[at].transpose((1, 0)) if transposed else w_smem.at[at]
                        plgpu.wgmma(acc, x_smem.at[at, own], w)
                        plgpu.wgmma_wait(1)

                        # The product before this one is done, so its stage may be loaded anew.
                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)])

                        return step + 1

                    end = lax.fori_loop(0, steps, stage, step)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem(end - 1, stages)])
                    return acc[...]

                value = pl.run_scoped(scope, plgpu.ACC((GROUP_ROWS, wide), jnp.float32))
                # The copies of this warpgroup's last tile must have read it before it is replaced.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = out_smem.at[own]
                part[...] = value.astype(out_dtype)
                plgpu.commit_smem()
                at = row + group * GROUP_ROWS

                @pl.when(at < rows)
                def _():
                    def store(m, column):
                        place = outs[m].at[pl.ds(at, GROUP_ROWS), pl.ds(column, wide)]
                        plgpu.copy_smem_to_gmem(part, place)

                    in_matrix(column, store)

                return step + steps

            lax.fori_loop(0, mine, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = "product"
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((padded.shape[0], size), out_dtype) for size in sizes],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.groups + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((stages, tile_rows, DEPTH), jnp.bfloat16, transforms=swizzled),
            plgpu.SMEM(
                (stages, *((wide, DEPTH) if transposed else (DEPTH, wide))),
                jnp.bfloat16,
                transforms=swizzled,
            ),
            plgpu.SMEM((tile_rows, wide), out_dtype, transforms=out_tiles),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=config.groups, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return [found[:rows] for found in run(padded, *weights)]
