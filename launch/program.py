"""Frame of every program: its flags, --help and --version, and errors of usage in one line."""

import functools
import importlib.metadata
import re
import shutil
import sys
import textwrap
from collections.abc import Callable

from absl import app, flags

import eep_jax
from eep_jax.errors import CheckpointError, RunDirError
from eep_jax.runtime.control.last_words import last_words
from launch.errors import UsageError

EXIT_USAGE = 2
_OWN_PACKAGES = ("launch", "benchmarks")
_COLUMNS_MAX = 100

_groups: dict[str, str] = {}  # name of a flag -> title of its group in --help


def group(title: str, *holders: flags.FlagHolder) -> None:
    """Shows these flags under `title` in --help; others come first, as the program's own."""
    _groups.update((holder.name, title) for holder in holders)


def run(main: Callable[[], int]) -> None:
    """Parses sys.argv, runs `main`, and ends the process with the status that it returns.

    Adds --help and --version. Errors of usage are one line and status 2.
    """
    _define_help(main)
    app.run(main_with_usage(main), flags_parser=_parse)


def runner(main: Callable[[], int]) -> Callable[[], None]:
    """The entry point of a console script, which runs `main`."""
    return functools.partial(run, main)


def main_with_usage(main: Callable[[], int]) -> Callable[[list[str]], int]:
    """`main` as absl calls it; errors of usage are one line and status 2."""

    def wrapped(arguments: list[str]):
        if len(arguments) > 1:
            print(f"unexpected arguments {arguments[1:]}; options begin with --", file=sys.stderr)
            return EXIT_USAGE
        try:
            return main()
        except (UsageError, CheckpointError, RunDirError) as error:
            print_end(str(error))
            return EXIT_USAGE

    return wrapped


def print_end(reason: str) -> None:
    """Prints why this process ends; a launcher's child marks it as its last words."""
    has_parent = "parent_pid" in flags.FLAGS and flags.FLAGS["parent_pid"].value
    print(f"error: {last_words(reason) if has_parent else reason}", file=sys.stderr, flush=True)


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raises UsageError naming the extra to install where an optional package is missing."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"{purpose} needs {package}, which is not installed; install the extra {extra!r}: "
            f"pip install 'eep-jax[{extra}]', or pip install '.[{extra}]' in the repository"
        ) from None


def help_text(description: str) -> str:
    """The description, then all flags that the program defines, by group, with their defaults."""
    values, columns = flags.FLAGS, min(_COLUMNS_MAX, shutil.get_terminal_size().columns)
    groups: dict[str, list[flags.Flag]] = {"Flags": []}
    for title in _groups.values():
        groups.setdefault(title, [])
    for module, defined in values.flags_by_module_dict().items():
        if module == sys.argv[0] or module.partition(".")[0] in _OWN_PACKAGES:
            for flag in (f for f in defined if not isinstance(f, _Printing)):
                groups[_groups.get(flag.name, "Flags")].append(flag)
    lines = [description.strip()]
    for title, defined in groups.items():
        lines += ["", f"{title}:"] if defined else []
        for flag in defined:
            lines += [_usage(flag), *_meaning(flag, columns)]
    return "\n".join(
        [*lines, "", "Also: --help, --version, --flagfile=FILE (a file of flags, one per line)."]
    )


def _usage(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"  --[no]{flag.name}"
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        return f"  --{flag.name}={'|'.join(choices)}"
    kind = flag.flag_type()  # such as "int", "multi string", "comma separated list of strings"
    return f"  --{flag.name}={'LIST' if 'list' in kind else kind.split()[-1].upper()}"


def _meaning(flag: flags.Flag, columns: int) -> list[str]:
    """What the flag does, its limits, and its default or that it is required."""
    # absl puts the choices before, and a remark on repetition after what was written.
    text = re.sub(r"^<[^>]*>: |;\s+repeat this option .*$", "", flag.help)
    notes = [flag.parser.syntactic_help] if hasattr(flag.parser, "lower_bound") else []
    if any("other than None" in validator.message for validator in flag.validators):
        notes.append("required")
    elif flag.default not in (None, "", []):
        notes.append(f"default: {flag.default_as_str.strip(chr(39))}")
    text += f" ({'; '.join(notes)})" if notes else ""
    return textwrap.wrap(text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6)


class _Printing(flags.BooleanFlag):
    """A flag that prints a text and ends the program with status 0."""

    def __init__(self, name: str, text: Callable[[], str], meaning: str, short: str | None = None):
        super().__init__(name, False, meaning, short_name=short, allow_override=True)
        self._text = text

    def parse(self, argument):
        if self._parse(argument):
            print(self._text())
            sys.exit(0)


def _define_help(main: Callable[[], int]) -> None:
    """Takes the place of absl's --help, which lists the flags of one module and exits with 1."""
    app.define_help_flags()
    # A console script has no docstring; a benchmark's main is wrapped in another module.
    described = sys.modules["__main__"].__doc__ or sys.modules[main.__module__].__doc__ or ""
    text = lambda: help_text(described)
    for name, short in (("help", "h"), ("helpshort", None), ("helpfull", None)):
        flags.DEFINE_flag(_Printing(name, text, "Shows this help.", short))
    version = lambda: f"eep-jax {eep_jax.__version__}"
    flags.DEFINE_flag(_Printing("version", version, "Shows the version."))


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
        said = f"missing {', '.join(missing)}" if missing else str(error)
        print(f"error: {said}; --help lists all flags", file=sys.stderr)
        sys.exit(EXIT_USAGE)
