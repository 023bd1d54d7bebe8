"""One rank's engine: plan a batch, run the compiled step, commit its tokens or discard it.

Executables are compiled ahead of time, one per StepKind, before the rank offers itself. They cannot
recompile; failure, repair and return only change the values they are called with.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.executables import ExecutableStore, step_facts
from eep_jax.engine.lockstep import Lockstep
from eep_jax.engine.request import Progress, Request
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.step import COMPILER_OPTIONS, StepKind, empty_batch, make_step, result_like
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import ExpertBank, SlabLayout
from eep_jax.models.kv_cache import KVCache, empty_cache, zeros_of_cache
from eep_jax.models.moe_block import ExpertSpread, expert_mlp
from eep_jax.models.weights import put_dense
from eep_jax.tables import Tables, call_of, solo_tables
from pallas_kernels.exchange.call import ExchangeSpec
from pallas_kernels.exchange.signals import first_round

# Runs of an executable that take longer than others. On a GPU the first loads its kernels, and only
# the next one records the graph that later ones replay: no peer should wait for that.
FIRST_RUNS = {"cpu": 1, "gpu": 3}
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHED_EVENT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """`committed` tokens, or a discarded step with the ranks it timed out on (none: aborted)."""

    committed: bool
    progress: tuple[Progress, ...] = ()
    accused: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """How executables came to be, and the seconds it took."""

    executables_s: float  # to load or compile them
    run_s: float  # to run each for the first times
    origins: dict[str, str]  # by step: `loaded`, or `compiled: ` and why
    compilations: int  # by XLA, of anything, since the engine began; its cache's are not counted


class CompileCounter:
    """Counts compilations of this process by JAX's own monitoring events.

    `total` is of all that was asked of XLA, `cached` of those that its cache on disk answered.
    """

    def __init__(self):
        self.total = self.cached = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration: float, **_) -> None:
        self.total += event == COMPILE_EVENT

    def _on_event(self, event: str, **_) -> None:
        self.cached += event == CACHED_EVENT


class Engine:
    """Everything a rank computes with. Of one thread, except `lockstep.abort` and `nudge`."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        heap: SymmetricHeap,
        layout: SlabLayout,
        dense,
        store: ExecutableStore | None = None,
    ):
        """`dense` are the weights outside the experts by name, as the checkpoint has them.

        `store` keeps the steps for other processes: of this rank, and of any other.
        """
        self.config, self.rank, self.heap = config, rank, heap
        self.compilations = CompileCounter()
        self.bank = ExpertBank(layout, heap)
        self.lockstep = Lockstep(layout.window, heap)
        self.scheduler = Scheduler(config)
        self.steps = self.discarded = 0
        self._chosen = np.zeros(config.model.experts, np.int64)
        self._votes_hold = False
        spread = ExpertSpread(
            exchange=ExchangeSpec(layout.window, layout.slots, heap.slab_bytes),
            tile_rows=config.engine.row_tile,
            mlp=expert_mlp(config.model),
        )
        self._step, dtypes = make_step(config, spread)
        self._dense = put_dense(dense, dtypes)
        self.bank_array = device_array(heap, layout.bank)
        self._heap_array = heap_argument(heap)
        self._store = store or ExecutableStore(None, step_facts(config))
        self._cache = self._empty_cache()
        cluster = config.cluster
        self._take_tables(
            solo_tables(cluster.ranks, config.model.experts, cluster.slots_per_rank, rank)
        )
        self._round = np.uint32(first_round(0))
        self._next = StepKind.DECODE
        self._executables = {}
        self._first_runs = FIRST_RUNS[config.platform]
        self._warm_compilations = 0

    def warm_up(self) -> WarmUp:
        """Loads or compiles all executables and runs each alone: no peer takes part."""
        started = time.monotonic()
        for kind in (StepKind.DECODE, StepKind.MIXED):
            arguments = self._arguments(empty_batch(self.config, kind), StepKind.IDLE)
            jitted = jax.jit(self._step, donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
            self._executables[kind] = self._store.obtain(
                kind.name.lower(),
                lambda jitted=jitted, arguments=arguments: jitted.lower(*arguments),
                arguments,
                result_like(self._cache),
            )
        ready = time.monotonic()
        for kind in [kind for kind in self._executables for _ in range(self._first_runs)]:
            result = self._run(kind, empty_batch(self.config, kind), StepKind.IDLE)
            jax.block_until_ready(result.suspicion)
        self._warm_compilations = self.compilations.total
        origins = dict(self._store.origins)
        compiled = self.compilations.total - self.compilations.cached
        return WarmUp(ready - started, time.monotonic() - ready, origins, compiled)

    @property
    def compilations_since_start(self) -> int:
        """Of anything, cached or not, after `warm_up`; stays 0 over every change of membership."""
        return self.compilations.total - self._warm_compilations

    @property
    def epoch(self) -> int:
        return int(self._tables.epoch)

    def resume(self, tables: Tables) -> None:
        """Steps from now on under the tables of a new epoch, from its first round.

        Flags must have been cleared since the last step (see `Lockstep.clear_flags`).
        """
        self._take_tables(tables)
        self._round = np.uint32(first_round(int(tables.epoch)))
        # After a change the kind is agreed anew, in a step that costs every rank the least.
        self._next = StepKind.DECODE
        self._votes_hold = False

    @property
    def paused(self) -> bool:
        """All ranks agreed that there is nothing to do."""
        return self._next is StepKind.IDLE

    def vote_hold(self) -> None:
        """Votes HOLD until `resume`: all ranks stop at one round, and discard nothing."""
        self._votes_hold = True

    @property
    def held(self) -> bool:
        """All ranks agreed to stop for an epoch that is prepared, and none will step before it."""
        return self._next is StepKind.HOLD

    def take_chosen(self) -> tuple[int, ...]:
        """How often the tokens committed here chose each expert since the last call."""
        taken, self._chosen = self._chosen, np.zeros_like(self._chosen)
        return tuple(taken.tolist())

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def try_wake(self) -> bool:
        """While paused: whether this rank or a peer has work, so all go on. Tells the peers."""
        vote, paused_round = self._raised(self.scheduler.vote()), int(self._round)
        if vote is not StepKind.IDLE:
            active = np.flatnonzero(self._tables.active)
            self.lockstep.wake_peers([p for p in active if p != self.rank], paused_round)
        elif not self.lockstep.is_woken(paused_round):
            return False
        self.lockstep.forget_wakes()
        self._next = StepKind.DECODE
        return True

    def advance(self) -> StepOutcome:
        """Runs one step. A discarded one leaves the scheduler as it was, and is planned again."""
        plan = self.scheduler.plan(self._next)
        vote = self._raised(self.scheduler.vote_after(plan))
        result = self._run(plan.kind, plan.batch, vote)
        # One transfer for all: on a GPU each costs more than its bytes.
        suspicion, next_round, agreed, tokens, dropped, chosen = jax.device_get(
            (
                result.suspicion,
                result.round,
                result.agreed,
                result.tokens,
                result.dropped,
                result.chosen,
            )
        )
        if suspicion.any() or self.lockstep.aborted_epoch > self.epoch:
            self.discarded += 1
            suspicion = np.where(np.arange(len(suspicion)) == self.rank, 0, suspicion)
            return StepOutcome(False, accused=tuple(np.flatnonzero(suspicion).tolist()))
        self.steps += 1
        self._round = np.uint32(next_round)
        self._next = StepKind(int(agreed))
        self._chosen += chosen
        return StepOutcome(True, tuple(self.scheduler.commit(plan, tokens, dropped)))

    def _raised(self, vote: StepKind) -> StepKind:
        return StepKind.HOLD if self._votes_hold else vote

    def _empty_cache(self) -> KVCache:
        """Made on a GPU by a program that is kept like the steps."""
        model, engine = self.config.model, self.config.engine
        if self.config.platform == "cpu":
            return empty_cache(model, engine)
        zeros = functools.partial(zeros_of_cache, model, engine)
        lower = lambda: jax.jit(zeros).lower()
        return self._store.obtain("cache", lower, (), jax.eval_shape(zeros))()

    def _run(self, kind: StepKind, batch, vote: StepKind):
        arguments = self._arguments(batch, vote)
        result = self._executables[kind](*arguments)
        # The old cache was donated. Discarding a step keeps the new one: rows are kept by position.
        self._cache = result.cache
        return result

    def _arguments(self, batch, vote: StepKind):
        tables, call = self._of_epoch
        call = dataclasses.replace(call, round=self._round, vote=np.uint32(vote))
        return self._dense, self.bank_array, self._cache, self._heap_array, tables, batch, call

    def _take_tables(self, tables: Tables) -> None:
        """Puts what stays the same for an epoch onto the device, once."""
        self._tables = tables
        deadline_ms = self.config.engine.step_deadline_ms
        call = call_of(tables, self.rank, deadline_ms, self.heap.control_address())
        self._of_epoch = jax.device_put((tables, call))
