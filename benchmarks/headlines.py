"""What README.md shows of the results: a line in words for each, and what it is compared with."""

import dataclasses
from collections.abc import Iterable, Mapping

from benchmarks.harness import Record

QWEN = {"model": "Qwen3-30B-A3B"}
WIDE = {"hidden": 7168, "tokens": 128}
LARGE = {"hidden": 7168, "routing": "balanced"}
BANK = {"config": "bank_30gb_h100x1"}
RESTART = "a full restart"
TINY_GPU, TINY = {"config": "tiny_gpu"}, {"config": "tiny_cpu"}


@dataclasses.dataclass(frozen=True)
class Headline:
    """The newest record of a metric whose shape has these entries; none: no line.

    `beside` says what its bound is, or its baseline where it has no bound or `baseline` is set; ""
    shows neither.
    """

    says: str
    bench: str
    metric: str
    shape: Mapping = dataclasses.field(default_factory=dict)
    beside: str = ""
    baseline: bool = False

    def compared(self, record: Record) -> float | None:
        """What the record is shown beside, in its unit."""
        if not self.beside:
            return None
        use_bound = record.bound is not None and not self.baseline
        return record.bound if use_bound else record.baseline

    def find(self, records: Iterable[Record]) -> Record | None:
        fits = lambda r: all(r.shape.get(key) == value for key, value in self.shape.items())
        of_metric = (r for r in records if (r.bench, r.metric) == (self.bench, self.metric))
        return max(filter(fits, of_metric), key=lambda r: r.time, default=None)


DECODE = tuple(
    Headline(
        f"Decode step of batch {rows}, Qwen3-30B-A3B's shape, {{layers}} layers",
        "decode",
        "time p50",
        QWEN | {"tokens": rows},
        "reading weights and cache once",
    )
    for rows in (1, 16, 64, 256)
)
# GPUs first: a device shows what was measured on it.
HEADLINES = (
    Headline(
        "Dispatch, 128 tokens x 7168 in bf16, 8 of 256 experts, one rank of 8",
        "dispatch",
        "time p50",
        WIDE | {"dtype": "bfloat16"},
        "a copy of the same bytes",
    ),
    Headline(
        "The same in fp8",
        "dispatch",
        "time p50",
        WIDE | {"dtype": "float8_e4m3fn"},
        "a copy of the same bytes",
    ),
    Headline(
        "Combine, `per_choice`, results written home by the experts",
        "combine_home",
        "time p50",
        WIDE,
        "a copy of as many bytes",
    ),
    Headline(
        "Combine, `per_rank`: partial sums, sent and summed",
        "combine",
        "time p50",
        WIDE | {"combine": "per_rank"},
        "a copy of the bytes that travel",
    ),
    Headline(
        "32 experts of 7168 x 2048, 8 rows each",
        "expert_gemm",
        "time p50",
        LARGE | {"rows_per_expert": 8},
        "reading their weights once",
    ),
    Headline(
        "16 experts of 7168 x 2048, 512 rows each",
        "expert_gemm",
        "time p50",
        LARGE | {"rows_per_expert": 512},
        "the operations at the rate of a large product",
    ),
    *DECODE,
    Headline(
        "Decode step of 8 layers, membership live",
        "step",
        "time p50",
        {},
        "membership compiled in",
        baseline=True,
    ),
    Headline("A wait ends after its abort word is set, p99", "abort", "p99_ms"),
    Headline(
        "Pause after SIGKILL of one of 4 ranks on one GPU",
        "recovery",
        "pause_s p50",
        TINY_GPU,
        RESTART,
    ),
    Headline(
        "Return of one of 4 ranks on one GPU: pause",
        "rejoin",
        "pause_s p50",
        TINY_GPU,
        RESTART,
    ),
    Headline(
        "Return of a rank with 30 GB of experts: pause",
        "rejoin",
        "pause_s p50",
        BANK,
        RESTART,
    ),
    Headline("The same, from process start to serving", "rejoin", "total_s p50", BANK, RESTART),
    Headline("Pause after SIGKILL of one of 4 ranks", "recovery", "pause_s p50", TINY, RESTART),
    Headline("Bytes moved before resuming", "recovery", "bytes_before_resuming p50", TINY),
    Headline(
        "One SIGKILL: time without service",
        "faults",
        "pause_s elastic",
        {"against": "rejit"},
        "`live_devices` and re-jit",
    ),
    Headline(
        "The same", "faults", "pause_s elastic", {"against": "restart"}, "static, full restart"
    ),
    Headline("Return of a rank: pause", "rejoin", "pause_s p50", TINY, RESTART),
    Headline("The same, from process start to serving", "rejoin", "total_s p50", TINY, RESTART),
    Headline("Compilations on a return", "rejoin", "compilations p50"),
    *(
        Headline(said, "sources", f"{source} {done}", {}, f"plain {copy}")
        for source, copy, what in (
            ("peer", "copy", "Experts from another rank's bank"),
            ("backup", "copy", "Experts from a backup in host memory"),
            ("p2p", "socket copy", "Experts from a backup by Orbax P2P"),
        )
        for done, said in (("moved", what), ("checked", "The same, each compared with its digest"))
    ),
    *(
        Headline(
            f"A rank's weights from {said}, {cache}",
            "loading",
            "rate",
            {"source": source, "bank": "bfloat16", "cache": state, "readers": 1},
            "one thread that only reads",
        )
        for source, said in (("orbax", "a converted checkpoint"), ("safetensors", "safetensors"))
        for state, cache in (("cold", "not cached"), ("cached", "cached by the system"))
    ),
    Headline(
        "Decode throughput, every expert twice",
        "static",
        "decode_tokens_per_s elastic",
        {},
        "best static sharding",
    ),
    Headline("Supervisor's CPU time for a repair with 512 ranks", "control", "repair_cpu_ms p50"),
)
