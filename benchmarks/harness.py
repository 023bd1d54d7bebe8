"""Records of benchmarks as JSON lines; percentiles; names of the machine and the commit."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
from collections.abc import Iterable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Unfit(Exception):
    """An answer was wrong or a promise was broken, so that a number would mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One number, and all that is needed to read it. See README.md beside this file."""

    bench: str
    metric: str
    value: float
    unit: str
    device: str
    ranks: int
    shape: Mapping  # sizes of the model and of the load; `samples` is how many were measured
    bound: float | None = None  # what cannot be beaten, in the same unit
    baseline: float | None = None  # what it is compared with, in the same unit
    ratio: float | None = None  # value / baseline
    jax: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("jax"))
    commit: str = dataclasses.field(default_factory=lambda: commit())
    time: str = dataclasses.field(default_factory=lambda: now())

    def __post_init__(self):
        for name in ("value", "bound", "baseline", "ratio"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{self.bench} {self.metric}: {name}={number} must be finite")


def compared(baseline: float | None, value: float) -> dict:
    """The fields `baseline` and `ratio` of a Record. `compared(10.0, 0.5)`: ratio 0.05."""
    return {"baseline": baseline, "ratio": value / baseline if baseline else None}


@dataclasses.dataclass
class Sheet:
    """Records of one run, and what they have in common; commit and time are those of its start."""

    bench: str
    device: str
    ranks: int
    shape: Mapping
    records: list[Record] = dataclasses.field(default_factory=list)
    commit: str = dataclasses.field(default_factory=lambda: commit())
    time: str = dataclasses.field(default_factory=lambda: now())

    def add(
        self,
        metric: str,
        value: float,
        unit: str = "",
        *,
        bench: str | None = None,
        bound: float | None = None,
        baseline: float | None = None,
        **shape,
    ) -> Record:
        """Adds a record; `shape` is added to the common shape."""
        record = Record(
            bench=bench or self.bench,
            metric=metric,
            value=value,
            unit=unit,
            device=self.device,
            ranks=self.ranks,
            shape={**self.shape, **shape},
            bound=bound,
            commit=self.commit,
            time=self.time,
            **compared(baseline, value),
        )
        self.records.append(record)
        return record

    def of(self, bench: str | None = None, **shape) -> "Sheet":
        """A sheet with the same list of records, for another bench or with more in its shape."""
        return dataclasses.replace(self, bench=bench or self.bench, shape={**self.shape, **shape})


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` % of them do not exceed (nearest rank).

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 90)
    (2.0, 4.0)
    """
    if not values or not 0 < percent <= 100:
        raise ValueError(f"{percent=} of {len(values)} values: need 0 < percent <= 100 and a value")
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def append(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Adds one line for each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def read(paths: Iterable[pathlib.Path]) -> list[Record]:
    """All records of these files, in their order. Raises ValueError naming a malformed line."""
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a record: {error}") from error
    return records


def cpu_device() -> str:
    """Such as "cpu, 2 cores, AMD EPYC"; the cores are those this process may use."""
    cores = len(os.sched_getaffinity(0))
    return f"cpu, {cores} core{'s' if cores > 1 else ''}, {_cpu_model()}"


def gpu_device(gpu: str = "0") -> str:
    """The name of a GPU as JAX has it, such as "NVIDIA H100 80GB HBM3"; does not load JAX."""
    return nvidia_smi("name", gpu) or "unknown GPU"


def nvidia_smi(quantity: str, gpu: str = "0") -> str:
    """The value of a quantity by nvidia-smi, without unit; "" if it does not answer."""
    query = [f"--query-gpu={quantity}", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        run = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    return lines[0].strip() if lines else ""


def _cpu_model() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown model")


def commit() -> str:
    """The measured commit, with a + where files differ from it.

    EEP_COMMIT names it on a machine without a checkout; otherwise it is empty there.
    """
    if given := os.environ.get("EEP_COMMIT"):
        return given

    def git(*words: str) -> str:
        try:
            run = subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
            )
        except FileNotFoundError:
            return ""
        return run.stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain") else "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
