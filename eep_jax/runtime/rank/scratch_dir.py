"""Scratch directory that is removed when its process ends, even by SIGKILL."""

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
KEPT = "kept"  # a file of this name lets a directory stay


HELPER = f'trap "" TERM INT HUP; read -r line; [ "$line" = {KEPT} ] || rm -rf -- "$0"'


@dataclasses.dataclass(frozen=True)
class Scratch:
    """`path` is removed once every copy of the descriptor `life` is closed."""

    path: pathlib.Path
    life: int

    def close(self) -> None:
        """Lets the helper remove the directory."""
        os.close(self.life)

    def remove(self) -> None:
        """Removes the directory before it returns."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def keep(self) -> None:
        """Lets the directory stay for good."""
        (self.path / KEPT).touch()
        os.write(self.life, KEPT.encode() + b"\n")
        self.close()


def open_scratch(parent: str | os.PathLike, name: str) -> Scratch:
    """A fresh directory in `parent` that only this user may read.

    A helper process waits for the end of this one and removes it. Directories whose helpers were
    killed as well are removed here. Raises OSError if `parent` is not writable.
    """
    parent = pathlib.Path(parent)
    sweep(parent)
    prefix = f"{PREFIX}-{name}-{_boot()}-{os.getpid()}-{start_ticks(os.getpid())}-"
    path = tempfile.mkdtemp(prefix=prefix, dir=parent)
    ours, life = os.pipe()
    try:
        subprocess.Popen(
            # Ignores signals to a whole job, such as those of scancel.
            ["/bin/sh", "-c", HELPER, path],
            stdin=ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it outlives this process
            close_fds=True,
        )
    except OSError:
        os.close(life)
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        os.close(ours)
    return Scratch(pathlib.Path(path), life)


@contextlib.contextmanager
def scratch(parent: str | os.PathLike, name: str):
    """A scratch directory for the body, yielded as its path."""
    found = open_scratch(parent, name)
    try:
        yield found.path
    finally:
        found.remove()


def sweep(parent: str | os.PathLike) -> None:
    """Removes scratch directories of ended processes of this machine."""
    for path in pathlib.Path(parent).glob(f"{PREFIX}-*-{_boot()}-*"):
        with contextlib.suppress(ValueError):
            pid, ticks = map(int, path.name.split("-")[-3:-1])
            if start_ticks(pid) != ticks and not (path / KEPT).exists():
                shutil.rmtree(path, ignore_errors=True)


def _boot() -> str:
    """Equal for processes that share a pid namespace."""
    return hashlib.sha256(boot_id().encode()).hexdigest()[:12]
