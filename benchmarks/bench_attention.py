"""Benchmark of one layer's attention to caches of real sizes, by each kernel that can do it.

    python -m benchmarks.bench_attention --out=benchmarks/results/attention.jsonl

A kernel's answer is compared with float32 before it is timed; one that cannot be compiled, or is
wrong, is named and left out, and the status is 1 if it is the one that serving takes. The bound is
the time to read, once, the keys and values that some token sees. Caches of several layers take
turns, so that none is in the GPU's own cache.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import command
from benchmarks.attention_cudnn import attend_cudnn
from benchmarks.gpu_rates import add_rate, read_rate
from benchmarks.gpu_timing import Chained, Program, add_times, compile_all, measure, open_gpu
from benchmarks.harness import Sheet, Unfit
from eep_jax.models.attention import attend_xla
from eep_jax.models.latent_attention import attend_latent

CACHED_BYTES = 256 << 20  # what is to be read before the same bytes are read again
LAYERS_MAX = 4
REPETITIONS = 20
TOLERANCE = 0.02  # of the largest value: bfloat16 products of some thousand positions


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: T tokens, and B sequences with room for P positions each, half of them in use.

    `prompts` > 0: the tokens are so many runs of successive positions of as many sequences, as in
    prefill; else each is the last one of a sequence of its own.
    """

    name: str
    tokens: int
    sequences: int
    query_heads: int
    kv_heads: int
    channels: int
    length: int
    window: int = 0
    sinks: bool = False
    prompts: int = 0
    latent: int = 0  # channels of a latent, beside which `channels` are those of the rotated key

    @property
    def served_by(self) -> str:
        """The kernel that serving takes on a GPU."""
        return "xla" if self.latent else "cudnn"

    @property
    def layers(self) -> int:
        """Number of caches that take turns."""
        return min(LAYERS_MAX, -(-CACHED_BYTES // self.seen_bytes))

    @functools.cached_property
    def batch_rows(self) -> np.ndarray:
        if not self.prompts:
            return np.arange(self.tokens, dtype=np.int32)
        return (np.arange(self.tokens) * self.prompts // self.tokens).astype(np.int32)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        last = self.length // 2 - 1
        if not self.prompts:
            # Sequences differ a little, as in serving.
            return (last - np.arange(self.tokens) % 7).astype(np.int32)
        run = self.tokens // self.prompts
        return (last - run + 1 + np.arange(self.tokens) % run).astype(np.int32)

    @property
    def seen_bytes(self) -> int:
        """Keys and values that some token sees; those that several see count once."""
        reach: dict[int, int] = {}
        for batch_row, position in zip(
            self.batch_rows.tolist(), self.positions.tolist(), strict=True
        ):
            reach[batch_row] = max(reach.get(batch_row, 0), position + 1)
        span = self.tokens // self.prompts if self.prompts else 1
        most = self.window + span - 1 if self.window else self.length
        seen = sum(min(most, length) for length in reach.values())
        channels = self.latent + self.channels if self.latent else 2 * self.channels
        return seen * self.kv_heads * channels * 2

    def shape(self) -> dict:
        values = dataclasses.asdict(self) | {"dtype": "bfloat16"}
        return {name: value for name, value in values.items() if value or name == "tokens"}


CASES = (
    Case("decode", 64, 64, 32, 4, 128, 2048),
    Case("prompts", 64, 64, 32, 4, 128, 2048, prompts=2),
    Case("window and sinks", 64, 64, 64, 8, 64, 4096, window=128, sinks=True),
    Case("sinks", 64, 64, 64, 8, 64, 4096, sinks=True),
    Case("prompts with sinks", 64, 64, 64, 8, 64, 4096, sinks=True, prompts=2),
    Case("latents", 32, 32, 128, 1, 64, 4096, latent=512),
)
FEW = CASES[:1]

# (q, keys, values, batch_rows, positions, sinks) -> out, by name. Keys are `[B Hkv P C]`.


def kernels_of(case: Case) -> dict[str, Callable]:
    if case.latent:
        scale = (128 + case.channels) ** -0.5
        return {
            "xla": lambda q, k, v, batch_rows, at, sinks: attend_latent(
                q, k[:, 0], v[:, 0], at, scale=scale
            )
        }
    looked_up = lambda batch_rows: batch_rows if case.prompts else None
    own = lambda cache, batch_rows: cache[batch_rows] if case.prompts else cache
    options = lambda sinks: {"window": case.window, "sinks": sinks}
    found = {
        "xla": lambda q, k, v, batch_rows, at, sinks: attend_xla(
            q, own(k, batch_rows), own(v, batch_rows), at, **options(sinks)
        ),
        "cudnn": lambda q, k, v, batch_rows, at, sinks: attend_cudnn(
            q, k, v, at, looked_up(batch_rows), **options(sinks)
        ),
    }
    if case.prompts:
        found["cudnn, gathered"] = lambda q, k, v, batch_rows, at, sinks: attend_cudnn(
            q, own(k, batch_rows), own(v, batch_rows), at, **options(sinks)
        )
    elif not case.window:
        found["cudnn, by pages"] = lambda q, k, v, batch_rows, at, sinks: attend_cudnn(
            q, k, v, at, batch_rows, **options(sinks)
        )
    if not case.sinks:
        found["tokamax"] = functools.partial(_tokamax, own)
    return found


def _tokamax(own, q, k, v, batch_rows, at, sinks):
    import tokamax

    del sinks
    tokens, heads, channels = q.shape
    kv_heads, length = k.shape[1:3]
    packed = lambda cache: own(cache, batch_rows).reshape(tokens * kv_heads, length, 1, channels)
    found = tokamax.dot_product_attention(
        q.reshape(tokens * kv_heads, heads // kv_heads, 1, channels),
        packed(k),
        packed(v),
        key_value_seq_lengths=jnp.repeat(at + 1, kv_heads),
        implementation="mosaic",
    )
    return found.reshape(tokens, heads, channels)


def program_of(case: Case, kernel: Callable) -> Program:
    """`(q, caches, batch_rows, positions, sinks) -> (last q, out of the first layer)`.

    One layer after the other, each with what the one before made as its queries.
    """

    def run(q, caches, batch_rows, positions, sinks):
        def repeat(_, q):
            for keys, values in caches:
                out = kernel(q, keys, values, batch_rows, positions, sinks)
                q = jnp.concatenate([out, q[..., case.latent :]], -1) if case.latent else out
            return q

        first = kernel(q, *caches[0], batch_rows, positions, sinks)
        return jax.lax.fori_loop(0, REPETITIONS, repeat, q), first

    return Program(run, inputs_of(case, shapes=True))


def inputs_of(case: Case, shapes: bool = False):
    """Random queries, caches of all layers, and where tokens stand; or their shapes."""
    key = jax.random.key(0)

    def draw():
        normal = lambda number, *shape: jax.random.normal(
            jax.random.fold_in(key, number), shape, jnp.bfloat16
        )
        cache = lambda number, channels: normal(
            number, case.sequences, case.kv_heads, case.length, channels
        )
        values = case.latent or case.channels
        caches = [
            (cache(2 * n + 1, case.channels), cache(2 * n + 2, values)) for n in range(case.layers)
        ]
        q = normal(0, case.tokens, case.query_heads, case.latent + case.channels)
        sinks = normal(1 << 20, case.query_heads) if case.sinks else None
        return q, caches, jnp.asarray(case.batch_rows), jnp.asarray(case.positions), sinks

    return jax.eval_shape(draw) if shapes else jax.jit(draw)()


def reference(case: Case, q, caches, batch_rows, positions, sinks) -> np.ndarray:
    """float32 `[T Hq C]` of the first layer, token by token."""
    wide = lambda array: array.astype(jnp.float32)
    keys, values = caches[0]

    def one(parts):
        q, batch_row, position = parts
        k, v = wide(keys[batch_row])[None], wide(values[batch_row])[None]
        at = position[None]
        if case.latent:
            scale = (128 + case.channels) ** -0.5
            return attend_latent(wide(q)[None], k[:, 0], v[:, 0], at, scale=scale)[0]
        return attend_xla(wide(q)[None], k, v, at, window=case.window, sinks=sinks)[0]

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda *p: jax.lax.map(one, p))(q, batch_rows, positions))


def measure_case(sheet: Sheet, case: Case, executables: dict, rate: float, samples: int) -> set:
    """Adds and prints a line for each kernel whose answer is right; returns their names."""
    inputs = inputs_of(case)
    wanted = reference(case, *inputs)
    runs, firsts = {}, {}
    for name, run in executables.items():
        first = np.asarray(run(*inputs)[1].astype(jnp.float32))
        error = float(np.abs(first - wanted).max() / np.abs(wanted).max())
        if not error <= TOLERANCE:
            print(f"{case.name}, {name}: wrong by {error:.3g} of the largest value", flush=True)
            continue
        firsts[name] = first
        repetitions = REPETITIONS * case.layers
        step = lambda q, run=run: run(q, *inputs[1:])[0]
        runs[name] = Chained(step, inputs[0], repetitions)
    bound_us = case.seen_bytes / rate * 1e6
    for name, timing in measure(runs, samples).items():
        same = [n for n in firsts if n != name and np.array_equal(firsts[n], firsts[name])]
        print(
            f"{case.name:20} {name:22} {timing.p50_us:9.1f} us   bound {bound_us:8.1f} us   "
            f"{bound_us / timing.p50_us:.2f} of it   same bits as {same}   {timing.note}",
            flush=True,
        )
        add_times(sheet.of(**case.shape(), kernel=name), timing, bound=bound_us)
    return set(runs)


def main() -> int:
    device, quick = open_gpu(), absl_flags.FLAGS.quick
    samples, sheet = 5 if quick else 15, Sheet("attention", device, 1, {})
    rate = read_rate(samples)
    print(f"{device}: reads {rate / 1e12:.2f} TB/s", flush=True)
    add_rate(sheet, "read_rate", rate, samples)
    cases = FEW if quick else tuple(c for c in CASES if c.name in absl_flags.FLAGS.cases)
    programs = {
        (case, name): program_of(case, kernel)
        for case in cases
        for name, kernel in kernels_of(case).items()
    }
    failures: dict = {}
    executables = compile_all(programs, failures, threads=16)
    for (case, name), error in failures.items():
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(f"{case.name}, {name}: {text}", flush=True)
    missing = []
    for case in cases:
        mine = {name: run for (of, name), run in executables.items() if of is case}
        if case.served_by not in measure_case(sheet, case, mine, rate, samples):
            missing.append(f"{case.name}, {case.served_by}")
    command.keep(sheet.records)
    if missing:
        raise Unfit(f"serving takes {missing}")
    return 0


if __name__ == "__main__":
    command.define_gpu()
    names = [case.name for case in CASES]
    absl_flags.DEFINE_list("cases", names, "Only these of the cases.")
    command.run(main)
