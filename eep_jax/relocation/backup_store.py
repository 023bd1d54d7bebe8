"""Backups of experts in host memory: filled in the background, served to peers, read locally."""

import contextlib
import dataclasses
import itertools
import logging
import math
import mmap
import os
import pathlib
import shutil
import threading
import time

import numpy as np

from eep_jax.heap.heap import SymmetricHeap
from eep_jax.placement.backups import SHARD_OVERHEAD_BYTES, plan_backups
from eep_jax.placement.placement import Placement
from eep_jax.placement.sources import Backup, Source, SourceKind
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.shard_server import ShardServer, fetch_shard, receive_file
from eep_jax.relocation.shards import chunk_name, load_shard, map_shard, save_shard
from eep_jax.storage.expert_store import ExpertStore

_log = logging.getLogger(__name__)

REST = 3.0  # after each expert the thread sleeps this many times as long as it worked
NICE = 19
FETCH_EXTRA_BYTES = 1 << 20  # that a shard may have beyond its weights
SAMPLES = 3  # fetches from each source that is measured at the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackupOptions:
    """How a rank keeps and serves backups.

    Attributes:
        rank: The own rank.
        directory: An empty directory of this process alone; should be memory, as tmpfs is.
        bytes_max: The most bytes to keep.
        host: Address of the interface to serve on.
        token: The run's token, which readers must know.
        fetch_deadline_ms: Time for one expert from another rank.
    """

    rank: int
    directory: pathlib.Path
    bytes_max: int
    host: str
    token: str
    fetch_deadline_ms: int


class BackupStore:
    """Reads backups, the own ones from memory and those of other ranks over Orbax's P2P service.

    A background thread keeps the experts that `plan_backups` assigns to this rank since the last
    `follow`, read from the checkpoint, which compares digests. Experts that are no longer planned
    stay until their bytes are needed. The caller of `fetch` must check for later damage.
    """

    def __init__(
        self,
        checkpoint: ExpertStore,
        options: BackupOptions,
        rates: Rates | None = None,
        heap: SymmetricHeap | None = None,
    ):
        """Starts filling and serving.

        Args:
            checkpoint: What backups are read from.
            options: Where and how much to keep.
            rates: Where measured speeds are noted.
            heap: The heap whose slots are filled from backups; it pins their memory if it can.

        Raises:
            OSError: The directory cannot be written, or the address cannot be served on.
        """
        self._checkpoint, self._options = checkpoint, options
        self._rates, self._heap = rates or Rates(), heap
        self._shape = checkpoint.model.expert_shape
        self._dtype = np.dtype(checkpoint.manifest["dtype"])
        self._served, self._filling, self._fetched = (
            options.directory / name for name in ("served", "filling", "fetched")
        )
        for directory in (self._served, self._filling, self._fetched):
            directory.mkdir(parents=True)
        self._numbers = itertools.count()
        self._bytes: dict[int, int] = {}  # by expert held; written by the thread only
        self._mapped: dict[int, np.ndarray] = {}  # likewise, the weights
        self._held: tuple[int, ...] = ()
        self._problem = ""  # of the last `_fill`
        self._followed: tuple[tuple[int, ...], Placement] | None = None
        self._news, self._stopping = threading.Event(), threading.Event()
        self._filled = threading.Event()
        self._server = ShardServer(self._served, options.host, options.token, self._mapped_file)
        self._thread = threading.Thread(target=self._run, name="backups", daemon=True)
        self._thread.start()
        threading.Thread(target=self._measure, name="rates", daemon=True).start()

    @property
    def offer(self) -> Backup:
        """What other ranks may fetch from here."""
        return Backup(self._server.address, self._held, self._problem)

    def follow(self, ranks, placement: Placement) -> None:
        """Shares the backups among these ranks from now on. Returns at once."""
        self._followed = (tuple(ranks), placement)
        self._news.set()

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """The weights in the stored dtype, unchecked; see `source_reader.Backups`."""
        if source.rank == self._options.rank:
            return self._own(expert)
        return self._fetch_from(source.address, expert)

    def close(self) -> None:
        """Stops serving and filling, after the expert under way."""
        self._stopping.set()
        self._news.set()
        self._filled.set()
        self._server.close()
        self._thread.join(5.0)
        while self._heap is not None and self._mapped:
            self._heap.unpin(self._mapped.popitem()[1])

    def _own(self, expert: int) -> np.ndarray:
        """An own backup, without a copy. Its pages were mapped when it was written."""
        fresh = map_shard(self._served / str(expert), self._shape, self._dtype)  # checks the size
        return self._mapped.get(expert, fresh)

    def _mapped_file(self, path: pathlib.Path) -> np.ndarray | None:
        """The mapped bytes of a shard's chunk; None for other files."""
        expert, _, name = str(path.relative_to(self._served)).partition("/")
        mapped = self._mapped.get(int(expert))
        if name != chunk_name(len(self._shape)) or mapped is None:
            return None
        return mapped.reshape(-1).view(np.uint8) if path.stat().st_size == mapped.nbytes else None

    @property
    def _expert_bytes(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

    def _fetch_from(self, address: str, expert: int) -> np.ndarray:
        """A shard of another rank: its one chunk, received into memory, or all its files."""
        ends_s = time.monotonic() + self._options.fetch_deadline_ms / 1000
        weights, name = np.empty(self._shape, self._dtype), chunk_name(len(self._shape))
        try:
            receive_file(address, f"{expert}/{name}", weights, self._options.token, ends_s)
            return weights
        except ValueError as error:
            _log.info("expert %d of %s is fetched as a whole shard: %s", expert, address, error)
            return self._fetch_whole(address, expert, ends_s)

    def _fetch_whole(self, address: str, expert: int, ends_s: float) -> np.ndarray:
        into, token = self._fetched / str(next(self._numbers)), self._options.token
        bytes_max = 2 * self._expert_bytes + FETCH_EXTRA_BYTES
        try:
            return load_shard(fetch_shard(address, expert, into, token, ends_s, bytes_max))
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # steps have precedence
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stopping.is_set():
            self._news.wait()
            self._news.clear()
            try:
                if not self._stopping.is_set():
                    self._fill(*self._followed)
            except Exception:  # a rank also serves without backups
                _log.exception("backups are not filled")

    def _fill(self, ranks: tuple[int, ...], placement: Placement) -> None:
        options = self._options
        planned = plan_backups(
            placement.experts, ranks, placement, self._expert_bytes, options.bytes_max
        )
        wanted, problem = planned[options.rank], ""
        if not any(planned):
            problem = (
                f"one expert takes {self._expert_bytes + SHARD_OVERHEAD_BYTES} bytes, "
                f"cluster.backup_bytes={options.bytes_max} holds none"
            )
        for expert in wanted:
            if self._news.is_set():
                return  # `follow` or `close` was called
            if expert in self._bytes:
                continue
            started = time.monotonic()
            try:
                self._add(expert, wanted)
            except Exception as error:  # storage may work again later
                _log.warning("no backup of expert %d: %s", expert, error)
                problem = problem or f"expert {expert}: {error}"
            self._stopping.wait(REST * (time.monotonic() - started))
        self._problem = problem
        self._filled.set()
        _log.info("backups of %d experts, %d bytes", len(self._held), sum(self._bytes.values()))

    def _add(self, expert: int, wanted: tuple[int, ...]) -> None:
        weights = self._checkpoint.read_experts([expert])[expert]
        self._make_room(weights.nbytes, wanted)
        draft = self._filling / str(expert)
        try:
            save_shard(draft, weights)
            size = bytes_on_disk(draft)
            if sum(self._bytes.values()) + size > self._options.bytes_max:
                raise MemoryError(f"it takes {size} bytes; raise cluster.backup_bytes")
            os.replace(draft, self._served / str(expert))  # peers see all of it or nothing
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        mapped = map_shard(self._served / str(expert), self._shape, self._dtype)
        mapped.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].sum()
        if self._heap is not None:
            self._heap.pin(mapped)
        self._mapped[expert], self._bytes[expert] = mapped, size
        self._held = tuple(sorted(self._bytes))

    def _make_room(self, nbytes: int, wanted: tuple[int, ...]) -> None:
        for expert in [e for e in self._held if e not in wanted]:
            if sum(self._bytes.values()) + nbytes + FETCH_EXTRA_BYTES <= self._options.bytes_max:
                return
            del self._bytes[expert]
            self._held = tuple(sorted(self._bytes))
            mapped = self._mapped.pop(expert)
            if self._heap is not None:
                self._heap.unpin(mapped)
            shutil.rmtree(self._served / str(expert), ignore_errors=True)

    def _measure(self) -> None:
        """Times fetches from the own server and reads of the checkpoint, once there are backups.

        Runs in a thread of its own, at the priority of a repair.
        """
        self._filled.wait()
        for expert in self._held[:SAMPLES]:
            if self._stopping.is_set():
                return
            try:
                for kind, read in (
                    (SourceKind.BACKUP, lambda e: self._fetch_from(self._server.address, e)),
                    (SourceKind.CHECKPOINT, lambda e: self._checkpoint.read_experts([e])[e]),
                ):
                    started = time.monotonic()
                    weights = read(expert)
                    self._rates.note(kind, weights.nbytes, time.monotonic() - started)
            except Exception as error:  # a source that cannot be measured keeps its tier
                _log.warning("a source of expert %d cannot be measured: %s", expert, error)


def bytes_on_disk(directory: pathlib.Path) -> int:
    """Bytes that files and directories occupy, in whole pages or blocks."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*"))
