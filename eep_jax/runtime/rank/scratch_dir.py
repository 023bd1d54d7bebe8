"""A directory in memory that goes when its process does, however that ends."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from eep_jax.runtime.control.identity import boot_id, start_ticks

PREFIX = "eep"


@dataclasses.dataclass(frozen=True)
class Scratch:
    """`path` is removed once every copy of the descriptor `life` is closed."""

    path: pathlib.Path
    life: int

    def close(self) -> None:
        os.close(self.life)


def open_scratch(parent: pathlib.Path, name: str) -> Scratch:
    """A fresh directory in `parent` that only this user may read.

    A helper waits for the end of this process and removes it. What processes left whose helper was
    killed, too, is removed here. Raises OSError where `parent` cannot be written to.
    """
    sweep(parent)
    prefix = f"{PREFIX}-{name}-{_boot()}-{os.getpid()}-{start_ticks(os.getpid())}-"
    path = tempfile.mkdtemp(prefix=prefix, dir=parent)
    ours, life = os.pipe()
    try:
        subprocess.Popen(
            # What asks all processes of a job to end (scancel) asks this one, too: it waits on.
            ["/bin/sh", "-c", 'trap "" TERM INT HUP; read -r line; rm -rf -- "$0"', path],
            stdin=ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it outlives what ends this process
            close_fds=True,
        )
    except OSError:
        os.close(life)
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        os.close(ours)
    return Scratch(pathlib.Path(path), life)


def sweep(parent: pathlib.Path) -> None:
    """Removes scratch directories of processes of this machine that have ended."""
    for path in pathlib.Path(parent).glob(f"{PREFIX}-*-{_boot()}-*"):
        with contextlib.suppress(ValueError):
            pid, ticks = map(int, path.name.split("-")[-3:-1])
            if start_ticks(pid) != ticks:
                shutil.rmtree(path, ignore_errors=True)


def _boot() -> str:
    """Same for processes whose pids mean the same."""
    return hashlib.sha256(boot_id().encode()).hexdigest()[:12]
