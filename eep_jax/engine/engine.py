"""The engine of one rank that serves requests: plan a batch, run the compiled step, commit tokens.

Executables are compiled ahead of time, one for each number of rows, before the rank offers itself.
They cannot recompile; failure, repair and return only change the values they are called with.

A GPU does not wait for the host: the next step is planned and launched before the results of
the one under way are read. Tokens that it needs of that step stay on the device. If a step is
discarded, so is the one after it.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.agreement import NO_STEP, Agreement
from eep_jax.engine.compilations import CompileCounter
from eep_jax.engine.executables import ExecutableStore, step_facts
from eep_jax.engine.lockstep_engine import LockstepEngine
from eep_jax.engine.packed_step import PackedSteps
from eep_jax.engine.protocol import StepOutcome, WarmUp
from eep_jax.engine.request import CacheUse, Progress, Request
from eep_jax.engine.scheduler import Scheduler, StepPlan
from eep_jax.engine.shaping import ShapingRows
from eep_jax.engine.step import Batch, empty_batch, make_step
from eep_jax.engine.step_times import StepTimes
from eep_jax.engine.votes import HOLD, IDLE
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import SlabLayout
from eep_jax.models.kv_cache import KVCache, empty_cache, zeros_of_cache
from eep_jax.models.weights import put_dense
from eep_jax.tables import Tables

# Runs of an executable that take longer than others. On a GPU the first loads its kernels, and only
# the next one records the graph that later ones replay: no peer should wait for that.
FIRST_RUNS = {"cpu": 1, "gpu": 3}


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """A step that was launched and whose results were not read yet."""

    plan: StepPlan
    result: jax.Array
    launched_s: float


class Engine(LockstepEngine):
    """A RankEngine, which documents the methods, for requests."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        heap: SymmetricHeap,
        layout: SlabLayout,
        dense: Mapping[str, np.ndarray],
        store: ExecutableStore | None = None,
        overlap: bool | None = None,
    ):
        """`dense` are the weights outside the experts by name, as the checkpoint has them.

        `store` keeps the steps for other processes of any rank. `overlap` launches a step before
        the one under way is read; unless given, it does so on a GPU, since a call of a CPU returns
        when the step has ended.
        """
        self.compilations = CompileCounter()
        self._overlap = config.platform == "gpu" if overlap is None else overlap
        self._agreement = Agreement(config.engine.step_sizes[0], self._overlap)
        self._under_way: collections.deque[UnderWay] = collections.deque()
        self._read_s = 0.0  # when results were last read
        super().__init__(config, rank, heap, layout)
        self.scheduler = Scheduler(config)
        self._times = StepTimes(config.engine.step_sizes)
        self._chosen = np.zeros(config.model.experts, np.int64)
        self._store = store or ExecutableStore(None, step_facts(config))
        self._uploaded: tuple = None, None  # ShapingRows of the host and of the device
        step, dtypes = make_step(config, self._spread)
        fixed = put_dense(dense, dtypes), self.bank_array, self._heap_array
        self._packed = PackedSteps(config, step, fixed, self._empty_cache(), self._store)
        self._first_runs = FIRST_RUNS[config.platform]
        self._warm_compilations = 0

    def warm_up(self) -> WarmUp:
        started = time.monotonic()
        self._packed.obtain((self._shaping(), self._device_tables, self._epoch_call))
        ready = time.monotonic()
        for rows in [rows for rows in self._packed.sizes for _ in range(self._first_runs)]:
            self._packed.read(self._start(empty_batch(self.config, rows), IDLE, first=True))
        self._warm_compilations = self.compilations.total
        origins = dict(self._store.origins)
        compiled = self.compilations.total - self.compilations.cached
        return WarmUp(ready - started, time.monotonic() - ready, origins, compiled)

    @property
    def compilations_since_start(self) -> int:
        return self.compilations.total - self._warm_compilations

    def cache_use(self) -> CacheUse:
        return self.scheduler.cache_use()

    def take_chosen(self) -> tuple[int, ...]:
        taken, self._chosen = self._chosen, np.zeros_like(self._chosen)
        return tuple(taken.tolist())

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> bool:
        return self.scheduler.cancel(request_id)

    def snapshot(self) -> list[Progress]:
        return self.scheduler.snapshot()

    def resume(self, tables: Tables) -> None:
        self.quiesce()
        super().resume(tables)

    def quiesce(self) -> None:
        while self._under_way:
            jax.block_until_ready(self._under_way.pop().result)
            self.discarded += 1

    def advance(self) -> StepOutcome:
        if not self._under_way:
            rows = self._rows_of_next
            self._launch(self._smallest if rows in NO_STEP else rows)
        if self._overlap and (rows := self._rows_of_next) not in NO_STEP:
            self._launch(rows)
        step = self._under_way.popleft()
        found = self._packed.read(step.result)
        outcome = self._settle(found.suspicion, found.round, found.agreed)
        if not outcome.committed:
            self._agreement.put_back([step.plan.rows, *(plan.rows for plan in self._plans)])
            self.quiesce()
            return outcome
        self.steps += 1
        self._chosen += found.chosen
        committed = step.plan, found.tokens, found.dropped, found.finite
        progress = tuple(self.scheduler.commit(*committed))
        now_s = time.monotonic()
        self._limit_prompts(step.plan.rows, now_s - max(step.launched_s, self._read_s))
        self._read_s = now_s
        self._next = self._smallest
        if self._is_alone:
            stop = None if self._under_way else self._rows_of_next
        else:
            stop = self._agreement.hear(int(found.agreed), is_last=not self._under_way)
        if stop in (IDLE, HOLD):
            self._next = stop
        return StepOutcome(True, progress)

    def _begin_agreement(self) -> None:
        super()._begin_agreement()
        self._agreement.begin()

    @property
    def _rows_of_next(self) -> int:
        """Rows of the next step, or one of NO_STEP. A rank that is alone decides as it launches."""
        if not self._is_alone:
            return self._agreement.rows
        return HOLD if self._votes_hold else self.scheduler.vote(self._plans)

    @property
    def _plans(self) -> list[StepPlan]:
        return [step.plan for step in self._under_way]

    def _launch(self, rows: int) -> None:
        """Starts a step behind those under way."""
        plan, vote = self.scheduler.plan(rows, self._plans), IDLE
        if not self._is_alone:
            self._agreement.take()
            wanted = self.scheduler.vote([*self._plans, plan], self._agreement.between)
            vote = self._agreement.vote(wanted)
        started_s = time.monotonic()
        result = self._start(plan.batch, vote, first=not self._under_way)
        self._under_way.append(UnderWay(plan, result, started_s))

    def _start(self, batch: Batch, vote: int, first: bool) -> jax.Array:
        """Launches a step; the `first` does not follow one that is under way."""
        lasting = self._shaping(), self._device_tables, self._epoch_call
        round_ = int(self._round) if first else None
        return self._packed.launch(batch, lasting, self._or_hold(vote), round_)

    def _limit_prompts(self, rows: int, seconds: float) -> None:
        """Keeps steps with prompts within the wanted time between tokens."""
        self._times.add(rows, seconds)
        if limit_ms := self.config.engine.gap_ms:
            self.scheduler.rows_max = self._times.rows_within(limit_ms / 1000)

    def _vote(self) -> int:
        return self.scheduler.vote()

    def _empty_cache(self) -> KVCache:
        """Made on a GPU by a program that is kept like the steps."""
        if self.config.platform == "cpu":
            return empty_cache(self.config)
        zeros = functools.partial(zeros_of_cache, self.config)
        lower = lambda: jax.jit(zeros).lower()
        return self._store.obtain("cache", lower, (), jax.eval_shape(zeros))()

    def _shaping(self) -> ShapingRows:
        """On the device; uploaded where it is another one than that of the last step."""
        host, device = self._uploaded
        if host is not self.scheduler.shaping:
            host = self.scheduler.shaping
            device = jax.device_put(host, may_alias=False)
            self._uploaded = host, device
        return device
