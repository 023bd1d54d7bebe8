"""Flags that the benchmarks of the GPU's kernels have in common."""

from absl import flags

from launch.flags import UsageError


def define() -> None:
    """Of the process that is started, not of one that imports a benchmark."""
    flags.DEFINE_string("out", None, "File of records to append to; none: only the table.")
    flags.DEFINE_bool("quick", False, "Few shapes and samples, to see that all is well.")
    flags.DEFINE_list(
        "shapes", None, "Only these sizes: tokens of each rank, or rows of each expert, as 16,128."
    )


def sizes(every: tuple[int, ...], few: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that --shapes names, else `few` with --quick, else all.

    Raises UsageError for what is no positive number.
    """
    words = flags.FLAGS.shapes
    if words is None:
        return few if flags.FLAGS.quick else every
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise UsageError(f"--shapes={','.join(words)} must be positive numbers, as 16,128")
    return tuple(int(word) for word in words)
