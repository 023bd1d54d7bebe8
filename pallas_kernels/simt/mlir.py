"""MLIR builders and inline PTX: the only module here that imports JAX-internal modules.

The builders that `jax.experimental.mosaic.gpu` is written with, the LLVM dialect in particular,
have no public name.
"""

import jax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, scf
from jax._src.state.types import TransformedRef
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

KernelRef = jax.Ref | TransformedRef  # of an array inside a Pallas kernel, or of a part of one

__all__ = ["FragmentedArray", "KernelRef", "arith", "ir", "llvm", "mgpu", "plgpu", "scf"]
