"""What a run of `bench_wide_decode` found, as records: rates of all ranks together, and ratios."""

from collections.abc import Mapping, Sequence

from benchmarks.harness import Record, compared, percentile
from benchmarks.static.exchanges import EXCHANGES
from benchmarks.wide.decode_sizes import step_bytes
from benchmarks.wide.exchange_report import Found, slowest
from benchmarks.wide.workers import Machine
from eep_jax.config import RunConfig


def records_of(
    found: Found, configs: Sequence[RunConfig], machine: Machine, common: Mapping
) -> list[Record]:
    """Of each batch: tokens/s of every system, compared with the best static one; and `live` with
    `fixed`, which is what live membership costs. Bounds are of reading memory at the best rate of
    this run."""
    records = []
    read_bytes_per_s = max((line["bytes_per_s"] for _, line in found.of("read")), default=None)
    for index, config in enumerate(configs):
        samples = {}
        for name in ("live", "fixed", *EXCHANGES):
            lines = [line for _, line in found.of("step", family=f"size{index}", name=name)]
            if len(lines) == machine.ranks:
                samples[name] = slowest(lines)
        records += _of_batch(samples, config, machine, common, read_bytes_per_s)
        records += _agreeing(found, index, config, machine, common)
        records += _profile(found, index, config, machine, common)
    return records


def _agreeing(found: Found, index: int, config: RunConfig, machine: Machine, common):
    """The share of tokens that a system gives as the first one does, from the same cache. Logits
    of drawn weights are close, so in a deep stack roundings let others win."""
    fields = {"bench": "wide_decode", "device": machine.device, "ranks": machine.ranks, **common}
    shares: dict[str, list[float]] = {}
    for _, line in found.of("step", family=f"size{index}"):
        shares.setdefault(line["name"], []).append(line["agreeing"])
    return [
        Record(
            metric="tokens_agreeing",
            value=sum(values) / len(values),
            unit="",
            shape=shape_of(config, machine) | {"system": name},
            **fields,
        )
        for name, values in shares.items()
    ]


def _profile(found: Found, index: int, config: RunConfig, machine: Machine, common):
    """The parts of a step's time on the GPU of rank 0; waiting for peers is in the exchanges'."""
    lines = [line for _, line in found.of("profile", family=f"size{index}")]
    fields = {"bench": "wide_decode", "device": machine.device, "ranks": machine.ranks, **common}
    shape = shape_of(config, machine) | {"system": "live"}
    return [
        Record(metric=f"share_{part}", value=share, unit="", shape=shape, **fields)
        for line in lines[:1]
        for part, share in line["shares"].items()
    ]


def _of_batch(samples, config: RunConfig, machine: Machine, common, read_bytes_per_s):
    tokens = config.engine.batch_rows * machine.ranks
    rate = lambda us: tokens / us * 1e6
    rates = {name: rate(percentile(us, 50)) for name, us in samples.items()}
    static = {name: rates[name] for name in EXCHANGES if name in rates}
    best = max(static, key=static.get, default=None)
    bound = read_bytes_per_s and rate(step_bytes(config) / read_bytes_per_s * 1e6)
    fields = {"bench": "wide_decode", "device": machine.device, "ranks": machine.ranks, **common}
    records = []
    for name, us in samples.items():
        shape = shape_of(config, machine) | {"samples": len(us), "system": name, "against": best}
        ratio = compared(static[best], rates[name]) if best else {}
        told = fields | {"shape": shape, "bound": bound}
        records.append(
            Record(metric="tokens_per_s", value=rates[name], unit="tokens/s", **ratio, **told)
        )
        told["bound"] = bound and tokens / bound * 1e6
        for statistic in (50, 99):
            metric = f"step p{statistic}"
            records.append(
                Record(metric=metric, value=percentile(us, statistic), unit="us", **told)
            )
    if {"live", "fixed"} <= set(samples):
        p50 = {name: percentile(samples[name], 50) for name in ("live", "fixed")}
        shape = shape_of(config, machine) | {"samples": len(samples["live"]), "against": "fixed"}
        records.append(
            Record(
                metric="membership p50",
                value=p50["live"],
                unit="us",
                shape=shape,
                **compared(p50["fixed"], p50["live"]),
                **fields,
            )
        )
    return records


def shape_of(config: RunConfig, machine: Machine) -> dict:
    model = config.model
    return {
        "model": model.name,
        "tokens": config.engine.batch_rows,
        "context": config.engine.context_tokens // 2 + 1,
        "layers": model.layers,
        "hidden": model.hidden,
        "experts": model.experts,
        "top_k": model.experts_per_token,
        "dtype": config.engine.dtype,
        **machine.facts,
    }
