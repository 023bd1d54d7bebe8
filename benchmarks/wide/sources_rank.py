"""One rank of `bench_wide_sources`: rank 0 brings experts out of the bank of rank 1, and is timed.

python -m benchmarks.wide.sources_rank DIRECTORY RANK PARENT_PID
"""

import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.bench_sources import _sized
from benchmarks.wide.exchange_rank import Out
from benchmarks.wide.meeting import Meeting
from benchmarks.wide.workers import JOB
from eep_jax.heap.open import open_heap
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.executor import Executor
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.storage.random_checkpoint import RandomCheckpoint
from launch.flags import load_config, override
from launch.processes import end_with_parent

OWNER = 1


class Bringing:
    """What rank 0 does; every other rank has all experts in its first slots."""

    def __init__(self, job: dict, rank: int, meeting: Meeting):
        config = _sized(override(load_config(job["config"]), *job["overrides"]))
        self.config, self.count = config, config.model.experts
        ranks, slots = job["ranks"], 2 * self.count
        # As on a GPU, a bank holds what is stored: nothing is converted on the way.
        layout = slab_layout(config.model, config.engine, ranks, slots, bank_dtype="bfloat16")
        self.heap = open_heap(rank, ranks, layout.slab_bytes, jax.default_backend())
        for peer, handle in enumerate(meeting.share("handle", self.heap.export())):
            if peer != rank:
                self.heap.attach(peer, handle)
        self.bank = ExpertBank(layout, self.heap)
        self.drawn = RandomCheckpoint(config.model, 0)
        for expert in range(self.count):
            self.bank.write(expert, expert, self._weights(expert))
        meeting.share("filled")

    def _weights(self, expert: int) -> np.ndarray:
        return self.drawn.read_experts([expert])[expert]

    @property
    def bytes(self) -> int:
        return self.count * self.bank.expert_bytes

    def ways(self) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
        """Name -> (the way of a repair, a plain copy of as many bytes from the same memory)."""
        check = self._check()
        executor = Executor(self.bank, self.drawn, check=check)
        source = lambda expert: (Source(SourceKind.PEER, OWNER, expert),)
        moves = tuple(Move(0, e, e, source(e)) for e in range(self.count))
        wanted = (*range(self.count), *[-1] * self.count)

        def checked() -> None:
            for slot in range(self.count):
                self.bank.clear(slot)
            executor.carry_out(wanted, moves)

        def moved() -> None:
            self.bank.copy_all([(e, OWNER, e) for e in range(self.count)])

        checked()
        if executor.moved.get("peer") != self.count:
            raise RuntimeError(f"experts came from {executor.moved}, not from rank {OWNER}")
        for expert in range(self.count):
            found = np.asarray(self.bank.read(expert)).view(np.uint16)
            if not np.array_equal(found, self._weights(expert).view(np.uint16)):
                raise RuntimeError(f"expert {expert} is not what rank {OWNER} has")
        plain = self._plain()
        return {"peer moved": (moved, plain), "peer checked": (checked, plain)}

    def _check(self) -> SlotCheck:
        check = SlotCheck(self.heap, self.bank.layout, self.drawn.content_name)
        for expert in range(self.count):
            check.learn(expert, expert)
        return check

    def _plain(self) -> Callable[[], None]:
        """One copy for each expert, into slots that nobody looks at."""
        layout, copies = self.bank.layout, []
        for slot in range(self.count):
            source, target = layout.slot(slot), layout.slot(self.count + slot)
            copies.append((target.offset, OWNER, source.offset, source.bytes))
        return lambda: self.heap.copy_in_all(copies)


def main(directory: pathlib.Path, rank: int, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    job = json.loads((directory / JOB).read_text())
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    meeting = Meeting(directory / "meeting", rank, job["ranks"], job["deadline_s"])
    bringing = Bringing(job, rank, meeting)
    if rank == 0:
        out = Out(directory / "found.0.jsonl")
        for name, calls in bringing.ways().items():
            rates: tuple[list[float], list[float]] = ([], [])
            for sample in range(job["samples"] + 1):  # the first one is warming up
                for call, found in zip(calls, rates, strict=True):
                    begin_s = time.perf_counter()
                    call()
                    if sample:
                        found.append(bringing.bytes / (time.perf_counter() - begin_s))
            model = bringing.config.model
            out.write(
                kind="source",
                name=name,
                own=rates[0],
                plain=rates[1],
                shape={
                    "expert_mib": round(bringing.bank.expert_bytes / (1 << 20), 3),
                    "experts": model.experts,
                    "layers": model.layers,
                    "hidden": model.hidden,
                },
            )
    meeting.share("done")


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
