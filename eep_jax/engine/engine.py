"""The engine of one rank that serves requests: plan a batch, run the compiled step, commit tokens.

Executables are compiled ahead of time, one for each number of rows, before the rank offers itself.
They cannot recompile; failure, repair and return only change the values they are called with.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.compilations import CompileCounter
from eep_jax.engine.executables import ExecutableStore, step_facts
from eep_jax.engine.lockstep_engine import LockstepEngine
from eep_jax.engine.protocol import StepOutcome, WarmUp
from eep_jax.engine.request import CacheUse, Progress, Request
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.shaping import ShapingRows
from eep_jax.engine.step import (
    COMPILER_OPTIONS,
    Batch,
    StepResult,
    empty_batch,
    make_step,
    result_like,
)
from eep_jax.engine.step_times import StepTimes
from eep_jax.engine.votes import IDLE
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import SlabLayout
from eep_jax.models.kv_cache import KVCache, empty_cache, zeros_of_cache
from eep_jax.models.weights import put_dense

# Runs of an executable that take longer than others. On a GPU the first loads its kernels, and only
# the next one records the graph that later ones replay: no peer should wait for that.
FIRST_RUNS = {"cpu": 1, "gpu": 3}


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
    ):
        """`dense` are the weights outside the experts by name, as the checkpoint has them.

        `store` keeps the steps for other processes of any rank.
        """
        self.compilations = CompileCounter()
        super().__init__(config, rank, heap, layout)
        self.scheduler = Scheduler(config)
        self._times = StepTimes(config.engine.step_sizes)
        self._chosen = np.zeros(config.model.experts, np.int64)
        self._step, dtypes = make_step(config, self._spread)
        self._dense = put_dense(dense, dtypes)
        self._store = store or ExecutableStore(None, step_facts(config))
        self._cache = self._empty_cache()
        self._uploaded: tuple = None, None  # ShapingRows of the host and of the device
        self._executables = {}
        self._first_runs = FIRST_RUNS[config.platform]
        self._warm_compilations = 0

    def warm_up(self) -> WarmUp:
        started = time.monotonic()
        for rows in self.config.engine.step_sizes:
            arguments = self._arguments(empty_batch(self.config, rows), IDLE)
            jitted = jax.jit(self._step, donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
            self._executables[rows] = self._store.obtain(
                f"rows-{rows}",
                lambda jitted=jitted, arguments=arguments: jitted.lower(*arguments),
                arguments,
                result_like(self._cache),
            )
        ready = time.monotonic()
        for rows in [rows for rows in self._executables for _ in range(self._first_runs)]:
            result = self._run(empty_batch(self.config, rows), IDLE)
            jax.block_until_ready(result.suspicion)
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

    def advance(self) -> StepOutcome:
        started = time.monotonic()
        plan = self.scheduler.plan(self._next)
        result = self._run(plan.batch, self.scheduler.vote_after(plan))
        # One transfer for all: on a GPU each costs more than its bytes.
        suspicion, next_round, agreed, tokens, finite, dropped, chosen = jax.device_get(
            (
                result.suspicion,
                result.round,
                result.agreed,
                result.tokens,
                result.finite,
                result.dropped,
                result.chosen,
            )
        )
        outcome = self._settle(suspicion, next_round, agreed)
        if not outcome.committed:
            return outcome
        self.steps += 1
        self._chosen += chosen
        progress = tuple(self.scheduler.commit(plan, tokens, dropped, finite))
        self._limit_prompts(plan.rows, time.monotonic() - started)
        return StepOutcome(True, progress)

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

    def _run(self, batch: Batch, vote: int) -> StepResult:
        result = self._executables[len(batch.tokens)](*self._arguments(batch, vote))
        # The old cache was donated. Discarding a step keeps the new one: rows are kept by position.
        self._cache = result.cache
        return result

    def _shaping(self) -> ShapingRows:
        """On the device; uploaded where it is another one than that of the last step."""
        host, device = self._uploaded
        if host is not self.scheduler.shaping:
            host = self.scheduler.shaping
            device = jax.device_put(host, may_alias=False)
            self._uploaded = host, device
        return device

    def _arguments(self, batch: Batch, vote: int) -> tuple:
        heap, tables, call = self._heap_array, self._device_tables, self._call(vote)
        batch = dataclasses.replace(batch, shaping=self._shaping())
        return self._dense, self.bank_array, self._cache, heap, tables, batch, call
