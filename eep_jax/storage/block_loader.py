"""Loading of arrays from storage, block by block, by several threads, while the caller waits.

A thread takes the next block of whichever array comes first, so that all threads read a single
expert, too. Storage that hangs costs one deadline (`fetcher.py`): what was given up writes nothing
later, except blocks that were read in place; until those end, their memory must not be reused.
"""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from eep_jax.errors import CheckpointError
from eep_jax.storage import digests
from eep_jax.storage.blocks import (
    ArrayTarget,
    Block,
    Files,
    ScratchBuffer,
    Target,
    Worker,
    WriteGate,
)
from eep_jax.storage.fetcher import Fetch, Fetcher


@dataclasses.dataclass(eq=False)
class Job:
    """One array. `blocks()` lists the reads; a worker thread calls it because it may block.

    `digest`: the expected digest of the content, "" for any. `compare`: called with the digest that
    was found, in a worker thread, and may raise. `in_place`: blocks may be read into the target's
    own memory. `error`: why the job failed, once it is done.
    """

    name: str
    blocks: Callable[[], Iterable[Block]]
    target: Target
    digest: str = ""
    in_place: bool = False
    compare: Callable[[str], object] | None = None
    error: Exception | None = None
    _left: int = 1  # blocks, and the list of them
    _found: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def is_checked(self) -> bool:
        return bool(self.digest) or self.compare is not None

    def check(self) -> None:
        """Compares the digests of all blocks, once they are loaded, with what is expected."""
        if self.error is not None or not self.is_checked:
            return
        found = digests.of_blocks(self._found)
        try:
            if self.digest and found != self.digest:
                raise wrong_digest(self.name, found, self.digest)
            if self.compare is not None:
                self.compare(found)
        except Exception as error:
            self.error = error


class BlockLoader:
    """Loads jobs in threads of its own. Not thread-safe."""

    def __init__(self, fetcher: Fetcher | None = None, key: Hashable = "storage"):
        """`fetcher` sets deadline and beat, none by default; reads of one `key` hang together."""
        self._fetcher, self._key = fetcher or Fetcher(), key
        self._runs: list[_Run] = []

    def load(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Yields each job once it is done; failures are in `Job.error`, and none is raised.

        If no block arrives within the deadline, all remaining jobs fail with TimeoutError, and so
        do later ones while the read hangs.
        """
        run = _Run(jobs, self._key)
        self._runs = [*(each for each in self._runs if each.fetch.is_alive), run]
        self._fetcher.start(run.fetch)
        for _ in jobs:
            self._fetcher.wait(run.fetch, run.wait_for_job)
            yield run.done.get()
        run.forget()

    def may_still_write(self, target: Target) -> bool:
        """Whether a read in place that was given up continues, and may write this memory."""
        return any(run.fetch.is_alive and run.may_still_write(target) for run in self._runs)


class _Run:
    """The jobs of one `load`, and the queue that its threads work on."""

    def __init__(self, jobs: Sequence[Job], key: Hashable):
        self._jobs, self.done = jobs, queue.SimpleQueue()
        self._todo = collections.deque((job, -1, None) for job in jobs)
        self._condition = threading.Condition()  # held for moments only
        self._files, self._gate = Files(), WriteGate()
        self._threads = self._working = digests.threads()  # the latter may still add to `_todo`
        self.fetch = Fetch(key, self._work, self._threads)
        self.fetch.add_done_callback(self._ended)

    def wait_for_job(self, seconds: float) -> bool:
        """Waits up to `seconds` for a job in `done`."""
        with self._condition:
            return self._condition.wait_for(lambda: not self.done.empty(), seconds)

    def forget(self) -> None:
        """Releases the arrays: run and fetch refer to each other."""
        if not self._gate.is_closed:
            self._jobs = ()

    def may_still_write(self, target: Target) -> bool:
        in_place = any(job.in_place and job.target == target for job in self._jobs)
        return in_place and self._gate.is_closed

    def _ended(self, fetch: Future) -> None:
        """All threads ended, or the fetch was given up: then no thread may write any more."""
        if (error := fetch.exception()) is None:
            return
        self._gate.close()
        with self._condition:
            self._todo.clear()
            self._working = 0
            for job in self._jobs:
                if job._left > 0:
                    job.error, job._left = job.error or error, 0
                    self.done.put(job)
            self._condition.notify_all()

    def _work(self) -> None:
        worker = Worker(self._files, ScratchBuffer(), self._gate)
        while (item := self._take()) is not None:
            job, number, block = item
            worker.scratch.reset()
            try:
                if block is None:
                    self._announce(job, list(job.blocks()))
                elif job.error is None:
                    job._found[number] = block.load_into(
                        worker, job.target, in_place=job.in_place, checked=job.is_checked
                    )
            except Exception as error:  # whatever storage raises is this job's failure
                with self._condition:
                    job.error = job.error or error
            self._count(job)
        with self._condition:
            self._threads -= 1
            if not self._threads:
                self._files.close()

    def _take(self) -> tuple[Job, int, Block | None] | None:
        """The next block; None once there can be no more."""
        with self._condition:
            self._working -= 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._todo or self._working <= 0)
            if not self._todo:
                return None
            self._working += 1
            return self._todo.popleft()

    def _announce(self, job: Job, blocks: list[Block]) -> None:
        with self._condition:
            if job._left <= 0:
                return  # given up
            job._left += len(blocks)
            job._found = [b""] * len(blocks)
            # In front of later jobs, so that arrays are finished one after the other.
            for number, block in reversed(list(enumerate(blocks))):
                self._todo.appendleft((job, number, block))
            self._condition.notify_all()

    def _count(self, job: Job) -> None:
        self.fetch.progress_s = time.monotonic()
        with self._condition:
            if job._left <= 0:
                return  # given up
            job._left -= 1
            if job._left:
                return
        job.check()  # not under the lock: it may write a file
        with self._condition:
            self.done.put(job)
            self._condition.notify_all()


def wrong_digest(name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name} has digest {found}, the manifest says {expected}; the stored bytes are damaged, "
        "restore them from a copy"
    )


def load_array(array: np.ndarray, name: str, blocks: Callable, digest: str = "") -> np.ndarray:
    """Fills one array, see Job. Raises the error of a read that failed."""
    load_arrays([Job(name, blocks, ArrayTarget(array), digest, in_place=True)])
    return array


def load_arrays(jobs: Sequence[Job]) -> None:
    """Loads all jobs. Raises the first failure; the other arrays may be filled or not."""
    failed = [job for job in BlockLoader().load(jobs) if job.error is not None]
    if failed:
        raise failed[0].error
