"""Fixture of the source benchmarks: a rank that brings experts, and plain copies beside it."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.harness import Sheet, Unfit, percentile
from benchmarks.plain_copies import PinnedCopy, PlainSocket
from eep_jax.config import RunConfig
from eep_jax.models.expert_bank import ExpertBank, SlabLayout, slab_layout
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

EXPERT_MIB_MIN, EXPERT_MIB = 4, 24  # smaller experts are all latency: then experts of this size
ORPHANS_MAX = 8
OWNER = 1  # the rank whose bank has all experts
FILLED_S = 300.0  # for the backups of a rank, which rests between experts
Comparison = tuple[str, Callable[[], None], Callable[[], None]]


def sized(config: RunConfig) -> RunConfig:
    """The configuration with as many experts as one death orphans, of at least EXPERT_MIB_MIN."""
    model = config.model
    if model.expert_elements * 2 < EXPERT_MIB_MIN << 20:
        width = (EXPERT_MIB << 20) // (2 * model.layers * 3 * model.hidden)
        model = dataclasses.replace(model, expert_hidden=width)
    orphans = min(ORPHANS_MAX, max(2, model.experts // config.cluster.ranks))
    few = min(model.experts_per_token, orphans)
    model = dataclasses.replace(model, experts=orphans, experts_per_token=few)
    return dataclasses.replace(config, model=model, checkpoint="", random_weights=0)


def layout_of(config: RunConfig, ranks: int) -> SlabLayout:
    """Slots for all experts twice. As on a GPU, a bank holds the stored dtype: no conversion."""
    slots = 2 * config.model.experts
    return slab_layout(config.model, config.engine, ranks, slots, bank_dtype="bfloat16")


def shape_of(config: RunConfig) -> dict:
    """The shape of a record; `config` is one of `sized`."""
    model = config.model
    return {
        "config": config.name,
        "hidden": model.hidden,
        "layers": model.layers,
        "expert_mib": round(model.expert_elements * 2 / (1 << 20), 3),
        "experts": model.experts,
    }


def time_both(
    own: Callable[[], None], plain: Callable[[], None], nbytes: int, samples: int
) -> tuple[list[float], list[float]]:
    """Bytes per second of both, in turn, so that both meet the same machine; warmed up once."""
    own(), plain()
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(samples):
        for call, found in zip((own, plain), rates, strict=True):
            begin_s = time.perf_counter()
            call()
            found.append(nbytes / (time.perf_counter() - begin_s))
    return rates


def add_rate(sheet: Sheet, name: str, rates: tuple[list[float], list[float]], **shape):
    """The record of one comparison: the median in GB/s, beside that of the plain copy."""
    own, plain = (percentile(found, 50) / 1e9 for found in rates)
    return sheet.add(name, own, "GB/s", baseline=plain, **shape)


class Bringing:
    """A rank that brings all experts into its first slots, from a source for each."""

    def __init__(self, bank: ExpertBank, heap, experts: dict[int, np.ndarray], checkpoint, *more):
        """`more` are the backup store and the fetch options of its executor."""
        self.bank, self.heap, self.experts = bank, heap, experts
        self.count, self.bytes = len(experts), len(experts) * bank.expert_bytes
        check = SlotCheck(heap, bank.layout, checkpoint.content_name)
        for expert, weights in experts.items():
            bank.write(expert, expert, weights)
            check.learn(expert, expert)
        store, options = more or (None, FetchOptions())
        self.executor = Executor(bank, checkpoint, store, check, options)

    def checked(self, source_of: Callable[[int], Source]) -> Callable[[], None]:
        """As a repair does it, with digests."""
        slots = (*range(self.count), *[-1] * self.count)
        moves = tuple(Move(0, e, e, (source_of(e),)) for e in range(self.count))

        def bring() -> None:
            for slot in range(self.count):
                self.bank.clear(slot)
            self.executor.carry_out(slots, moves)

        return bring

    def moved_from_peer(self) -> Callable[[], None]:
        """Copies of the slots of OWNER, without looking at their contents."""
        copies = [(e, OWNER, e) for e in range(self.count)]
        return lambda: self.bank.copy_all(copies)

    def require_right(self, bring: Callable[[], None], kind: SourceKind) -> None:
        """Runs `bring`. Raises Unfit unless every expert came from the source, bit for bit."""
        before = sum(self.executor.moved.values())
        bring()
        if sum(self.executor.moved.values()) - before != self.count:
            raise Unfit(f"experts came from {self.executor.moved}, not {self.count} from {kind}")
        for expert, right in self.experts.items():
            found = np.asarray(self.bank.read(expert)).view(np.uint16)
            if not np.array_equal(found, right.view(np.uint16)):
                raise Unfit(f"expert {expert} is not what the checkpoint says")

    def plain_slots(self, rank: int) -> Callable[[], None]:
        """One copy for each expert, from the slots of a rank into spare slots."""
        layout, copies = self.bank.layout, []
        for slot in range(self.count):
            source, target = layout.slot(slot), layout.slot(self.count + slot)
            copies.append((target.offset, rank, source.offset, source.bytes))
        return lambda: self.heap.copy_in_all(copies)


class TwoRanks:
    """Rank 0 lacks all experts; rank 1 has them in slots, both in backups, and storage as well."""

    def __init__(self, config: RunConfig, scratch: pathlib.Path, token: str):
        self.config, self._scratch = config, scratch
        self._orphans, self._on_gpu = config.model.experts, config.platform == "gpu"
        layout = layout_of(config, 2)
        self._heaps = self._open(layout.slab_bytes)
        own, peer = (ExpertBank(layout, heap) for heap in self._heaps)
        drawn = RandomCheckpoint(config.model, 0)
        self._experts = drawn.read_experts(list(range(self._orphans)))
        self._checkpoint = self._saved(scratch / "checkpoint", drawn)
        self._stores = [self._store(rank, token, layout) for rank in (0, 1)]
        self._closing: list = list(self._stores)
        for expert, weights in self._experts.items():
            peer.write(expert, expert, weights)
        options = FetchOptions(at_once=config.cluster.fetches_at_once)
        more = (self._stores[0], options)
        self.bringing = Bringing(own, self._heaps[0], self._experts, self._checkpoint, *more)

    def close(self) -> None:
        for thing in self._closing:
            thing.close()
        for heap in self._heaps:
            heap.release() if self._on_gpu else heap.close()

    def comparisons(self, only: Sequence[str]) -> Iterator[Comparison]:
        """(name, the source's way, the plain way), after the source was seen to be right."""
        backup, peers = SourceKind.BACKUP, self._stores[1].offer.address
        sources = {
            "peer": (
                lambda e: Source(SourceKind.PEER, OWNER, e),
                lambda: self.bringing.plain_slots(0),
            ),
            "backup": (lambda e: Source(backup, 0), self._plain_host_copy),
            "p2p": (lambda e: Source(backup, 1, address=peers), self._plain_socket),
            "checkpoint": (lambda e: Source(SourceKind.CHECKPOINT), self._plain_file),
        }
        for name in only:
            source_of, open_plain = sources[name]
            plain, bring = open_plain(), self.bringing.checked(source_of)
            self.bringing.require_right(bring, source_of(0).kind)
            yield f"{name} moved", self._move(source_of), plain
            yield f"{name} checked", bring, plain

    def _move(self, source_of) -> Callable[[], None]:
        """The same bytes the same way, without looking at them."""
        if source_of(0).kind is SourceKind.PEER:
            return self.bringing.moved_from_peer()
        bank, experts = self.bringing.bank, range(self._orphans)
        fetch = SourceReader(bank, self._checkpoint, self._stores[0]).fetch
        if source_of(0).rank == 0:
            return lambda: bank.write_all((e, e, fetch(e, source_of(e))) for e in experts)
        fetcher, at_once = Fetcher(60_000), self.config.cluster.fetches_at_once
        make = lambda expert: Fetch(0, lambda: fetch(expert, source_of(expert)))

        def move() -> None:
            ahead = Prefetcher(fetcher, experts, make, at_once)
            for expert in experts:
                bank.write(expert, expert, ahead.take(ahead.begin(expert)).result())

        return move

    # Plain copies of as many bytes.

    def _plain_host_copy(self) -> Callable[[], None]:
        sources = [np.array(w).reshape(-1).view(np.uint8) for w in self._experts.values()]
        if not self._on_gpu:
            pairs = [(np.zeros_like(source), source) for source in sources]  # as many targets
            return lambda: [np.copyto(*pair) for pair in pairs] and None
        pinned = PinnedCopy(sources)
        self._closing.append(pinned)
        return pinned.copy

    def _plain_socket(self) -> Callable[[], None]:
        plain = PlainSocket(np.concatenate([w.reshape(-1) for w in self._experts.values()]))
        self._closing.append(plain)
        return lambda: plain.receive() is None

    def _plain_file(self) -> Callable[[], None]:
        paths = []
        for expert, weights in self._experts.items():
            paths.append(self._scratch / f"plain{expert}")
            paths[-1].write_bytes(weights.tobytes())
        return lambda: [np.fromfile(path, np.uint8) for path in paths] and None

    # How the two ranks came to be.

    def _open(self, slab_bytes: int):
        if self._on_gpu:
            from eep_jax.heap.cuda.loopback import open_all_cuda

            return open_all_cuda(2, slab_bytes)
        from eep_jax.heap.loopback import open_all

        return open_all(2, slab_bytes)

    def _saved(self, directory: pathlib.Path, drawn: RandomCheckpoint) -> Checkpoint:
        named = {expert_name(e): weights for e, weights in self._experts.items()}
        dense = dict(drawn.read_dense())
        save_checkpoint(directory, self.config.model, dense, named, facts={})
        return Checkpoint(directory)

    def _store(self, rank: int, token: str, layout: SlabLayout) -> BackupStore:
        expert_bytes = ExpertBank(layout, self._heaps[0]).expert_bytes
        options = BackupOptions(
            rank=rank,
            directory=self._scratch / f"store{rank}",
            bytes_max=2 * self._orphans * expert_bytes + (16 << 20),
            host="127.0.0.1",
            token=token,
            fetch_deadline_ms=60_000,
        )
        backup_store.REST, backup_store.NICE = 0.0, 0  # no step runs that it could disturb
        store = BackupStore(self._checkpoint, options, heap=self._heaps[0] if rank == 0 else None)
        ends_s = time.monotonic() + FILLED_S
        store.follow((rank,), initial_placement(self._orphans, 2, self._orphans, 1))
        while len(store.offer.experts) < self._orphans:
            if time.monotonic() > ends_s:
                raise RuntimeError(f"backups {store.offer.experts} after {FILLED_S} s")
            time.sleep(0.1)
        return store
