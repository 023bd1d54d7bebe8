"""Cost model of dispatch and combine at R ranks: bytes, flags and timeouts, on paper.

    python -m benchmarks.cost_model          # checks the model against results, prints R = 8..512

`time = fixed + peers * post + bytes / rate`, for one rank and one direction. Bytes are counted as
the windows have them (`pallas_kernels/window.py`), with K experts chosen evenly among E that are
spread evenly. The fixed cost and the kernels' own rate are fitted to two measured points and
checked at all others of `results/dispatch_combine.jsonl` (R = 8 on one GPU, nothing leaves it).
Beyond that the slower of kernel and link counts. **LinkSpeed rates are nominal, not measured.**
"""

import dataclasses
import math
from collections.abc import Sequence

from benchmarks import command
from benchmarks.harness import RESULTS, Record, read
from pallas_kernels.window import WindowLayout

RANKS = (8, 16, 32, 64, 128, 256, 512)
FIT_TOKENS = (16, 512)  # the two points that the fit sees
FLAG_BYTES, VOTE_BYTES, CHOICE_BYTES = 4, 4, 8  # a choice is a slot id and a weight


@dataclasses.dataclass(frozen=True)
class LinkSpeed:
    """Distance between ranks. Rates are of one direction of one GPU."""

    name: str
    bytes_per_s: float
    latency_us: float  # until a flag that was stored is seen
    post_us: float  # for each peer: one flag, or one message's work request


NVLINK = LinkSpeed("NVLink 4, 450 GB/s", 450e9, 1.0, 0.02)
RDMA = LinkSpeed("RDMA, 400 Gb/s a GPU", 50e9, 4.0, 0.15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Sizes of what each rank sends in one layer."""

    ranks: int
    tokens: int = 128
    hidden: int = 7168
    experts: int = 256
    choices: int = 8
    dispatch_dtype: str = ""
    combine: str = "per_choice"

    @property
    def layout(self) -> WindowLayout:
        return WindowLayout(
            ranks=self.ranks,
            tokens=self.tokens,
            choices=self.choices,
            hidden=self.hidden,
            combine=self.combine,
            row_dtype="bfloat16",
            dispatch_dtype=self.dispatch_dtype,
        )

    @property
    def destinations(self) -> float:
        """Number of ranks that a token goes to on average: K of E experts, E / R on each rank.

        With fewer experts than ranks each is on one rank, and a token goes to K ranks.
        """
        here = max(1.0, self.experts / self.ranks)
        holders = min(self.ranks, self.experts)
        missed = math.prod(
            max(0.0, self.experts - here - k) / (self.experts - k) for k in range(self.choices)
        )
        return holders * (1 - missed)

    @property
    def dispatch_bytes(self) -> float:
        """Rows, once for each rank they go to; slots and weights of every token for every rank."""
        rows = self.tokens * self.destinations * self.layout.row_bytes
        return rows + self.ranks * (self.tokens * self.choices * CHOICE_BYTES + VOTE_BYTES)

    @property
    def combine_bytes(self) -> float:
        """A row for each choice, or for each rank that a token went to."""
        rows = self.choices if self.combine == "per_choice" else self.destinations
        return self.tokens * rows * self.hidden * 2.0

    @property
    def flags_bytes(self) -> int:
        """Bytes of flags in both directions: one word for each peer."""
        return 2 * self.ranks * FLAG_BYTES


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Fitted time of one exchange of one rank: `fixed_us + bytes / rate`."""

    fixed_us: float
    bytes_per_s: float

    def time_us(self, sent_bytes: float) -> float:
        """On one GPU, without a link."""
        return self.fixed_us + sent_bytes / self.bytes_per_s * 1e6

    def linked_us(self, sent_bytes: float, ranks: int, link: LinkSpeed) -> float:
        """Over a link: bytes at the slower of the two, flags or messages one after the other.

        One rank's share of the bytes stays at home; its time is not worth a term.
        """
        rate = min(self.bytes_per_s, link.bytes_per_s)
        return self.fixed_us + link.latency_us + ranks * link.post_us + sent_bytes / rate * 1e6


def silent_peer_us(step_us: float, deadline_us: float, silent: int) -> float:
    """A step in which `silent` peers do not answer: waits for them run at the same time, once a
    step and not once a layer."""
    return step_us + (deadline_us if silent else 0.0)


def bytes_of(load: Load, bench: str) -> float:
    return load.dispatch_bytes if bench == "dispatch" else load.combine_bytes


def measured(records: Sequence[Record], bench: str, **shape) -> dict[int, float]:
    """tokens -> p50 in us of `bench` at the shape, the newest of each."""
    found: dict[int, tuple[str, float]] = {}
    for r in records:
        same = all(r.shape.get(key) == value for key, value in shape.items())
        if r.bench == bench and r.metric == "time p50" and same:
            tokens = r.shape["tokens"]
            found[tokens] = max(found.get(tokens, ("", 0.0)), (r.time, r.value))
    return {tokens: value for tokens, (_, value) in sorted(found.items())}


def fit(times: dict[int, float], bench: str, hidden: int = 7168) -> Kernel:
    """From the two points of FIT_TOKENS. Raises ValueError where they were not measured."""
    if missing := [t for t in FIT_TOKENS if t not in times]:
        raise ValueError(f"{bench}: no result at {missing} tokens; run bench_dispatch_combine")
    few, many = FIT_TOKENS
    sizes = {t: bytes_of(Load(ranks=8, tokens=t, hidden=hidden), bench) for t in FIT_TOKENS}
    rate = (sizes[many] - sizes[few]) / (times[many] - times[few]) * 1e6
    return Kernel(times[few] - sizes[few] / rate * 1e6, rate)


def checked(records: Sequence[Record], bench: str) -> tuple[Kernel, dict[int, tuple[float, float]]]:
    """The kernel, and tokens -> (model, measured) in us at every point that was measured."""
    more = {"dtype": "bfloat16", "hidden": 7168}
    more |= {"combine": "per_choice"} if bench == "combine" else {}
    times = measured(records, bench, **more)
    kernel = fit(times, bench)
    model = lambda tokens: kernel.time_us(bytes_of(Load(ranks=8, tokens=tokens), bench))
    return kernel, {tokens: (model(tokens), value) for tokens, value in times.items()}


def all_results() -> list[Record]:
    return read(sorted(RESULTS.glob("*.jsonl")))


def main() -> int:
    records = all_results()
    kernels = {}
    for bench in ("dispatch", "combine"):
        kernels[bench], points = checked(records, bench)
        kernel = kernels[bench]
        print(f"{bench}: {kernel.fixed_us:.1f} us + bytes / {kernel.bytes_per_s / 1e12:.2f} TB/s")
        for tokens, (model, value) in points.items():
            seen = "fitted" if tokens in FIT_TOKENS else f"{100 * (model / value - 1):+.0f} %"
            print(f"  {tokens:4} tokens: model {model:6.1f} us, measured {value:6.1f} us  {seen}")
    latency = _one(records, "latency p50")
    print(
        f"a step with a silent peer: model {silent_peer_us(latency, 20e3, 1) / 1e3:.1f} ms, "
        f"measured {_one(records, 'latency_silent_peer p50') / 1e3:.1f} ms"
    )
    print("128 tokens, hidden 7168, 256 experts, top 8; us for dispatch + combine per_choice")
    print(f"{'R':>4} {'ranks/token':>11} {'sent MB':>8} {'flags B':>8} {'window MB':>10}", end="")
    print("".join(f"{link.name:>24}" for link in (NVLINK, RDMA)))
    for ranks in RANKS:
        load = Load(ranks=ranks)
        sent = (load.dispatch_bytes + load.combine_bytes) / 1e6
        print(
            f"{ranks:4} {load.destinations:11.2f} {sent:8.1f} {load.flags_bytes:8} "
            f"{load.layout.window_bytes / 1e6:10.0f}",
            end="",
        )
        for link in (NVLINK, RDMA):
            print(f"{total_us(kernels, load, link):24.0f}", end="")
        print()
    return 0


def total_us(kernels: dict[str, Kernel], load: Load, link: LinkSpeed) -> float:
    """Dispatch and combine of one layer."""
    return sum(
        kernels[bench].linked_us(bytes_of(load, bench), load.ranks, link) for bench in kernels
    )


def _one(records: Sequence[Record], metric: str) -> float:
    """The newest `step` record of that metric. Raises ValueError where there is none."""
    found = [r for r in records if r.bench == "step" and r.metric == metric]
    if not found:
        raise ValueError(f"no result step {metric}; run bench_step")
    return max(found, key=lambda r: r.time).value


if __name__ == "__main__":
    command.run(main)
