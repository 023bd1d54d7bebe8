"""Domain-specific language of single GPU threads, for kernels that access peers' memory.

Pallas' own remote references (`plgpu.remote_ref`, `pl.semaphore_signal`) do not fit here:

- They name a peer by its device in a mesh of one JAX program. Ranks here are separate programs,
  no mesh spans them, and the address of a peer's slab is known only at run time.
- `pl.semaphore_wait` has no deadline and no abort word, so a kernel that waits for a dead rank
  never ends. `wait_for` has both.
- A semaphore counts arrivals. A flag here holds a round, so a late write of an evicted rank
  satisfies no wait.

Should Pallas gain waits with a timeout on addresses given at run time, most of this package can go;
the lowering to watch began with https://github.com/jax-ml/jax/pull/26675.

Kernels are Python functions that emit MLIR through `plgpu.inline_mgpu`. A `Word` is an integer of
one thread; addresses are 64-bit Words, in shared memory 32-bit ones. Modules import downwards:

    launch    a kernel whose body is written with this package
    floats    float32 values, eight at a time
    vectors   eight bfloat16 channels at a time, fp8, copies of rows
    sync      barriers, flags, waits with a deadline
    memory    addresses, loads, stores, atomics, asynchronous copies
    word      integers and control flow
    mlir      the only module here that imports JAX-internal modules
"""

# ruff: noqa: F401, I001

# fmt: off
from pallas_kernels.simt.floats import (
    add_float, as_float, divide_float, exp2, fold_values, load_f32x8, max_float, multiply_float,
    splat_f32x8, subtract_float,
)
from pallas_kernels.simt.launch import GROUP_THREADS, kernel
from pallas_kernels.simt.memory import (
    VECTOR_BYTES, add_shared, address, copy_async, count_up, entry, load, load_if, load_wide,
    load_words, max_shared, store, store_wide, store_words, word_at,
)
from pallas_kernels.simt.sync import (
    await_async, barrier, commit_async, group_barrier, load_relaxed, now_ns, post, post_on_gpu,
    wait_for, wait_on_gpu,
)
from pallas_kernels.simt.vectors import (
    copy_row, float_word, load_bf16x8, load_bf16x8_if, narrow_e4m3, peak_bf16, pieces_of,
    scale_of, scaled_add, store_bf16x8, store_f32x8, zero_f32x8,
)
from pallas_kernels.simt.word import (
    WARP, Ref, Word, ballot, block, each, fold, lane, phase, ref, scalar, select, splat, thread,
    update_if, when, word,
)
