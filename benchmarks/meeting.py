"""Meeting of a benchmark's processes: small JSON files in a directory that all of them see."""

import json
import pathlib
import time
from collections.abc import Callable

POLL_S = 0.001


class Meeting:
    """One rank's view. Every wait ends after `deadline_s` with a TimeoutError that names the file.

    Each name is used once: the files stay and show afterwards how far a rank came.
    """

    def __init__(self, directory: pathlib.Path, rank: int, ranks: int, deadline_s: float):
        self.directory, self.rank, self.ranks = directory, rank, ranks
        self._deadline_s = deadline_s
        directory.mkdir(parents=True, exist_ok=True)

    def share(self, name: str, value=None) -> list:
        """Publishes a value; waits for those of all ranks and returns them by rank."""
        part = self.directory / f"{name}.{self.rank}.part"
        part.write_text(json.dumps(value))
        part.rename(self.directory / f"{name}.{self.rank}")
        ends_s = time.monotonic() + self._deadline_s
        return [self._read(self.directory / f"{name}.{rank}", ends_s) for rank in range(self.ranks)]

    def _read(self, path: pathlib.Path, ends_s: float):
        while not path.exists():
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{path} was not written within {self._deadline_s:.0f} s")
            time.sleep(POLL_S)
        return json.loads(path.read_text())

    def open_heap(self, name: str, slab_bytes: int, fill: Callable = lambda heap: None):
        """A heap with all peers attached; each rank runs `fill(heap)` before peers attach it."""
        import jax

        from eep_jax.heap.open import open_heap

        heap = open_heap(self.rank, self.ranks, slab_bytes, jax.default_backend())
        fill(heap)
        for peer, handle in enumerate(self.share(f"{name}.handle", heap.export())):
            if peer != self.rank:
                heap.attach(peer, handle)
        self.share(f"{name}.attached")
        return heap


def meeting_of(directory: pathlib.Path, rank: int, job: dict) -> Meeting:
    """The meeting of a job's workers; sets JAX up as they need it."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != job["platform"]:
        raise RuntimeError(f"JAX computes on {jax.default_backend()}, not on {job['platform']}")
    return Meeting(directory / "meeting", rank, job["ranks"], job["deadline_s"])


def join_mesh(coordinator: str, ranks: int, rank: int, deadline_s: int = 120, **more) -> None:
    """Joins jax.distributed: Gloo on CPU, NCCL on GPUs. Call it before JAX computes."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, ranks, rank, initialization_timeout=deadline_s, **more)


def release(heap) -> None:
    """Frees the memory of a heap; on a GPU `close` alone would leave it mapped."""
    heap.release() if hasattr(heap, "release") else heap.close()
