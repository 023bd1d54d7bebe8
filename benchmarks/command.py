"""The command line that all benchmarks share: flags, the end of a run, and tables on a terminal."""

import pathlib
from collections.abc import Callable, Iterable, Sequence

from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Record, Unfit, append
from eep_jax.config import RunConfig
from launch import flags, program
from launch.console import say
from launch.errors import UsageError


def define() -> None:
    """--out. Flags are defined by the started program only, not by modules that it imports."""
    absl_flags.DEFINE_string(
        "out", None, "File to append the records to. Without it only the report is printed."
    )


def define_gpu() -> None:
    """Flags of the benchmarks of one GPU: --out, --quick and --shapes."""
    define()
    absl_flags.DEFINE_bool("quick", False, "Few shapes and samples, to see that everything works.")
    absl_flags.DEFINE_list(
        "shapes", None, "Only these sizes: tokens of each rank, or rows of each expert, as 16,128."
    )


def define_machine() -> None:
    """Flags of the benchmarks of several processes: --out, --platform and --ranks."""
    define()
    absl_flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "What ranks compute on.")
    absl_flags.DEFINE_integer(
        "ranks", None, "How many ranks. Without it one for each GPU, or two on CPU.", 1
    )


def run(main: Callable[[], Sequence[Record] | int]) -> None:
    """Runs a benchmark and ends the process.

    Args:
        main: Returns its records, which are appended to --out, or an exit status. It raises Unfit
            where a number would mean nothing; then nothing is kept and the status is 1.
    """

    def guarded() -> int:
        try:
            found = main()
        except Unfit as error:
            say(f"no result: {error}", "bold red")
            return 1
        return found if isinstance(found, int) else keep(found)

    program.run(guarded)


def keep(records: Sequence[Record]) -> int:
    """Appends records to --out, if given; returns status 0."""
    out = absl_flags.FLAGS.out
    if out and records:
        append(pathlib.Path(out), records)
        say(f"appended {len(records)} records to {out}")
    return 0


def config_flags(default: str) -> list[str]:
    """--config, `default` if it is not given, and --override, for another process."""
    name = flags.CONFIG.value if absl_flags.FLAGS["config"].present else default
    return [f"--config={name}", *(f"--override={text}" for text in flags.OVERRIDE.value)]


def config(default: str) -> RunConfig:
    """The configuration of --config, `default` if it is not given, with --override."""
    name = config_flags(default)[0].partition("=")[2]
    return flags.override(flags.load_config(name), *flags.OVERRIDE.value)


def numbers(flag: str, every: tuple[int, ...]) -> tuple[int, ...]:
    """The positive numbers that a list flag holds, `every` without it. Raises UsageError."""
    words = absl_flags.FLAGS[flag].value
    if words is None:
        return every
    if not words or not all(word.strip().isdecimal() and int(word) for word in words):
        raise UsageError(f"--{flag}={','.join(words)} must be positive numbers, as 16,128")
    return tuple(map(int, words))


def among(flag: str, every: Sequence[str]) -> list[str]:
    """The names that a list flag holds, in the order of `every`; `every` without it.

    Raises UsageError for others.
    """
    chosen = absl_flags.FLAGS[flag].value or every
    if unknown := sorted(set(chosen) - set(every)):
        raise UsageError(f"--{flag}: {unknown} are not among {list(every)}")
    return [name for name in every if name in chosen]


def show(title: str, columns: str, rows: Iterable[Sequence[str]], width: int = 130) -> None:
    """Prints a table. `columns` are names separated by `|`; `>` marks those of numbers."""
    table = Table(title=title, title_justify="left")
    for name in columns.split("|"):
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=width).print(table, markup=False)


def number(value: float | None, form: str = ".4g") -> str:
    """The value in this format; "" for None."""
    return "" if value is None else f"{value:{form}}"


def verdict(reached: bool) -> str:
    """The word for an aim that was reached, or missed."""
    return "reached" if reached else "MISSED"
