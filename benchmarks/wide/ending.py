"""How a benchmark of several processes ends: what it shows, keeps and tells."""

import pathlib
import shutil
from collections.abc import Callable, Sequence

from benchmarks.harness import Record, append
from launch.console import say


def finish(
    records: Sequence[Record],
    problems: Sequence[str],
    show: Callable[[], None],
    *,
    out: str | None,
    temporary: pathlib.Path | None,
) -> int:
    """The exit status. Records are shown and appended to `out` whatever else went wrong.

    `temporary` is a directory of logs that is removed where nothing did.
    """
    if records:
        show()
        if out:
            append(pathlib.Path(out), records)
            say(f"appended {len(records)} records to {out}")
    for problem in problems:
        say(problem, "bold red")
    if temporary is not None and not problems:
        shutil.rmtree(temporary, ignore_errors=True)
    return 1 if problems else 0
