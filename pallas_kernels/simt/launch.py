"""Launch of a kernel whose body runs in each thread."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.simt.mlir import plgpu
from pallas_kernels.simt.word import ref

GROUP_THREADS = 128  # threads of one warpgroup


def kernel(
    body: Callable,
    *operands: Array,
    out: dict[str, tuple[tuple[int, ...], DTypeLike]],
    grid: int,
    name: str,
    groups: int = 1,
    shared: tuple[int, ...] = (),
) -> dict[str, Array]:
    """Runs `body(*operand refs, *output refs, *shared refs)` in each thread; returns the outputs.

    Args:
        body: emits the code of one thread with this package.
        operands: arrays in GPU memory.
        out: shape and dtype of each output.
        grid: number of blocks.
        name: of the kernel, in profiles and dumps.
        groups: warpgroups of a block.
        shared: lengths of int32 arrays in the shared memory of each block.
    """
    kinds = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out.values())

    def run(*refs):
        types = (ref,) * len(refs)
        plgpu.inline_mgpu(arg_types=types)(lambda ctx, *inner: body(*inner))(*refs)

    run.__name__ = name
    launched = plgpu.kernel(
        run,
        out_type=kinds,
        grid=(grid,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((size,), jnp.int32) for size in shared],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"num_threads": groups, "thread_name": "group"} if groups > 1 else {}),
    )
    return dict(zip(out, launched(*operands), strict=True))
