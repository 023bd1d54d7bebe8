"""One rank of `bench_wide_decode`: all systems of one batch size in one process, timed in turn.

First a model of few layers: every system's keys, values and tokens are compared with plain experts.
Then the whole stack: its tokens are compared between systems, and blocks of steps alternate.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_trace
from benchmarks.gpu_rates import read_rate
from benchmarks.gpu_timing import compile_all, shapes_of
from benchmarks.harness import Unfit
from benchmarks.meeting import Meeting, join_mesh, meeting_of
from benchmarks.processes import Out, config_of, worker
from benchmarks.static.exchanges import no_call
from benchmarks.wide.decode_sizes import ELASTIC, with_few_experts, with_sizes
from benchmarks.wide.decode_systems import Systems
from benchmarks.world import World, agreeing, differences
from eep_jax.tables import solo_tables

CHECKED_MOE_LAYERS = 2
WARM_BLOCKS = 1
CHECKED_BATCH, CHECKED_BYTES_MAX = 16, 4 << 30
READ_SAMPLES, PROFILED_STEPS = 5, 2
CLOSE = 0.03  # of keys and values after the first expert layer: results are rounded to bfloat16


def check_short(config, rank: int, names, meeting: Meeting, name: str) -> dict[str, str]:
    """Compares all systems of a short stack with plain experts; errors on this rank by system."""
    dense = min(config.model.dense_layers, 1)
    sizes = {"ranks": config.cluster.ranks, "batch": config.engine.batch_rows}
    sizes |= {"context_tokens": config.engine.context_tokens}
    short = with_sizes(config, layers=dense + CHECKED_MOE_LAYERS, **sizes)
    # Plain experts are all on one rank.
    world = World(with_few_experts(short, config.cluster.ranks, CHECKED_BYTES_MAX), rank)
    systems = Systems(world, names, meeting, name)
    experts = world.draw_experts(range(world.config.model.experts))
    dense, _, cache, *_, batch, _ = systems.shapes()
    count = world.config.model.experts
    alone = solo_tables(1, count, count, 0)
    shapes = (dense, shapes_of(experts), cache, None, alone, batch, shapes_of(no_call()))
    reference = compile_all({"": world.reference(shapes)})[""]
    given = (systems.dense, experts, world.cache(7), None, alone, systems.batch, no_call())
    wanted = reference(*given)
    wrong = dict(systems.failures)
    for system in systems.names:
        _, _, round_, suspicion = systems.start(7)
        state = (world.cache(7), jnp.array(world.batch().tokens), round_, suspicion)
        found = jax.block_until_ready(systems.step(system, state))
        cache, tokens, _, suspicion = found
        texts = differences(world, wanted, tokens, cache, CLOSE)
        if np.asarray(suspicion).any():
            texts.insert(0, f"suspects {np.flatnonzero(suspicion).tolist()}")
        if texts:
            wrong[system] = "; ".join(texts)
    systems.close()
    return wrong


def measure(config, rank: int, job: dict, meeting: Meeting, out: Out, name: str) -> None:
    """Times all systems of one configuration and writes the samples."""
    world = World(config, rank)
    systems = Systems(world, job["systems"], meeting, name)
    for system, error in systems.failures.items():
        out.write(kind="failure", family=name, what=system, error=error[:600])
    names, samples, steps = systems.names, {s: [] for s in systems.names}, job["steps"]
    shares, first = {}, None
    for system in names:
        state = systems.step(system, systems.start(7))
        tokens = np.asarray(state[1])
        first = tokens if first is None else first
        shares[system] = agreeing(first, tokens)
        del state
    states = systems.start(7)
    for block in range(job["samples"] + WARM_BLOCKS):
        turn = block % max(1, len(names))
        for system in names[turn:] + names[:turn]:
            states = jax.block_until_ready(systems.step(system, states))  # all ranks are there
            begin_s = time.perf_counter()
            for _ in range(steps):
                states = systems.step(system, states)
            jax.block_until_ready(states)
            if block >= WARM_BLOCKS:
                samples[system].append((time.perf_counter() - begin_s) / steps * 1e6)
    states = _profile(systems, states, out, name)
    if np.asarray(states[3]).any():
        raise Unfit(f"rank {rank} suspects {np.flatnonzero(states[3]).tolist()}")
    del states
    for system in names:
        out.write(
            kind="step",
            family=name,
            name=system,
            batch=config.engine.batch_rows,
            layers=config.model.layers,
            samples_us=samples[system],
            agreeing=shares[system],
        )
    systems.close()


def _profile(systems: Systems, states, out: Out, name: str):
    """Writes the shares of kernels in a step of `live` on rank 0; all ranks take the steps."""
    if "live" not in systems.names or jax.default_backend() != "gpu":
        return states
    held = [states]

    def run():
        for _ in range(PROFILED_STEPS):
            held[0] = systems.step("live", held[0])
        return held[0]

    if systems.world.rank:
        return jax.block_until_ready(run())
    before = states
    try:
        out.write(kind="profile", family=name, shares=gpu_trace.shares(gpu_trace.run_kernels(run)))
    except Exception as error:  # the profiler's own troubles end no measurement
        print(f"{name}: no profile: {error}", file=sys.stderr, flush=True)
        if held[0] is before:
            run()  # the others wait for these steps
    return jax.block_until_ready(held[0])


def measure_all(directory: pathlib.Path, rank: int, job: dict) -> None:
    if any(system not in ELASTIC for system in job["systems"]):
        join_mesh(job["coordinator"], job["ranks"], rank, 90)
    meeting, config = meeting_of(directory, rank, job), config_of(job)
    out = Out(directory / f"found.{rank}.jsonl")
    if job["platform"] == "gpu":
        out.write(kind="read", bytes_per_s=read_rate(READ_SAMPLES))
    every = [with_sizes(config, ranks=job["ranks"], **sizes) for sizes in job["sizes"]]
    # Of a few tokens too many may be near a tie, and of many the reference takes long.
    checked = min(every, key=lambda c: abs(c.engine.batch_rows - CHECKED_BATCH))
    wrong = check_short(checked, rank, job["systems"], meeting, "short")
    everyone = meeting.share("short.wrong", wrong)
    for system in job["systems"]:
        texts = [f"rank {r}: {w[system]}" for r, w in enumerate(everyone) if system in w]
        if texts and rank == 0:
            out.write(kind="failure", family="short", what=system, error="; ".join(texts)[:900])
    # What is wrong at one rank is timed at none; the others are.
    job["systems"] = [s for s in job["systems"] if not any(s in w for w in everyone)]
    if any("live" in w for w in everyone) or not job["systems"]:
        raise Unfit(f"wrong or not compiled, by rank: {everyone}")
    for index, sized in enumerate(every):
        measure(sized, rank, job, meeting, out, f"size{index}")


if __name__ == "__main__":
    worker(measure_all)
