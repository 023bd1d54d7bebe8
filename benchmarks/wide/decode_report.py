"""Records of a run of `bench_wide_decode`: rates of all ranks together, and ratios."""

from collections.abc import Mapping, Sequence

from benchmarks.harness import Sheet, percentile
from benchmarks.static.exchanges import EXCHANGES
from benchmarks.wide.decode_sizes import step_bytes
from benchmarks.wide.exchange_report import Found, add_times, slowest
from eep_jax.config import RunConfig


def add_records(sheet: Sheet, found: Found, configs: Sequence[RunConfig]) -> None:
    """For each batch: tokens/s of every system, compared with the best static one; and `live` with
    `fixed`, which is the cost of live membership. Bounds are of reading memory at the best rate of
    this run."""
    read_bytes_per_s = max((line["bytes_per_s"] for _, line in found.of("read")), default=None)
    for index, config in enumerate(configs):
        samples, family = {}, {"family": f"size{index}"}
        for name in ("live", "fixed", *EXCHANGES):
            lines = [line for _, line in found.of("step", **family, name=name)]
            if len(lines) == sheet.ranks:
                samples[name] = slowest(lines)
        of = sheet.of(**shape_of(config))
        _add_times(of, samples, config, read_bytes_per_s)
        # Logits of drawn weights are close, so in a deep stack roundings let others win.
        shares: dict[str, list[float]] = {}
        for _, line in found.of("step", **family):
            shares.setdefault(line["name"], []).append(line["agreeing"])
        for name, values in shares.items():
            of.add("tokens_agreeing", sum(values) / len(values), system=name)
        # The parts of a step on the GPU of rank 0; waiting for peers is in the exchanges'.
        for _, line in found.of("profile", **family)[:1]:
            for part, share in line["shares"].items():
                of.add(f"share_{part}", share, system="live")


def _add_times(
    sheet: Sheet,
    samples: Mapping[str, Sequence[float]],
    config: RunConfig,
    read_bytes_per_s: float | None,
) -> None:
    tokens = config.engine.batch_rows * sheet.ranks
    p50 = {name: percentile(us, 50) for name, us in samples.items()}
    rates = {name: tokens / us * 1e6 for name, us in p50.items()}
    static = {name: rates[name] for name in EXCHANGES if name in rates}
    best = max(static, key=static.get, default=None)
    bound_us = read_bytes_per_s and step_bytes(config) / read_bytes_per_s * 1e6
    bound = bound_us and tokens / bound_us * 1e6
    for name, us in samples.items():
        of, count = sheet.of(system=name, against=best), len(us)
        beside = {"bound": bound, "baseline": static.get(best), "samples": count}
        of.add("tokens_per_s", rates[name], "tokens/s", **beside)
        add_times(of, us, "step", bound=bound_us)
    if {"live", "fixed"} <= set(samples):
        beside = {"baseline": p50["fixed"], "samples": len(samples["live"]), "against": "fixed"}
        sheet.add("membership p50", p50["live"], "us", **beside)


def shape_of(config: RunConfig) -> dict:
    model = config.model
    return {
        "model": model.name,
        "tokens": config.engine.batch_rows,
        "context": config.engine.context_tokens // 2,
        "layers": model.layers,
        "hidden": model.hidden,
        "experts": model.experts,
        "top_k": model.experts_per_token,
        "dtype": config.engine.dtype,
    }
