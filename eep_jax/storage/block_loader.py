"""Several threads bring arrays from storage, block by block, while the caller waits and watches.

A thread takes the next block of whichever array comes first, so a single expert is read by all
threads, too. Storage that hangs costs one deadline: what was given up writes nothing later, except
blocks that were read in place, and until those end nobody else may use that memory.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

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

BEAT_S = 0.05


@dataclasses.dataclass(eq=False)
class Job:
    """One array: `blocks()` says what to read, and is asked in a thread, for it may hang.

    `digest` is the name that its content must have, "" for any. `in_place`: it may be read into the
    target's own memory. `error` is why it failed, once it is done.
    """

    name: str
    blocks: Callable[[], Iterable[Block]]
    target: Target
    digest: str = ""
    in_place: bool = False
    error: Exception | None = None
    _left: int = 1  # blocks, and the list of them
    _found: list[bytes] = dataclasses.field(default_factory=list)


class BlockLoader:
    """Loads jobs. Of one thread, and starts others. Raises nothing: see `Job.error`."""

    def __init__(self, deadline_ms: float = float("inf"), beat: Callable[[], None] = lambda: None):
        """`beat` is called while it waits. Where no block comes within `deadline_ms`, all that is
        left fails with TimeoutError, and so does everything later, as long as the read hangs."""
        self._deadline_s, self._beat = deadline_ms / 1000, beat
        self._given_up: list[_Run] = []

    def load(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Yields each job when it is done. Ask until the end."""
        for run in self._given_up:
            run.end()
        self._given_up = [run for run in self._given_up if run.is_alive]
        run = _Run(jobs)
        if self._given_up:
            run.fail_all(TimeoutError("an earlier read from it still hangs"))
        else:
            run.start()
        moved_s, progress = time.monotonic(), 0
        for _ in jobs:
            while (job := run.next_done(BEAT_S)) is None:
                self._beat()
                now_s = time.monotonic()
                if run.progress != progress:
                    progress, moved_s = run.progress, now_s
                elif now_s - moved_s > self._deadline_s:
                    run.give_up(f"it took longer than {self._deadline_s * 1000:.0f} ms")
                    self._given_up.append(run)
            moved_s = time.monotonic()
            yield job
        run.end()

    def may_still_write(self, target: Target) -> bool:
        """Whether a read in place that was given up goes on, and may end in this memory."""
        return any(run.is_alive and run.writes(target) for run in self._given_up)


class _Run:
    """Threads and what is left for them. Its lock is held for moments only."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs = jobs
        self._todo = collections.deque((job, -1, None) for job in jobs)
        self._condition, self._done = threading.Condition(), collections.deque()
        self._files, self._gate = Files(), WriteGate()
        self._threads: list[threading.Thread] = []
        self._working = 0  # threads that may still add to `_todo`
        self._is_over = False
        self.progress = 0

    @property
    def is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        for number in range(digests.threads()):
            thread = threading.Thread(target=self._work, name=f"load {number}", daemon=True)
            self._threads.append(thread)
        self._working = len(self._threads)
        for thread in self._threads:
            thread.start()

    def next_done(self, timeout_s: float) -> Job | None:
        with self._condition:
            self._condition.wait_for(lambda: self._done, timeout_s)
            return self._done.popleft() if self._done else None

    def give_up(self, why: str) -> None:
        self._gate.close()
        self.fail_all(TimeoutError(why))

    def fail_all(self, error: Exception) -> None:
        with self._condition:
            self._is_over = True
            self._todo.clear()
            for job in self._jobs:
                if job._left > 0:
                    job.error, job._left = job.error or error, 0
                    self._done.append(job)
            self._condition.notify_all()

    def end(self) -> None:
        """Closes files; a thread that hangs keeps them until it ends."""
        for thread in self._threads:
            if not self._gate.is_closed:
                thread.join()
        if not self.is_alive:
            self._files.close()

    def writes(self, target: Target) -> bool:
        return any(job.in_place and job.target == target for job in self._jobs)

    def _work(self) -> None:
        worker = Worker(self._files, ScratchBuffer(), self._gate)
        while (item := self._take()) is not None:
            job, number, block = item
            worker.room.reset()
            try:
                if block is None:
                    self._announce(job, list(job.blocks()))
                elif job.error is None:
                    job._found[number] = block.carry(
                        worker, job.target, in_place=job.in_place, checked=bool(job.digest)
                    )
            except Exception as error:  # whatever storage raises is this job's failure
                with self._condition:
                    job.error = job.error or error
            self._count(job)

    def _take(self):
        """The next block; None once there can be no more."""
        with self._condition:
            self._working -= 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._todo or not self._working or self._is_over)
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
            # Before the jobs after it, so that arrays are finished one after the other.
            for number, block in reversed(list(enumerate(blocks))):
                self._todo.appendleft((job, number, block))
            self._condition.notify_all()

    def _count(self, job: Job) -> None:
        with self._condition:
            self.progress += 1
            if job._left <= 0:
                return  # given up
            job._left -= 1
            if job._left:
                return
            if job.error is None and job.digest:
                found = digests.of_blocks(job._found)
                if found != job.digest:
                    job.error = wrong_digest(job.name, found, job.digest)
            self._done.append(job)
            self._condition.notify_all()


def wrong_digest(name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name} has digest {found}, the manifest says {expected}; the stored bytes are damaged, "
        "restore them from a copy"
    )


def load_array(array: np.ndarray, name: str, blocks: Callable, digest: str = "") -> np.ndarray:
    """Fills one array, see Job. Raises why it cannot."""
    load_arrays([Job(name, blocks, ArrayTarget(array), digest, in_place=True)])
    return array


def load_arrays(jobs: Sequence[Job]) -> None:
    """Loads them all. Raises why the first one that failed did; others may be filled or not."""
    failed = [job for job in BlockLoader().load(jobs) if job.error is not None]
    if failed:
        raise failed[0].error
