"""One rank of `bench_wide`: opens its heap, maps its peers', checks exchanges, and times them.

What one rank cannot do all ranks leave out, so that none waits for it. A line of `found.RANK.jsonl`
is one size of one exchange; written lines stay, also after a failure.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from benchmarks.gpu_timing import compile_all
from benchmarks.harness import percentile
from benchmarks.meeting import Meeting, meeting_of, release
from benchmarks.processes import Out, worker
from benchmarks.wide.clock import microseconds
from benchmarks.wide.exchange import (
    ROUTINGS,
    Family,
    Rank,
    carry_of,
    programs_of,
    remote_bytes,
    repetitions_of,
    routing_of,
)
from eep_jax.heap.arrays import heap_argument
from pallas_kernels.exchange.call import address_words
from pallas_kernels.exchange.signals import first_round
from pallas_kernels.window import round_up

STEP_DEADLINE_MS = 30_000  # for a peer's part of an exchange: no rank is killed here
PAGE_BYTES = 4096
POISONED_BYTES_MAX = 256 << 20  # of a window
CHECKS = 2  # of each routing: both halves of the window
WARM_RUNS = 2
LINK_SAMPLES, LINK_COPIES = 9, 4
PATTERN_BYTES = 4096


class FamilyRun:
    """One family at one rank: memory, compiled programs, and what was found."""

    def __init__(self, family: Family, rank: int, job: dict, meeting: Meeting, out: Out, name: str):
        self.family, self.rank, self.job = family, rank, job
        self.meeting, self.out, self.name = meeting, out, name
        self._shared = job["link"] == "shared_gpu"
        self._link_bytes = job["link_bytes"]
        self._link_at = round_up(family.layout.window_bytes, PAGE_BYTES)
        slab_bytes = self._link_at + 2 * self._link_bytes
        self.heap = meeting.open_heap(name, slab_bytes, self._poison)
        self.array = heap_argument(self.heap)
        self.world = Rank(family, rank, self.heap.slab_bytes)

    def close(self) -> None:
        self.meeting.share(f"{self.name}.done")
        del self.array
        release(self.heap)

    def _poison(self, heap) -> None:
        """Rows of NaN with real slots, as an earlier life may have left them."""
        layout = self.family.layout
        first = layout.regions["slots"].offset
        garbage = np.full(min(layout.window_bytes - first, POISONED_BYTES_MAX), 0xFF, np.uint8)
        garbage[: layout.regions["slots"].bytes] = 0
        heap.write(first, garbage)

    def measure_link(self) -> None:
        """Copies of a peer's memory into the own one: all ranks at once, and rank 0 alone."""
        ranks, rank = self.family.ranks, self.rank
        if ranks == 1:
            return
        source, target = self._link_at, self._link_at + self._link_bytes
        own = np.full(PATTERN_BYTES, rank + 1, np.uint8)
        self.heap.write(source, own)
        peer = (rank + 1) % ranks
        copies = [(target, peer, source, self._link_bytes)] * LINK_COPIES
        for way in ("all_at_once", "alone"):
            self.meeting.share(f"{self.name}.link.{way}")
            if way == "all_at_once" or rank == 0:
                rates = [self._rate(copies) for _ in range(LINK_SAMPLES + 1)][1:]
                self.out.write(kind="link", way=way, bytes_per_s=percentile(rates, 50))
        found = self.heap.read(rank, target, PATTERN_BYTES)
        if not np.array_equal(found, np.full(PATTERN_BYTES, peer + 1, np.uint8)):
            raise RuntimeError(f"rank {rank} did not copy what rank {peer} wrote")
        self.meeting.share(f"{self.name}.link.over")

    def _rate(self, copies) -> float:
        begin_s = time.perf_counter()
        self.heap.copy_in_all(copies)
        return sum(copy[3] for copy in copies) / (time.perf_counter() - begin_s)

    def run(self) -> None:
        call = self._call(1)
        plans = {
            tokens: repetitions_of(self._bytes(tokens).dispatch, self._shared)
            for tokens in self.family.tokens
        }
        programs = {
            f"{name} {tokens}": program
            for tokens, count in plans.items()
            for name, program in programs_of(self.world, tokens, call, self.array, count).items()
        }
        failures: dict[str, Exception] = {}
        begin_s = time.monotonic()
        executables = compile_all(programs, failures, threads=self.job["threads"])
        print(f"{self.name}: compiled {len(executables)} in {time.monotonic() - begin_s:.1f} s")
        for name, error in failures.items():
            self._fail(name, error)
        lists = self.meeting.share(f"{self.name}.compiled", sorted(executables))
        known = set.intersection(*map(set, lists))
        epoch = 1
        for tokens, count in plans.items():
            if f"check {tokens}" not in known:
                continue
            epoch += 2
            if not self._check(tokens, epoch, executables[f"check {tokens}"]):
                continue
            data = self.world.data(routing_of(self.family, tokens, "uniform"))
            for name in self.world.timed():
                if f"{name} {tokens}" in known:
                    epoch += 1
                    self._time(name, tokens, epoch, executables[f"{name} {tokens}"], data, count)
            del data

    def _call(self, epoch: int):
        address = address_words(self.heap.control_address())
        return self.world.call(epoch, STEP_DEADLINE_MS, address, first_round(epoch))

    def _bytes(self, tokens: int):
        return remote_bytes(routing_of(self.family, tokens, "uniform"), self.family)

    def _check(self, tokens: int, epoch: int, executable) -> bool:
        """True if every rank received and summed the right values, for all routings."""
        call, wrong = self._call(epoch), []
        for seed, routing in enumerate(list(ROUTINGS) * CHECKS):
            slots = routing_of(self.family, tokens, routing, seed)
            found = executable(call, slots, jax.random.key(seed), self.array)
            wrong.append([int(part) for part in jax.device_get(found)])
            call = call.next()
        everyone = self.meeting.share(f"{self.name}.check.{tokens}", wrong)
        bad = {rank: w for rank, w in enumerate(everyone) if np.any(w)}
        if bad and self.rank == 0:
            text = f"wrong rows, slots, weights, sums, suspicions by rank and check: {bad}"
            self._fail(f"check {tokens}", text)
        return not bad

    def _time(self, name: str, tokens: int, epoch: int, executable, data, count: int) -> None:
        call = self._call(epoch)
        carry, samples = carry_of(call), []
        self.meeting.share(f"{self.name}.{name}.{tokens}")
        for turn in range(WARM_RUNS + self.job["samples"]):
            carry, begin, end = jax.block_until_ready(executable(carry, call, data, self.array))
            if turn >= WARM_RUNS:
                samples.append(microseconds(np.asarray(begin), np.asarray(end), count))
        suspected = self.meeting.share(
            f"{self.name}.{name}.{tokens}.over", np.asarray(carry[1]).tolist()
        )
        if np.any(suspected):
            self._fail(f"{name} {tokens}", f"suspicions by rank: {suspected}")
            return
        self.out.write(
            kind="time",
            name=name,
            tokens=tokens,
            family=self.name,
            samples_us=samples,
            bytes=getattr(self._bytes(tokens), name.removesuffix("_home")),
        )

    def _fail(self, what: str, error) -> None:
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        print(f"{self.name} {what}: {text}", file=sys.stderr, flush=True)
        self.out.write(kind="failure", family=self.name, what=what, error=text[:600])


def measure(directory: pathlib.Path, rank: int, job: dict) -> None:
    meeting, out = meeting_of(directory, rank, job), Out(directory / f"found.{rank}.jsonl")
    for index, fields in enumerate(job["families"]):
        family = Family(**{**fields, "tokens": tuple(fields["tokens"])})
        run = FamilyRun(family, rank, job, meeting, out, f"family{index}")
        if index == 0:
            run.measure_link()
        run.run()
        run.close()


if __name__ == "__main__":
    worker(measure)
