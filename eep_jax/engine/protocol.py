"""Interface between the agent of a rank and the engine that it drives."""

import dataclasses
import typing

from eep_jax.config import RunConfig
from eep_jax.engine.lockstep import Lockstep
from eep_jax.engine.request import CacheUse, Progress, Request
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.tables import Tables


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """A committed step with its new tokens, or a discarded one with the ranks it timed out on.

    `accused` is empty where the step was aborted because a later epoch is being prepared.
    """

    committed: bool
    progress: tuple[Progress, ...] = ()
    accused: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Origin of the executables of an engine, and the seconds that it took to get them."""

    executables_s: float  # to load or compile them
    run_s: float  # to run each for the first times
    origins: dict[str, str]  # by step: `loaded`, or `compiled: ` and the reason
    compilations: int  # by XLA, of anything, since the engine was made; cache hits excluded


@typing.runtime_checkable
class RankEngine(typing.Protocol):
    """Steps of one rank, in lockstep with the other ranks of the epoch.

    `engine.Engine` serves requests, `library.step_engine.StepEngine` runs a step of the user. Not
    thread-safe: all calls come from one thread, except `lockstep.abort` and `lockstep.nudge`.
    """

    config: RunConfig
    rank: int
    heap: SymmetricHeap
    bank: ExpertBank  # the experts of this rank
    lockstep: Lockstep  # its abort and wake words
    steps: int  # committed
    discarded: int

    def warm_up(self) -> WarmUp:
        """Loads or compiles all executables and runs each alone: no peer takes part."""

    @property
    def compilations_since_start(self) -> int:
        """Compilations after `warm_up`; stays 0 over every change of membership."""

    @property
    def epoch(self) -> int:
        """Epoch of the tables of the last `resume`, 0 before the first."""

    def resume(self, tables: Tables) -> None:
        """Steps under the tables of a new epoch, from its first round.

        Flags must have been cleared since the last step (see `Lockstep.clear_flags`).
        """

    def quiesce(self) -> None:
        """Discards the steps under way, and waits for their ends.

        Call it before the heap changes. Where `held` or `paused` is true, none is under way.
        """

    def advance(self) -> StepOutcome:
        """Runs one step, and perhaps launches the one behind it.

        A discarded one changes nothing, and is run again by the next call.
        """

    @property
    def paused(self) -> bool:
        """All ranks agreed that there is nothing to do."""

    def try_wake(self) -> bool:
        """Ends a pause if this rank or a peer has work; wakes the peers if this rank has."""

    def vote_hold(self) -> None:
        """Votes that all ranks stop at one round, soon; `resume` goes on. Nothing is discarded."""

    @property
    def held(self) -> bool:
        """All ranks agreed to stop for an epoch that is prepared; none steps before it."""

    def add(self, request: Request) -> None:
        """Queues a request. Raises QueueFull or ValueError where it cannot be served here."""

    def cancel(self, request_id: str) -> bool:
        """Drops a request; False if this engine does not have it."""

    def snapshot(self) -> list[Progress]:
        """All tokens of every unfinished request, from the first."""

    def cache_use(self) -> CacheUse | None:
        """Pages of the KV cache; None for an engine that has none."""

    def take_chosen(self) -> tuple[int, ...]:
        """Choices of each expert by the tokens committed here since the last call."""
