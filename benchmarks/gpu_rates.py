"""Best rates of a GPU, measured in the run that is compared with them: copies, reads, products.

Copies and reads are done by kernels of this file, which take their size from an array, and by XLA;
the faster one counts. They go around a given number of buffers, so that the cache of the GPU
helps them as much as it helps what they are compared with.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import (
    Chained,
    Program,
    calling,
    chain,
    compile_all,
    measure,
    measure_one,
)
from benchmarks.harness import Sheet, Unfit
from pallas_kernels import simt
from pallas_kernels.simt import GROUP_THREADS, Word
from pallas_kernels.window import round_up

PIECES = 4  # of 16 bytes, that a thread has under way at once
UNIT_BYTES = GROUP_THREADS * PIECES * simt.VECTOR_BYTES
GRIDS = (264, 2112)  # blocks; few start sooner, many have more under way
BUFFER_BYTES = 1 << 30
UNROLLED = 16  # kernels of one repetition of the loop, so that the GPU is never ahead of the host
MATRIX = 8192
FIRST, UNITS, CAPACITY = range(3)  # words of a walk: the next unit, how many at once, of how many


def walk(total_bytes: int, rotations: int) -> np.ndarray:
    """The words of a walk over `rotations` buffers of that size, as many as there is room for.

    20,000 bytes are 3 units of 8192; four such buffers are `[0 3 12]`.
    """
    units = round_up(max(total_bytes, 1), UNIT_BYTES) // UNIT_BYTES
    most = BUFFER_BYTES // UNIT_BYTES // units
    if not most:
        raise ValueError(f"{total_bytes} bytes do not fit the {BUFFER_BYTES} there are")
    return np.array([0, units, units * min(rotations, most)], np.int32)


def _walk_on(words, out, grid: int, body) -> None:
    """Part of a kernel: `body(offsets)` for this thread's part of each unit; then what is next."""
    first, units, capacity = (simt.load(simt.address(words, 4 * i)) for i in range(3))
    thread = simt.thread()

    def one(unit: Word) -> None:
        offset = (first + unit).wide() * UNIT_BYTES + thread.wide() * simt.VECTOR_BYTES
        body([offset + piece * (GROUP_THREADS * simt.VECTOR_BYTES) for piece in range(PIECES)])

    simt.each(simt.block(), units, grid, one)
    with simt.when((simt.block() == 0) & (thread == 0)):
        following = first + units
        following = simt.select(following + units > capacity, 0, following)
        for index, value in enumerate((following, units, capacity)):
            simt.store(simt.address(out, 4 * index), value)


@functools.partial(jax.jit, static_argnames="grid")
def copy_units(words, source, target, *, grid: int):
    """Copies the next units of `source` to the same place of `target`; returns the next words.

    `target` is written through, as windows are, although it is not an output.
    """

    def body(words, source, target, out):
        def pieces(offsets) -> None:
            values = [simt.load_wide(simt.address(source, offset)) for offset in offsets]
            for offset, value in zip(offsets, values, strict=True):
                simt.store_wide(simt.address(target, offset), value)

        _walk_on(words, out, grid, pieces)

    out = {"words": ((3,), jnp.int32)}
    return simt.kernel(body, words, source, target, out=out, grid=grid, name="copy_units")["words"]


@functools.partial(jax.jit, static_argnames="grid")
def read_units(words, source, *, grid: int):
    """Reads the next units of `source`; returns the next words."""

    def body(words, source, out, sums):
        # A sum of what was read lands in memory, so that reading cannot be left out.
        at = simt.address(sums, (simt.block() * GROUP_THREADS + simt.thread()).wide() * 4)
        simt.store(at, simt.word(0))

        def pieces(offsets) -> None:
            found = [simt.load_words(simt.address(source, offset), 4) for offset in offsets]
            total = functools.reduce(
                lambda a, b: a ^ b, [word for words in found for word in words]
            )
            # Random bits make this once in 2**32 times.
            with simt.when(total == 0x5EED):
                simt.store(at, total)

        _walk_on(words, out, grid, pieces)

    out = {"words": ((3,), jnp.int32), "sums": ((grid * GROUP_THREADS,), jnp.int32)}
    return simt.kernel(body, words, source, out=out, grid=grid, name="read_units")["words"]


def copy_program(grid: int, repetitions: int) -> Program:
    def step(words, source, target):
        for _ in range(UNROLLED):
            words = copy_units(words, source, target, grid=grid)
        return words

    buffer = jax.ShapeDtypeStruct((BUFFER_BYTES // 4,), jnp.uint32)
    words = jax.ShapeDtypeStruct((3,), jnp.int32)
    return Program(chain(step, repetitions), (words, buffer, buffer))


def read_program(grid: int, repetitions: int) -> Program:
    buffer = jax.ShapeDtypeStruct((BUFFER_BYTES // 4,), jnp.uint32)
    words = jax.ShapeDtypeStruct((3,), jnp.int32)
    step = lambda words, source: read_units(words, source, grid=grid)
    return Program(chain(step, repetitions), (words, buffer))


def xla_read_program(repetitions: int) -> Program:
    """The largest of many numbers; the 0 that comes out is added to all of them the next time."""
    step = lambda zero, x: (jnp.max(x + zero) > 1e30).astype(jnp.float32)
    buffer = jax.ShapeDtypeStruct((BUFFER_BYTES // 4,), jnp.float32)
    return Program(chain(step, repetitions), (jax.ShapeDtypeStruct((), jnp.float32), buffer))


def xla_copy_program(repetitions: int) -> Program:
    """Adds one to each word: reads and writes all of them."""
    buffer = jax.ShapeDtypeStruct((BUFFER_BYTES // 4,), jnp.uint32)
    return Program(chain(lambda x: x + 1, repetitions), (buffer,), ("carry",))


def matmul_program(repetitions: int) -> Program:
    """Two products of bfloat16 squares each time: the second result may lie where the input did."""
    matrix = jax.ShapeDtypeStruct((MATRIX, MATRIX), jnp.bfloat16)
    return Program(chain(lambda a, b: (a @ b) @ b, repetitions), (matrix, matrix), ("carry",))


def random_words(seed: int) -> jax.Array:
    shape = (BUFFER_BYTES // 4,)
    return jax.jit(lambda key: jax.random.bits(key, shape, jnp.uint32))(jax.random.key(seed))


@dataclasses.dataclass
class Copies:
    """Times device copies of any size."""

    samples: int
    repetitions: int = 20

    def __post_init__(self):
        programs = {str(grid): copy_program(grid, self.repetitions) for grid in GRIDS}
        self._executables = compile_all(programs)
        self._source, self._target = random_words(0), jnp.zeros(BUFFER_BYTES // 4, jnp.uint32)
        jax.block_until_ready((self._source, self._target))

    def check(self) -> None:
        """Raises Unfit unless a walk over most of the buffer copies all of that."""
        for executable in self._executables.values():
            total = BUFFER_BYTES // self.repetitions // UNROLLED
            words = executable(jnp.asarray(walk(total, 1 << 20)), self._source, self._target)
            covered = int(words[UNITS]) * UNROLLED * self.repetitions * UNIT_BYTES // 4
            covered = min(covered, int(words[CAPACITY]) * UNIT_BYTES // 4)
            if not bool((self._source[:covered] == self._target[:covered]).all()):
                raise Unfit("a device copy left words behind")
            self._target = jnp.zeros_like(self._target)

    def microseconds(self, total_bytes: int, rotations: int) -> float:
        """Median of the fastest way to copy that many bytes, around so many buffers."""
        runs = {
            name: Chained(
                calling(executable, self._source, self._target),
                jnp.asarray(walk(total_bytes, rotations)),
                self.repetitions * UNROLLED,
            )
            for name, executable in self._executables.items()
        }
        return min(timing.p50_us for timing in measure(runs, self.samples).values())


def copy_rate(copies: Copies, samples: int) -> float:
    """Bytes read and written per second, of a copy of 1 GiB: the best of two ways."""
    ours = 2 * BUFFER_BYTES / copies.microseconds(BUFFER_BYTES, 1) * 1e6
    repetitions = 8
    run = compile_all({"xla": xla_copy_program(repetitions)})["xla"]
    timing = measure_one(Chained(run, random_words(1), repetitions), samples)
    return max(ours, 2 * BUFFER_BYTES / timing.p50_us * 1e6)


def read_rate(samples: int) -> float:
    """Bytes read per second, of 1 GiB: the best of two ways."""
    repetitions = 10
    programs = {str(grid): read_program(grid, repetitions) for grid in GRIDS}
    programs["xla"] = xla_read_program(repetitions)
    executables = compile_all(programs)
    words, numbers = random_words(2), jnp.ones(BUFFER_BYTES // 4, jnp.float32)
    runs = {
        str(grid): Chained(
            calling(executables[str(grid)], words),
            jnp.asarray(walk(BUFFER_BYTES, 1)),
            repetitions,
        )
        for grid in GRIDS
    }
    zero = jnp.zeros((), jnp.float32)
    runs["xla"] = Chained(calling(executables["xla"], numbers), zero, repetitions)
    found = measure(runs, samples)
    return BUFFER_BYTES / min(timing.p50_us for timing in found.values()) * 1e6


def matmul_rate(samples: int) -> float:
    """Operations per second of products of 8192 x 8192 bfloat16."""
    repetitions = 5
    run = compile_all({"matmul": matmul_program(repetitions)})["matmul"]
    square = lambda seed, scale: jax.jit(
        lambda key: (jax.random.normal(key, (MATRIX, MATRIX)) * scale).astype(jnp.bfloat16)
    )(jax.random.key(seed))
    # Scaled so that products stay of the size of their factors.
    a, b = square(3, 1.0), square(4, MATRIX**-0.5)
    product = Chained(calling(run, b), a, 2 * repetitions)
    timing = measure_one(product, samples)
    return 2 * MATRIX**3 / timing.p50_us * 1e6


def add_rate(sheet: Sheet, metric: str, per_s: float, samples: int) -> None:
    """Adds a rate that the GPU reaches at best, as TB/s or TFLOP/s."""
    unit = "TFLOP/s" if metric == "matmul_rate" else "TB/s"
    alone = dataclasses.replace(sheet, bench="device", ranks=1, shape={"samples": samples})
    alone.add(metric, per_s / 1e12, unit)
