"""Two ranks on one device, and each way to bring experts to the first, as `bench_sources` times."""

import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from benchmarks.bench_sources import PlainSocket
from eep_jax.config import RunConfig
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.models.weights import expert_name
from eep_jax.placement.planner import Move, initial_placement
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation import backup_store
from eep_jax.relocation.backup_store import BackupOptions, BackupStore
from eep_jax.relocation.executor import Executor, FetchOptions
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.relocation.source_reader import SourceReader
from eep_jax.storage.checkpoint import Checkpoint, save_checkpoint
from eep_jax.storage.fetcher import Fetch, Fetcher, Prefetcher
from eep_jax.storage.random_checkpoint import RandomCheckpoint

FILLED_S = 300.0  # for the backups of a rank, which rests between experts
Comparison = tuple[str, Callable[[], None], Callable[[], None]]


class Bench:
    """Rank 0 lacks all experts; rank 1 has them in slots, both in backups; and so has storage."""

    def __init__(self, config: RunConfig, scratch: pathlib.Path, token: str):
        self.config, self._scratch = config, scratch
        self.orphans = orphans = config.model.experts
        self.on_gpu = config.platform == "gpu"
        # As on a GPU, a bank holds what is stored: nothing is converted on the way.
        layout = slab_layout(config.model, config.engine, 2, 2 * orphans, bank_dtype="bfloat16")
        self.heaps = self._open(layout.slab_bytes)
        self.bank, self.peer = (ExpertBank(layout, heap) for heap in self.heaps)
        drawn = RandomCheckpoint(config.model, 0)
        self.experts = drawn.read_experts(list(range(orphans)))
        self.checkpoint = self._saved(scratch / "checkpoint", drawn)
        self.stores = [self._store(rank, token) for rank in (0, 1)]
        self.executor = self._executor()
        self._closing = list(self.stores)

    @property
    def device(self) -> str:
        """The GPU's name; empty on CPU."""
        return jax.devices()[0].device_kind if self.on_gpu else ""

    @property
    def bytes(self) -> int:
        return self.orphans * self.bank.expert_bytes

    def close(self) -> None:
        for thing in self._closing:
            thing.close()
        for heap in self.heaps:
            heap.release() if self.on_gpu else heap.close()

    def comparisons(self, only: Sequence[str] | None = None) -> Iterator[Comparison]:
        """(name, the source's way, the plain way), after the source was seen to be right."""
        own, peers = SourceKind.BACKUP, self.stores[1].offer.address
        sources = {
            "peer": (lambda e: Source(SourceKind.PEER, 1, e), self._plain_device_copy),
            "backup": (lambda e: Source(own, 0), self._plain_host_copy),
            "p2p": (lambda e: Source(own, 1, address=peers), self._plain_socket),
            "checkpoint": (lambda e: Source(SourceKind.CHECKPOINT), self._plain_file),
        }
        for name in only or sources:
            source_of, open_plain = sources[name]
            plain = open_plain()
            bring = self._bring(source_of)
            self._require_right(bring)
            yield f"{name} moved", self._move(source_of), plain
            yield f"{name} checked", bring, plain

    def _bring(self, source_of) -> Callable[[], None]:
        """As a repair does it, digest and all."""
        slots = (*range(self.orphans), *[-1] * self.orphans)
        moves = tuple(Move(0, e, e, (source_of(e),)) for e in range(self.orphans))

        def bring() -> None:
            for slot in range(self.orphans):
                self.bank.clear(slot)
            self.executor.carry_out(slots, moves)

        return bring

    def _move(self, source_of) -> Callable[[], None]:
        """The same bytes the same way, and nobody looks at them."""
        if source_of(0).kind is SourceKind.PEER:
            copies = [(e, 1, e) for e in range(self.orphans)]
            return lambda: self.bank.copy_all(copies)
        reader = SourceReader(self.bank, self.checkpoint, self.stores[0])
        fetch, experts = reader.fetch, range(self.orphans)
        if source_of(0).rank == 0:
            return lambda: self.bank.write_all((e, e, fetch(e, source_of(e))) for e in experts)
        fetcher, at_once = Fetcher(60_000), self.config.cluster.fetches_at_once
        make = lambda expert: Fetch(0, lambda: fetch(expert, source_of(expert)))

        def move() -> None:
            ahead = Prefetcher(fetcher, experts, make, at_once)
            for expert in experts:
                self.bank.write(expert, expert, ahead.take(ahead.begin(expert)).result())

        return move

    def _require_right(self, bring) -> None:
        before = dict(self.executor.moved)
        bring()
        moved = sum(self.executor.moved.values()) - sum(before.values())
        for expert, right in self.experts.items():
            found = self.bank.read(expert).view(np.uint16)
            if moved != self.orphans or not np.array_equal(found, right.view(np.uint16)):
                raise RuntimeError(f"expert {expert} is not what the checkpoint says")

    # Plain copies of as many bytes.

    def _plain_device_copy(self) -> Callable[[], None]:
        layout, copies = self.bank.layout, []
        for slot in range(self.orphans):
            source, target = layout.slot(slot), layout.slot(self.orphans + slot)
            copies.append((target.offset, 0, source.offset, source.bytes))
        return lambda: self.heaps[0].copy_in_all(copies)

    def _plain_host_copy(self) -> Callable[[], None]:
        sources = [np.array(w).reshape(-1).view(np.uint8) for w in self.experts.values()]
        if not self.on_gpu:
            pairs = [(np.zeros_like(source), source) for source in sources]  # as many targets
            return lambda: [np.copyto(*pair) for pair in pairs] and None
        from benchmarks.pinned_copy import PinnedCopy

        pinned = PinnedCopy(sources)
        self._closing.append(pinned)
        return pinned.copy

    def _plain_socket(self) -> Callable[[], None]:
        plain = PlainSocket(np.concatenate([w.reshape(-1) for w in self.experts.values()]))
        self._closing.append(plain)
        return lambda: plain.receive() is None

    def _plain_file(self) -> Callable[[], None]:
        paths = []
        for expert, weights in self.experts.items():
            paths.append(self._scratch / f"plain{expert}")
            paths[-1].write_bytes(weights.tobytes())
        return lambda: [np.fromfile(path, np.uint8) for path in paths] and None

    # How the two ranks came to be.

    def _open(self, slab_bytes: int):
        if self.on_gpu:
            from eep_jax.heap.cuda.loopback import open_all_cuda

            return open_all_cuda(2, slab_bytes)
        from eep_jax.heap.loopback import open_all

        return open_all(2, slab_bytes)

    def _saved(self, directory: pathlib.Path, drawn: RandomCheckpoint) -> Checkpoint:
        named = {expert_name(e): weights for e, weights in self.experts.items()}
        dense = dict(drawn.read_dense())
        save_checkpoint(directory, self.config.model, dense, named, facts={})
        return Checkpoint(directory)

    def _store(self, rank: int, token: str) -> BackupStore:
        options = BackupOptions(
            rank=rank,
            directory=self._scratch / f"store{rank}",
            bytes_max=2 * self.bytes + (16 << 20),
            host="127.0.0.1",
            token=token,
            fetch_deadline_ms=60_000,
        )
        backup_store.REST, backup_store.NICE = 0.0, 0  # no step runs that it could disturb
        store = BackupStore(self.checkpoint, options, heap=self.heaps[0] if rank == 0 else None)
        ends_s = time.monotonic() + FILLED_S
        store.follow((rank,), initial_placement(self.orphans, 2, self.orphans, 1))
        while len(store.offer.experts) < self.orphans:
            if time.monotonic() > ends_s:
                raise RuntimeError(f"backups {store.offer.experts} after {FILLED_S} s")
            time.sleep(0.1)
        return store

    def _executor(self) -> Executor:
        check = SlotCheck(self.heaps[0], self.bank.layout, self.checkpoint.content_name)
        for expert, weights in self.experts.items():
            self.peer.write(expert, expert, weights)
            self.bank.write(expert, expert, weights)
            check.learn(expert, expert)
        options = FetchOptions(at_once=self.config.cluster.fetches_at_once)
        return Executor(self.bank, self.checkpoint, self.stores[0], check, options)
