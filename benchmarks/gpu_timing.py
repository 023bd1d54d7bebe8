"""GPU time of one repetition, without the cost of a launch and of the host.

A run does N repetitions, each of which needs what the one before computed. Two runs that are
enqueued one after the other take as long as one and N repetitions more; all else is in both.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping

import jax
from jax import lax
from jax.experimental.mosaic.gpu import dialect
from jaxlib.mlir import ir

from benchmarks.harness import Sheet, Unfit, percentile  # noqa: F401  Unfit for benchmarks
from launch.environments.local import GPU_XLA_FLAGS, add_flags
from launch.flags import UsageError

WARM_RUNS = 3
HOST_BOUND = 0.8  # above this share, the GPU may have waited for the host


def open_gpu() -> str:
    """Sets XLA's flags as ranks have them; returns the GPU's name. Call it before JAX computes.

    Raises UsageError where JAX has no GPU.
    """
    os.environ["XLA_FLAGS"] = add_flags(os.environ.get("XLA_FLAGS", ""), GPU_XLA_FLAGS)
    if jax.default_backend() != "gpu":
        raise UsageError(
            f"this measures an NVIDIA GPU, but JAX computes on {jax.default_backend()!r}: "
            "pip install eep-jax[cuda13] on a machine with one"
        )
    return jax.devices()[0].device_kind


@contextlib.contextmanager
def kernels_shared():
    """Equal kernels that are traced inside are compiled once.

    JAX numbers all kernels for its debug dumps, and looks up compiled ones by a hash of the number
    too. Here they are named after their function instead.
    """
    numbered = dialect.get_or_set_dump_options

    def named(module):
        with module.context:
            name = module.operation.attributes["sym_name"]
            module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr(name)
        return numbered(module)

    dialect.get_or_set_dump_options = named
    try:
        yield
    finally:
        dialect.get_or_set_dump_options = numbered


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, and its arguments or their shapes."""

    function: Callable
    arguments: tuple
    donated: tuple[str, ...] = ()
    options: Mapping = dataclasses.field(default_factory=dict)  # of XLA

    def trace(self):
        options = dict(self.options) or None
        jitted = jax.jit(self.function, donate_argnames=self.donated, compiler_options=options)
        return jitted.trace(*self.arguments)


def compile_all(
    programs: Mapping[str, Program], failures: dict[str, Exception] | None = None, threads: int = 8
) -> dict[str, Callable]:
    """Executables by name. Tracing is one after the other, compiling in threads.

    Errors of compilation are put into `failures`, or raised without such a dictionary.
    """
    found, waiting = {}, {}

    def failed(name: str, error: Exception) -> None:
        if failures is None:
            raise error
        failures[name] = error

    with kernels_shared(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for name, program in programs.items():
            try:
                waiting[name] = pool.submit(program.trace().lower().compile)
            except Exception as error:
                failed(name, error)
        for name, future in waiting.items():
            try:
                found[name] = future.result()
            except Exception as error:
                failed(name, error)
    return found


def shapes_of(tree):
    """The same tree with shapes instead of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jax.numpy.shape(a), a.dtype), tree)


def chain(step: Callable, repetitions: int) -> Callable:
    """`(carry, *operands) -> carry` after that many `carry = step(carry, *operands)`.

    Donate a large carry: else each run begins with a copy of it, which would be counted.
    """

    def run(carry, *operands):
        return lax.fori_loop(0, repetitions, lambda _, c: step(c, *operands), carry)

    return run


def calling(executable: Callable, *operands) -> Callable:
    """`carry -> executable(carry, *operands)`, a run for `Chained`."""
    return lambda carry: executable(carry, *operands)


class Chained:
    """A run of `repetitions`, `carry -> carry`, and where it stands."""

    def __init__(self, run: Callable, carry, repetitions: int):
        self.run, self.carry, self.repetitions = run, carry, repetitions

    def go(self, times: int) -> tuple[float, float]:
        """Enqueues so many runs and waits. Returns seconds until the end, and until enqueued."""
        begin_s = time.perf_counter()
        for _ in range(times):
            self.carry = self.run(self.carry)
        enqueued_s = time.perf_counter()
        jax.block_until_ready(self.carry)
        return time.perf_counter() - begin_s, enqueued_s - begin_s


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one repetition, one for each pair of runs."""

    samples_us: tuple[float, ...]
    host_share: float = 0.0  # of the time, that the host needed to enqueue

    @property
    def p50_us(self) -> float:
        return percentile(self.samples_us, 50)

    @property
    def p99_us(self) -> float:
        return percentile(self.samples_us, 99)

    def part(self, parts: int) -> "Timing":
        """The timing of one of `parts` equal parts of a repetition."""
        return dataclasses.replace(self, samples_us=tuple(s / parts for s in self.samples_us))

    @property
    def note(self) -> str:
        """A doubt about the timing; "" as a rule."""
        if self.host_share > HOST_BOUND:
            return f"host busy {self.host_share:.0%} of the time: the GPU may have waited for it"
        return ""


def per_repetition_us(one_s: float, two_s: float, repetitions: int) -> float:
    """One run took 1.5 ms and two took 2.5 ms, of 10 repetitions: 100 us each."""
    return (two_s - one_s) / repetitions * 1e6


def measure(runs: Mapping[str, Chained], samples: int) -> dict[str, Timing]:
    """Times all runs, taking turns, so that a drift of the clock hits all of them alike."""
    for run in runs.values():
        run.go(WARM_RUNS)
    found: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            one_s, _ = run.go(1)
            two_s, enqueued_s = run.go(2)
            found[name].append(per_repetition_us(one_s, two_s, run.repetitions))
            shares[name].append(enqueued_s / two_s)
    share = {name: percentile(values, 50) for name, values in shares.items()}
    return {name: Timing(tuple(values), share[name]) for name, values in found.items()}


def measure_one(run: Chained, samples: int) -> Timing:
    return measure({"": run}, samples)[""]


def add_times(
    sheet: Sheet, timing: Timing, metric: str = "time", *, baseline: Timing | None = None, **more
) -> None:
    """Adds records of p50 and p99 in microseconds, each compared with that of `baseline`."""
    for statistic in ("p50", "p99"):
        other = getattr(baseline, f"{statistic}_us") if baseline else None
        value = getattr(timing, f"{statistic}_us")
        more |= {"samples": len(timing.samples_us)}
        sheet.add(f"{metric} {statistic}", value, "us", baseline=other, **more)
