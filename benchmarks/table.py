"""Writes the tables of results, from the newest record of each metric.

python -m benchmarks.table

README.md gets the first rows of headlines.md, benchmarks/README.md all of them, both between
<!-- results --> and <!-- /results -->; benchmarks/results/README.md gets all metrics of all shapes.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import RESULTS, ROOT, Record, read
from benchmarks.serving.series import SERIES
from launch import flags

HEADLINES = pathlib.Path(__file__).parent / "headlines.md"
README = absl_flags.DEFINE_string("readme", str(ROOT / "README.md"), "File with the markers.")
# The last word of a metric; "" is a single value.
STATISTICS = ("", "mean", "p50", "p90", "p95", "p99", "max")
DERIVED = ("weights_rate", "flop_rate")  # other forms of a time that is in the table
FRONT = "## In README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclasses.dataclass(frozen=True)
class Headline:
    """A row of headlines.md. No row is shown where there is no such record."""

    says: str  # may name entries of the shape, as {layers}
    bench: str
    metric: str
    shape: Mapping
    beside: str  # what the bound is, or the baseline; "" shows neither
    baseline: bool  # the baseline although there is a bound
    front: bool  # whether README.md shows it

    def compared(self, record: Record) -> float | None:
        """The value that the record is shown beside, in its unit."""
        if not self.beside:
            return None
        use_bound = record.bound is not None and not self.baseline
        return record.bound if use_bound else record.baseline

    def find(self, records: Iterable[Record]) -> Record | None:
        """The newest record of this row."""
        fits = lambda r: all(r.shape.get(key) == value for key, value in self.shape.items())
        of_metric = (r for r in records if (r.bench, r.metric) == (self.bench, self.metric))
        return max(filter(fits, of_metric), key=lambda r: r.time, default=None)


def read_headlines() -> list[Headline]:
    """The rows of headlines.md."""
    found, front = [], False
    for line in HEADLINES.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            front = line == FRONT
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[0] in ("says", "---"):
            continue
        says, bench, metric, words, beside = cells
        pairs = (word.partition("=")[::2] for word in words.split())
        shape = {name: int(value) if value.isdecimal() else value for name, value in pairs}
        by_baseline = beside.startswith("~")
        found.append(Headline(says, bench, metric, shape, beside.lstrip("~"), by_baseline, front))
    return found


def newest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each metric, by device, ranks and shape, in the order of first sight."""
    found: dict[tuple, Record] = {}
    for record in records:
        shape = {k: v for k, v in record.shape.items() if k != "samples"}
        key = (
            record.device,
            record.bench,
            record.metric,
            record.ranks,
            json.dumps(shape, sort_keys=True),
        )
        if key not in found or record.time >= found[key].time:
            found[key] = record
    return list(found.values())


def render(records: Iterable[Record]) -> str:
    """A Markdown table for each device, under its name; curves are for plots."""
    by_device: dict[str, list[Record]] = {}
    for record in newest(r for r in records if r.metric not in SERIES):
        by_device.setdefault(record.device, []).append(record)
    return "\n\n".join(_render_device(device, of) for device, of in by_device.items())


def render_headlines(records: Iterable[Record], front: bool = False) -> str:
    """A Markdown table of the headlines for each device; of those of README.md if `front`."""
    headlines = [line for line in read_headlines() if line.front or not front]
    by_device: dict[str, list[Record]] = {}
    for record in records:
        by_device.setdefault(record.device, []).append(record)
    tables = []
    for device, of in by_device.items():
        lines = [_headline(line, found) for line in headlines if (found := line.find(of))]
        if lines:
            heads = [_row(["what", "measured", "beside it", "commit"]), _row(["---"] * 4)]
            tables.append("\n".join([f"Device: {device}", "", *heads, *lines]))
    return "\n\n".join(tables)


def _headline(line: Headline, record: Record) -> str:
    other, beside = line.compared(record), ""
    if other:
        beside = f"{line.beside}: {_number(other)} {record.unit}, x {_number(record.value / other)}"
    measured = f"{_number(record.value)} {record.unit}".strip()
    return _row([line.says.format(**record.shape), measured, beside, record.commit])


def insert(text: str, table: str) -> str:
    """`text` with `table` between the markers. Raises ValueError where they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"needs a line {BEGIN} and after it a line {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _render_device(device: str, records: list[Record]) -> str:
    """One row for each quantity and shape; the statistics of it that were recorded are columns."""
    rows: dict[tuple, dict[str, Record]] = {}
    for record in records:
        quantity, statistic = split_metric(record.metric)
        if quantity not in DERIVED:
            shape = json.dumps(dict(record.shape), sort_keys=True)
            rows.setdefault((record.bench, quantity, record.ranks, shape), {})[statistic] = record
    used = [name for name in STATISTICS if any(name in row for row in rows.values())]
    bounded = any(record.bound is not None for row in rows.values() for record in row.values())
    heads = ["bench", "metric", *(name or "value" for name in used), "unit"]
    heads += ["bound"] * bounded + ["baseline", "ratio"]
    lines = [f"Device: {device}", "", _row([*heads, "ranks", "n", "commit"])]
    lines.append(
        _row(["---", "---", *["---:"] * len(used), "---", *["---:"] * (4 + bounded), "---"])
    )
    differing = _what_differs([next(iter(row.values())) for row in rows.values()])
    for (bench, quantity, ranks, _), row in rows.items():
        first = next(iter(row.values()))  # the median where there is one: what is compared
        values = [_number(row[name].value) if name in row else "" for name in used]
        compared = [_number(first.bound)] * bounded
        compared += [_number(first.baseline), _number(first.ratio)]
        samples = str(first.shape.get("samples", ""))
        metric = " ".join(
            [quantity, *(f"{k}={first.shape[k]}" for k in differing[bench] if k in first.shape)]
        )
        cells = [bench, metric, *values, first.unit, *compared, str(ranks), samples, first.commit]
        lines.append(_row(cells))
    return "\n".join(lines)


def _what_differs(records: list[Record]) -> dict[str, list[str]]:
    """For each bench the keys of a shape that are not the same in all of its rows."""
    found: dict[str, list[str]] = {}
    for bench in dict.fromkeys(record.bench for record in records):
        shapes = [record.shape for record in records if record.bench == bench]
        keys = dict.fromkeys(key for shape in shapes for key in shape if key != "samples")
        differs = lambda key: len({json.dumps(shape.get(key)) for shape in shapes}) > 1
        found[bench] = [key for key in keys if differs(key)]
    return found


def split_metric(metric: str) -> tuple[str, str]:
    """Returns (quantity, statistic): `pause p90` is ("pause", "p90"), `bytes` is ("bytes", "")."""
    head, _, last = metric.rpartition(" ")
    return (head.strip(), last) if last in STATISTICS else (metric.strip(), "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent: 0.0123, 1,230; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def main() -> int:
    records = read(sorted(RESULTS.glob("*.jsonl")))
    readmes = (pathlib.Path(README.value), True), (HEADLINES.with_name("README.md"), False)
    for readme, front in readmes:
        try:
            text = insert(readme.read_text(encoding="utf-8"), render_headlines(records, front))
        except (OSError, ValueError) as error:
            raise flags.UsageError(f"{readme}: {error}") from error
        readme.write_text(text, encoding="utf-8")
    (RESULTS / "README.md").write_text(f"# All results\n\n{render(records)}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    command.run(main)
