"""Steady decode throughput: elastic ranks beside static sharding over XLA's collectives.

    python -m benchmarks.bench_static --config=tiny_cpu --ranks=4

Every rank is one process that holds all systems; blocks of decode steps alternate between them, so
the ratios are of one run. On GPUs the collectives are NCCL's, on CPU Gloo's.

1. Each system answers the same prompts, and each token is compared with the dense model's logits.
2. Only if all are right are they timed: `--blocks` of `--steps` steps, each system in turn.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import time

from absl import app
from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Record, append, commit, compared, cpu_device, now, percentile
from benchmarks.static.exchanges import EXCHANGES, GPU_ONLY
from benchmarks.static.processes import free_port, start, with_ranks
from benchmarks.static.worker import CHECKED_TOKENS, PROMPT_TOKENS
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
    """Of the process that is started, not of one that imports this."""
    absl_flags.DEFINE_integer("ranks", None, "How many ranks; else as configured.", 1)
    absl_flags.DEFINE_integer("blocks", 12, "Blocks of steps that are timed.", 1)
    absl_flags.DEFINE_integer("steps", 20, "Decode steps of a block.", 1)
    absl_flags.DEFINE_list("systems", None, "Only these; else all that the platform has.")
    absl_flags.DEFINE_float("deadline_s", 900.0, "For all of it.")
    absl_flags.DEFINE_string("out", None, "File of records to append to; none: only the table.")


def main() -> int:
    values = absl_flags.FLAGS
    config = with_ranks(flags.run_config(), values.ranks)
    systems = _systems(config)
    _check_room(config)
    before = commit(), now()
    directory = pathlib.Path(tempfile.mkdtemp(prefix="eep-static-"))
    try:
        report = _run(config, systems, directory)
    except RuntimeError as error:
        say(f"no result: {error}", "bold red")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    if wrong := report["wrong"] or [f"ranks {report['ranks_wrong']} found wrong tokens"] * any(
        report["ranks_wrong"]
    ):
        say(f"no result: {wrong[0]}", "bold red")
        return 1
    records = _records(config, report, *before)
    _print(config, records)
    if values.out:
        append(pathlib.Path(values.out), records)
        say(f"appended {len(records)} records to {values.out}")
    return 0


def _systems(config: RunConfig) -> list[str]:
    every = [*ELASTIC, *EXCHANGES]
    chosen = absl_flags.FLAGS.systems or every
    if unknown := sorted(set(chosen) - set(every)):
        raise flags.UsageError(f"--systems: {unknown} are not among {every}")
    if config.platform == "cpu":
        for name in [s for s in chosen if s in GPU_ONLY]:
            say(f"{name}: left out, XLA:CPU does not implement it; run this on GPUs")
        chosen = [s for s in chosen if s not in GPU_ONLY]
    if not chosen:
        raise flags.UsageError("--systems: none is left that runs on this platform")
    return sorted(chosen, key=every.index)


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


def _run(config: RunConfig, systems: list[str], directory: pathlib.Path) -> dict:
    """Starts the ranks and waits for what rank 0 reports. Raises RuntimeError with a log's end."""
    values, report = absl_flags.FLAGS, directory / "report.json"
    job = {"ranks": config.cluster.ranks, "systems": systems, "report": str(report)}
    job |= {"blocks": values.blocks, "steps": values.steps}
    path = directory / "job.json"
    path.write_text(json.dumps(job))
    say(f"{config.cluster.ranks} ranks of {config.name}: {', '.join(systems)}; {directory}")
    address = f"--coordinator=127.0.0.1:{free_port()}"
    logs = [directory / f"rank{rank}.log" for rank in range(config.cluster.ranks)]
    ranks = [
        start("benchmarks.static.worker", rank, log, f"--job={path}", address)
        for rank, log in enumerate(logs)
    ]
    ends_s = time.monotonic() + values.deadline_s
    try:
        while not report.exists() or any(process.poll() is None for process in ranks):
            failed = next((r for r, p in enumerate(ranks) if p.poll()), None)
            if failed is not None or time.monotonic() > ends_s:
                rank = failed or 0
                tail = "\n".join(logs[rank].read_text(errors="replace").splitlines()[-15:])
                why = "failed" if failed is not None else f"took over {values.deadline_s:.0f} s"
                raise RuntimeError(f"rank {rank} {why}; logs are in {directory}:\n{tail}")
            time.sleep(0.05)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    return json.loads(report.read_text())


def _records(config: RunConfig, report: dict, commit: str, time: str) -> list[Record]:
    """tokens/s of all ranks for each system. The baseline of elastic is the fastest static one."""
    model, engine, steps = config.model, config.engine, absl_flags.FLAGS.steps
    tokens = engine.batch_rows * config.cluster.ranks * steps
    rates = {name: tokens / percentile(seconds, 50) for name, seconds in report["seconds"].items()}
    static = {name: rate for name, rate in rates.items() if name in EXCHANGES}
    best = max(static, key=static.get, default=None)
    shape = {
        "config": config.name,
        "tokens": engine.batch_rows,
        "hidden": model.hidden,
        "layers": model.layers,
        "experts": model.experts,
        "top_k": model.experts_per_token,
        "dtype": engine.dtype,
    }
    records = []
    for name, rate in rates.items():
        baseline = static.get(best)
        against = {"against": best}
        if name == "elastic_once" and "elastic_fixed" in rates:
            baseline, against = rates["elastic_fixed"], {"against": "elastic_fixed"}
        samples = {"samples": len(report["seconds"][name])}
        # What disturbed the machine disturbed all: each block is compared with its neighbours.
        ratio = {} if baseline is None else compared(baseline, rate)
        records.append(
            Record(
                bench="static",
                metric=f"decode_tokens_per_s {name}",
                value=rate,
                unit="tokens/s",
                device=cpu_device() if config.platform == "cpu" else report["device"],
                ranks=config.cluster.ranks,
                shape=shape | against | samples,
                commit=commit,
                time=time,
                **ratio,
            )
        )
    return records


def _print(config: RunConfig, records: list[Record]) -> None:
    first = records[0]
    table = Table(title=f"{first.device}; {first.ranks} ranks; {config.name}", title_justify="left")
    for name in ("system", "tokens/s", "baseline", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if name in ("system", "baseline") else "right")
    for r in records:
        number = lambda value, form: "" if value is None else f"{value:{form}}"
        cells = (r.shape["against"] or "", number(r.baseline, ",.0f"), number(r.ratio, ".3f"))
        table.add_row(r.metric.split()[-1], f"{r.value:,.0f}", *cells)
    Console(highlight=False, width=110).print(table, markup=False)
    elastic = next((r for r in records if r.metric.endswith(" elastic") and r.ratio), None)
    if elastic is not None:
        reached = "reached" if elastic.ratio >= AIM else "MISSED"
        say(
            f"elastic / best static ({elastic.shape['against']}): {elastic.ratio:.3f}, "
            f"at least {AIM}: {reached}"
        )


if __name__ == "__main__":
    define()
    sys.exit(app.run(flags.main_with_usage(main)))
