"""Assembly of a rank around its engine: memory before it, executor and agent after it."""

from eep_jax.config import RunConfig
from eep_jax.engine.protocol import RankEngine
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.heap.mirror.heap import MirrorOptions
from eep_jax.heap.open import open_heap
from eep_jax.models.expert_bank import SlabLayout, slab_layout
from eep_jax.relocation.backup_store import BackupStore
from eep_jax.relocation.executor import Executor, FetchOptions
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.runtime.control.rank_client import ControlClient
from eep_jax.runtime.rank.agent import Agent
from eep_jax.runtime.rank.start_timer import StartTimer
from eep_jax.storage.expert_store import ExpertStore


def layout_of(config: RunConfig) -> SlabLayout:
    """The layout of the slabs of a run, the same on all ranks."""
    cluster = config.cluster
    return slab_layout(config.model, config.engine, cluster.ranks, cluster.slots_per_rank)


def open_slab(
    config: RunConfig, rank: int, layout: SlabLayout, mirror: MirrorOptions | None = None
) -> SymmetricHeap:
    """The heap of `rank`, with its own slab; peers are attached later. Raises HeapError."""
    sizes, writable = (config.cluster.ranks, layout.slab_bytes), layout.bank.offset
    return open_heap(rank, *sizes, config.platform, mirror, writable)


def assemble_agent(
    engine: RankEngine,
    store: ExpertStore,
    client: ControlClient,
    *,
    rates: Rates | None = None,
    backups: BackupStore | None = None,
    check: SlotCheck | None = None,
    start: StartTimer | None = None,
) -> Agent:
    """The agent of `engine`; its executor fills the bank from peers, `backups` and `store`.

    Raises ValueError if the bank cannot hold the values of the store.
    """
    cluster = engine.config.cluster
    options = FetchOptions(
        deadline_ms=cluster.fetch_deadline_ms,
        at_once=cluster.fetches_at_once,
        beat=client.beat,
        rates=rates or Rates(),
    )
    executor = Executor(engine.bank, store, backups, check, options)
    return Agent(engine, executor, client, backups, start)
