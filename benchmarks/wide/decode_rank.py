"""One rank of `bench_wide_decode`: all systems of one batch size in one process, timed in turn.

    python -m benchmarks.wide.decode_rank DIRECTORY RANK PARENT_PID   # bench_wide_decode starts it

First a model of few layers: every system's keys, values and tokens are compared with plain experts.
Then the whole stack: its tokens are compared between systems, and blocks of steps alternate.
"""

import json
import os
import pathlib
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_rates import read_rate
from benchmarks.gpu_timing import compile_all, shapes_of
from benchmarks.gpu_trace import run_kernels, shares
from benchmarks.wide.decode import World
from benchmarks.wide.decode_sizes import ELASTIC, with_few_experts, with_sizes
from benchmarks.wide.decode_systems import Systems
from benchmarks.wide.exchange_rank import Out
from benchmarks.wide.meeting import Meeting
from benchmarks.wide.workers import JOB
from launch.flags import load_config, override
from launch.processes import end_with_parent

CHECKED_MOE_LAYERS = 2
WARM_BLOCKS = 1
CHECKED_BATCH, CHECKED_BYTES_MAX = 16, 4 << 30
READ_SAMPLES, PROFILED_STEPS = 5, 2
AGREEING = 0.5  # of the tokens at least; later a rounding may move a token to another expert
AGREEING_MIN = 8  # tokens; of fewer, too many may be near a tie
CLOSE = 0.03  # of keys and values after the first expert layer: results are rounded to bfloat16


class Unfit(Exception):
    """An answer was wrong, so its time means nothing."""


def check_short(config, rank: int, names, meeting: Meeting, name: str) -> dict[str, str]:
    """Compares all systems of a short stack with plain experts; what is wrong with each, here."""
    dense = min(config.model.dense_layers, 1)
    sizes = {"ranks": config.cluster.ranks, "batch": config.engine.batch_rows}
    sizes |= {"context_tokens": config.engine.context_tokens}
    short = with_sizes(config, layers=dense + CHECKED_MOE_LAYERS, **sizes)
    # Plain experts are all on one rank.
    world = World(with_few_experts(short, config.cluster.ranks, CHECKED_BYTES_MAX), rank)
    systems = Systems(world, names, meeting, name)
    experts = jnp.stack([world.draw_expert(e) for e in range(world.config.model.experts)])
    shapes = systems.shapes()
    program = world.reference(shapes, shapes_of(experts))
    cache = world.cache(7)
    reference = compile_all({"": program})[""]
    wanted = reference(systems.dense, experts, cache, systems.batch)
    wrong = dict(systems.failures)
    for system in systems.names:
        _, _, round_, suspicion = systems.start(7)
        state = (world.cache(7), jnp.array(world.batch().tokens), round_, suspicion)
        found = jax.block_until_ready(systems.step(system, state))
        if texts := _compare(world, wanted, found):
            wrong[system] = "; ".join(texts)
    systems.close()
    return wrong


def _compare(world: World, wanted, found) -> list[str]:
    """The last layer's keys and values depend on the experts of the layers before."""
    tokens, cache = wanted
    wrong, layer = [], world.config.model.layers - 1
    if np.asarray(found[3]).any():
        wrong.append(f"suspects {np.flatnonzero(found[3]).tolist()}")
    for name in ("keys", "values"):
        right, got = (
            np.asarray(getattr(c, name)[layer][:, :, world.at], np.float32)
            for c in (cache, found[0])
        )
        error = float(np.sqrt(np.mean((right - got) ** 2) / np.mean(right**2)))
        if not error < CLOSE:
            wrong.append(f"{name} of layer {layer} are off by {error:.3g} of the reference")
    share = float(np.mean(np.asarray(tokens) == np.asarray(found[1])))
    if len(tokens) >= AGREEING_MIN and share < AGREEING:
        wrong.append(f"only {share:.0%} of the tokens are the reference's")
    return wrong


def measure(config, rank: int, job: dict, meeting: Meeting, out: Out, name: str) -> None:
    """Times all systems of one configuration; writes what was found."""
    world = World(config, rank)
    systems = Systems(world, job["systems"], meeting, name)
    for system, error in systems.failures.items():
        out.write(kind="failure", family=name, what=system, error=error[:600])
    names, samples, steps = systems.names, {s: [] for s in systems.names}, job["steps"]
    agreeing, first = {}, None
    for system in names:
        state = systems.step(system, systems.start(7))
        tokens = np.asarray(state[1])
        first = tokens if first is None else first
        agreeing[system] = float(np.mean(tokens == first))
        del state
    states = systems.start(7)
    for block in range(job["samples"] + WARM_BLOCKS):
        turn = block % max(1, len(names))
        for system in names[turn:] + names[:turn]:
            states = jax.block_until_ready(systems.step(system, states))  # everybody is there
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
            agreeing=agreeing[system],
        )
    systems.close()


def _profile(systems: Systems, states, out: Out, name: str):
    """What kernels a step of `live` consists of, as rank 0 sees it; all ranks take the steps."""
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
        out.write(kind="profile", family=name, shares=shares(run_kernels(run)))
    except Exception as error:  # the profiler's own troubles end no measurement
        print(f"{name}: no profile: {error}", file=sys.stderr, flush=True)
        if held[0] is before:
            run()  # the others wait for these steps
    return jax.block_until_ready(held[0])


def main(directory: pathlib.Path, rank: int, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    job = json.loads((directory / JOB).read_text())
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if any(system not in ELASTIC for system in job["systems"]):
        jax.distributed.initialize(
            job["coordinator"], job["ranks"], rank, initialization_timeout=90
        )
    if jax.default_backend() != job["platform"]:
        raise RuntimeError(f"JAX computes on {jax.default_backend()}, not on {job['platform']}")
    config = override(load_config(job["config"]), *job["overrides"])
    meeting = Meeting(directory / "meeting", rank, job["ranks"], job["deadline_s"])
    out = Out(directory / f"found.{rank}.jsonl")
    if job["platform"] == "gpu":
        out.write(kind="read", bytes_per_s=read_rate(READ_SAMPLES))
    every = [with_sizes(config, ranks=job["ranks"], **sizes) for sizes in job["sizes"]]
    # Of a few tokens too many may be near a tie, and of many the reference takes long.
    checked = min(every, key=lambda c: abs(c.engine.batch_rows - CHECKED_BATCH))
    wrong = check_short(checked, rank, job["systems"], meeting, "short")
    everyone = meeting.share("short.wrong", wrong)
    for system in job["systems"]:
        told = [f"rank {r}: {w[system]}" for r, w in enumerate(everyone) if system in w]
        if told and rank == 0:
            out.write(kind="failure", family="short", what=system, error="; ".join(told)[:900])
    # What is wrong at one rank is timed at none; the others are.
    job["systems"] = [s for s in job["systems"] if not any(s in w for w in everyone)]
    if any("live" in w for w in everyone) or not job["systems"]:
        raise Unfit(f"wrong or not compiled, by rank: {everyone}")
    for index, sized in enumerate(every):
        measure(sized, rank, job, meeting, out, f"size{index}")


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # leaving in order could wait for a kernel that waits for a peer
    os._exit(0)  # threads of XLA may be inside a callback
