"""Writes the table of results into README.md, from the newest record of each metric.

python -m benchmarks.table      # rewrites what is between <!-- results --> and <!-- /results -->
"""

import json
import pathlib
import sys
from collections.abc import Iterable

from absl import app
from absl import flags as absl_flags

from benchmarks.harness import RESULTS, ROOT, Record, read
from launch import flags

README = absl_flags.DEFINE_string("readme", str(ROOT / "README.md"), "File with the markers.")
STATISTICS = ("", "p50", "p90", "p99", "max")  # as the last word of a metric; "" is a single value
BEGIN, END = "<!-- results -->", "<!-- /results -->"


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
    """A Markdown table for each device, under its name."""
    by_device: dict[str, list[Record]] = {}
    for record in newest(records):
        by_device.setdefault(record.device, []).append(record)
    return "\n\n".join(_render_device(device, of) for device, of in by_device.items())


def insert(text: str, table: str) -> str:
    """`text` with `table` between the markers. Raises ValueError where they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"needs a line {BEGIN} and after it a line {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _render_device(device: str, records: list[Record]) -> str:
    """One row for each quantity; the statistics of it that were recorded are columns."""
    rows: dict[tuple, dict[str, Record]] = {}
    for record in records:
        quantity, statistic = split_metric(record.metric)
        shape = json.dumps(dict(record.shape), sort_keys=True)
        rows.setdefault((record.bench, quantity, record.ranks, shape), {})[statistic] = record
    used = [name for name in STATISTICS if any(name in row for row in rows.values())]
    heads = ["bench", "metric", *(name or "value" for name in used), "unit", "baseline", "ratio"]
    lines = [f"Device: {device}", "", _row([*heads, "ranks", "n", "commit"])]
    lines.append(_row(["---", "---", *["---:"] * len(used), "---", *["---:"] * 4, "---"]))
    for (bench, quantity, ranks, _), row in rows.items():
        first = next(iter(row.values()))  # the median where there is one: what is compared
        values = [_number(row[name].value) if name in row else "" for name in used]
        compared = [_number(first.baseline), _number(first.ratio)]
        samples = str(first.shape.get("samples", ""))
        cells = [bench, quantity, *values, first.unit, *compared, str(ranks), samples, first.commit]
        lines.append(_row(cells))
    return "\n".join(lines)


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
    readme = pathlib.Path(README.value)
    try:
        table = render(read(sorted(RESULTS.glob("*.jsonl"))))
        text = insert(readme.read_text(encoding="utf-8"), table)
    except (OSError, ValueError) as error:
        raise flags.UsageError(f"{readme}: {error}") from error
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(app.run(flags.main_with_usage(main)))
