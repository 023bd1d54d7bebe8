"""Compiled steps of one test run, kept for later clusters of the same shapes.

A rank compares all facts of a step before it loads it (`engine/executables.py`), so a step of
another shape, or of other sources, is compiled anew.
"""

import contextlib
import functools
import hashlib
import pathlib
import shutil
import tempfile

from eep_jax.runtime.rank.scratch_dir import open_scratch
from launch.rank import EXECUTABLES

SHAPES = ("ranks", "slots_per_rank")  # fields of the cluster that a step depends on
ELSEWHERE = ("--port=", "--override=serve.", "--override=checkpoint=")


@contextlib.contextmanager
def shared_steps(run_dir: pathlib.Path, ranks: int, words: list[str]):
    """Gives a cluster with these flags what an earlier one compiled; keeps what it compiles."""
    ours = pathlib.Path(run_dir) / EXECUTABLES
    kept = _directory() / _key(ranks, words)
    if kept.exists():
        shutil.copytree(kept, ours)
        ours.chmod(0o700)
    try:
        yield
    finally:
        if ours.exists() and not kept.exists():
            shutil.copytree(ours, kept, ignore=lambda _, names: _but_steps(names))


@functools.cache
def _directory() -> pathlib.Path:
    return open_scratch(tempfile.gettempdir(), "steps").path


def _key(ranks: int, words: list[str]) -> str:
    """A name for all clusters whose steps are the same."""
    shaping = sorted(word for word in words if _is_of_the_step(word))
    return hashlib.sha256(repr((ranks, shaping)).encode()).hexdigest()[:16]


def _is_of_the_step(word: str) -> bool:
    if word.startswith("--override=cluster."):
        return word.startswith(tuple(f"--override=cluster.{field}=" for field in SHAPES))
    return not word.startswith(ELSEWHERE)


def _but_steps(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".step")]
