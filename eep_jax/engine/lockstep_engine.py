"""Base of the engines of a rank: tables of the epoch, and agreement on the next step."""

import abc
import dataclasses
from typing import SupportsInt

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.lockstep import Lockstep
from eep_jax.engine.protocol import StepOutcome, WarmUp
from eep_jax.engine.votes import HOLD, IDLE
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import ExpertBank, SlabLayout
from eep_jax.models.moe_block import ExpertSpread, expert_mlp
from eep_jax.tables import Tables, call_of, solo_tables
from pallas_kernels.exchange.call import Call, ExchangeSpec
from pallas_kernels.exchange.signals import first_round


class LockstepEngine(abc.ABC):
    """The part of a RankEngine, which documents the methods, that depends on no kind of work."""

    def __init__(self, config: RunConfig, rank: int, heap: SymmetricHeap, layout: SlabLayout):
        self.config, self.rank, self.heap = config, rank, heap
        self.bank = ExpertBank(layout, heap)
        self.lockstep = Lockstep(layout.window, heap)
        self.steps = self.discarded = 0
        self.bank_array = device_array(heap, layout.bank)
        self._heap_array = heap_argument(heap)
        self._spread = ExpertSpread(
            exchange=ExchangeSpec(layout.window, layout.slots, heap.slab_bytes),
            tile_rows=config.engine.row_tile,
            mlp=expert_mlp(config.model),
        )
        cluster, experts = config.cluster, config.model.experts
        self._take_tables(solo_tables(cluster.ranks, experts, cluster.slots_per_rank, rank))

    @abc.abstractmethod
    def warm_up(self) -> WarmUp: ...

    @abc.abstractmethod
    def advance(self) -> StepOutcome: ...

    @abc.abstractmethod
    def _vote(self) -> int:
        """Rows of the step that the work of this rank needs next; IDLE without work."""

    @property
    def _smallest(self) -> int:
        """Rows of the smallest step."""
        return self.config.engine.step_sizes[0]

    @property
    def epoch(self) -> int:
        return int(self._tables.epoch)

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of the epoch."""
        return tuple(np.flatnonzero(self._tables.active).tolist())

    def quiesce(self) -> None:  # noqa: B027  nothing is under way, unless a subclass says so
        pass

    @property
    def _is_alone(self) -> bool:
        """Whether this is the only rank of the epoch, which agrees with none."""
        return len(self.active) == 1

    def resume(self, tables: Tables) -> None:
        self._take_tables(tables)

    @property
    def paused(self) -> bool:
        return self._next == IDLE

    @property
    def held(self) -> bool:
        return self._next == HOLD

    def vote_hold(self) -> None:
        self._votes_hold = True

    def try_wake(self) -> bool:
        paused_round = int(self._round)
        if self._votes_hold or self._vote() != IDLE:
            self.lockstep.wake_peers([p for p in self.active if p != self.rank], paused_round)
        elif not self.lockstep.is_woken(paused_round):
            return False
        self.lockstep.forget_wakes()
        self._begin_agreement()
        return True

    def _begin_agreement(self) -> None:
        """The rows of steps are agreed anew, from a step on that costs every rank the least."""
        self._next = self._smallest

    def _call(self, vote: int) -> Call:
        """The argument of the exchanges of the next step, in which this rank votes so."""
        vote = np.uint32(self._or_hold(vote))
        return dataclasses.replace(self._epoch_call, round=self._round, vote=vote)

    def _or_hold(self, vote: int) -> int:
        """HOLD once a planned change waits for it, else the vote."""
        return HOLD if self._votes_hold else vote

    def _settle(
        self, suspicion: np.ndarray, next_round: SupportsInt, agreed: SupportsInt
    ) -> StepOutcome:
        """Moves on to the round after a step, and to its rows; or discards the step."""
        if suspicion.any() or self.lockstep.aborted_epoch > self.epoch:
            self.discarded += 1
            accused = set(np.flatnonzero(suspicion).tolist()) - {self.rank}
            return StepOutcome(False, accused=tuple(sorted(accused)))
        self._round, self._next = np.uint32(next_round), int(agreed)
        return StepOutcome(True)

    def _take_tables(self, tables: Tables) -> None:
        """Puts what stays the same for an epoch onto the device, once."""
        self._tables, self._round = tables, np.uint32(first_round(int(tables.epoch)))
        self._votes_hold = False
        self._begin_agreement()
        deadline_ms = self.config.engine.step_deadline_ms
        call = call_of(tables, self.rank, deadline_ms, self.heap.control_address())
        self._device_tables, self._epoch_call = jax.device_put((tables, call))
