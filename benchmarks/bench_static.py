"""Steady decode throughput: elastic ranks beside static sharding over XLA's collectives.

    python -m benchmarks.bench_static --config=tiny_cpu --ranks=4

Every rank is one process that holds all systems; blocks of decode steps alternate between them, so
the ratios are of one run. On GPUs the collectives are NCCL's, on CPU Gloo's.

1. Each system answers the same prompts, and each token is compared with the dense model's logits.
2. Only if all are right are they timed: `--blocks` of `--steps` steps, each system in turn.
"""

import json

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, Unfit, percentile
from benchmarks.processes import (
    free_port,
    machine_of,
    run_directory,
    run_workers,
    with_ranks,
)
from benchmarks.static.exchanges import EXCHANGES, GPU_ONLY
from benchmarks.static.worker import CHECKED_TOKENS, PROMPT_TOKENS, REPORT
from eep_jax.config import RunConfig
from launch import flags
from launch.console import say

ELASTIC = {
    "elastic": "live membership, replicas as configured",
    "elastic_once": "live membership, each expert once, as static sharding has it",
    "elastic_fixed": "each expert once, members compiled in",
}
AIM = 1.0  # elastic over the best static baseline
WARM_BLOCKS = 1


def define() -> None:
    command.define()
    absl_flags.DEFINE_integer("ranks", None, "How many ranks; without it as configured.", 1)
    absl_flags.DEFINE_integer("blocks", 12, "Blocks of steps that are timed.", 1)
    absl_flags.DEFINE_integer("steps", 20, "Decode steps of a block.", 1)
    absl_flags.DEFINE_list("systems", None, "Only these; without it all of the platform.")
    absl_flags.DEFINE_float("deadline_s", 900.0, "For all of it.")


def main() -> list[Record]:
    values = absl_flags.FLAGS
    config = with_ranks(flags.run_config(), values.ranks)
    gpus = flags.gpus() if config.platform == "gpu" else ()
    machine = machine_of(config.platform, config.cluster.ranks, gpus)
    systems = _systems(config)
    _check_room(config)
    sheet = Sheet("static", machine.device, machine.ranks, _shape(config))
    job = {"flags": flags.forwarded(), "coordinator": f"127.0.0.1:{free_port()}"}
    job |= {"systems": systems, "blocks": values.blocks, "steps": values.steps}
    where = {"deadline_s": values.deadline_s, "fraction": config.device.memory_fraction}
    with run_directory() as directory:
        logs = directory.path
        say(f"{machine.ranks} ranks of {config.name}: {', '.join(systems)}; {logs}")
        run_workers("benchmarks.static.worker", machine, job, logs, **where)
        report = json.loads((logs / REPORT).read_text())
    if report["wrong"]:
        raise Unfit(report["wrong"][0])
    if any(report["ranks_wrong"]):
        raise Unfit(f"ranks {report['ranks_wrong']} found wrong tokens")
    _add_rates(sheet, config, report["seconds"])
    _print(config, sheet.records)
    return sheet.records


def _systems(config: RunConfig) -> list[str]:
    chosen = command.among("systems", [*ELASTIC, *EXCHANGES])
    if config.platform == "cpu":
        for name in [s for s in chosen if s in GPU_ONLY]:
            say(f"{name}: left out, XLA:CPU does not implement it; run this on GPUs")
        chosen = [s for s in chosen if s not in GPU_ONLY]
    if not chosen:
        raise flags.UsageError("--systems: none is left that runs on this platform")
    return chosen


def _check_room(config: RunConfig) -> None:
    """The requests must not end while anything is measured."""
    values = absl_flags.FLAGS
    steps = (values.blocks + WARM_BLOCKS) * (values.steps + 1) + CHECKED_TOKENS
    room = config.engine.context_tokens - PROMPT_TOKENS
    # Prompts go in a few at a time, and the first ones produce tokens meanwhile.
    prompts = config.engine.batch_rows * PROMPT_TOKENS // config.engine.prefill_tokens + 1
    if steps + prompts > room:
        raise flags.UsageError(
            f"--blocks={values.blocks} of --steps={values.steps} need {steps + prompts} tokens of "
            f"each sequence, {config.name} has room for {room}; lower one of them, or raise "
            "engine.context_tokens"
        )


def _shape(config: RunConfig) -> dict:
    model, engine = config.model, config.engine
    return {
        "config": config.name,
        "tokens": engine.batch_rows,
        "hidden": model.hidden,
        "layers": model.layers,
        "experts": model.experts,
        "top_k": model.experts_per_token,
        "dtype": engine.dtype,
    }


def _add_rates(sheet: Sheet, config: RunConfig, seconds: dict[str, list[float]]) -> None:
    """tokens/s of all ranks for each system. The baseline of elastic is the fastest static one."""
    tokens = config.engine.batch_rows * config.cluster.ranks * absl_flags.FLAGS.steps
    rates = {name: tokens / percentile(taken, 50) for name, taken in seconds.items()}
    static = {name: rate for name, rate in rates.items() if name in EXCHANGES}
    best = max(static, key=static.get, default=None)
    for name, rate in rates.items():
        against = best
        if name == "elastic_once" and "elastic_fixed" in rates:
            against = "elastic_fixed"
        # Blocks alternate, so the medians are of the same time on the machine.
        sheet.add(
            f"decode_tokens_per_s {name}",
            rate,
            "tokens/s",
            baseline=rates.get(against),
            against=against,
            samples=len(seconds[name]),
        )


def _print(config: RunConfig, records: list[Record]) -> None:
    number, first = command.number, records[0]
    command.show(
        f"{first.device}; {first.ranks} ranks; {config.name}",
        "system|>tokens/s|baseline|>tokens/s|>ratio",
        [
            [
                r.metric.split()[-1],
                f"{r.value:,.0f}",
                r.shape["against"] or "",
                number(r.baseline, ",.0f"),
                number(r.ratio, ".3f"),
            ]
            for r in records
        ],
    )
    elastic = next((r for r in records if r.metric.endswith(" elastic") and r.ratio), None)
    if elastic is not None:
        say(
            f"elastic / best static ({elastic.shape['against']}): {elastic.ratio:.3f}, "
            f"at least {AIM}: {command.verdict(elastic.ratio >= AIM)}"
        )


if __name__ == "__main__":
    define()
    command.run(main)
