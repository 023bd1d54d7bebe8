"""Engines of several ranks as threads over loopback heaps, and the books of what they produced."""

import contextlib
import functools

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.engine import Engine
from eep_jax.engine.request import NOT_FINITE, Progress, Request
from eep_jax.engine.scheduler import Scheduler
from eep_jax.heap.loopback import LoopbackHeap, open_all
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.kv_cache import empty_cache
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.tables import build_tables
from tests.support.factories import a_view
from tests.support.loopback import in_threads
from tests.support.models import fill_bank, placed, some_weights

STEPS_MAX = 400


def a_request(name: str = "a", prompt=(3, 1, 4), max_tokens: int = 8, **changes) -> Request:
    """Greedy unless a temperature says otherwise."""
    values = {"temperature": 0.0, "top_p": 1.0, "seed": 7, **changes}
    return Request(id=name, prompt=tuple(prompt), max_tokens=max_tokens, **values)


class Book:
    """All tokens of all requests, as their Progress tells it; one that disagrees is an error."""

    def __init__(self):
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, str] = {}
        self.dropped: dict[str, int] = {}

    def take(self, progress: tuple[Progress, ...]) -> None:
        for part in progress:
            known = self.tokens.get(part.id, ())
            end = part.start + len(part.tokens)
            assert part.id not in self.finished, f"{part.id} goes on after its end"
            adds = len(known) < end or part.finish == NOT_FINITE
            assert part.start <= len(known) and adds, f"{part} does not continue {known}"
            merged = known[: part.start] + part.tokens
            assert merged[: len(known)] == known, f"{part} contradicts {known}"
            self.tokens[part.id] = merged
            self.dropped[part.id] = self.dropped.get(part.id, 0) + part.dropped
            if part.finish:
                self.finished[part.id] = part.finish


class EngineCluster:
    """R engines that serve in lockstep. Each heap and engine is that of one imagined process.

    Their steps overlap, as on GPUs.
    """

    def __init__(self, config: RunConfig, weights: tuple | None = None):
        """`weights` are (dense by name, experts by number); drawn unless given."""
        self.config, cluster, engine = config, config.cluster, config.engine
        self.layout = slab_layout(config.model, engine, cluster.ranks, cluster.slots_per_rank)
        self.dense, self.experts = weights or some_weights(config.model)
        self.heaps = self._open_heaps()
        self.engines = [self._engine(rank, heap) for rank, heap in enumerate(self.heaps)]
        self.epoch, self.placement = 0, placed(config)
        self.book = Book()

    @property
    def ranks(self) -> range:
        return range(self.config.cluster.ranks)

    @property
    def windows(self):
        layout = self.layout.window
        return [layout.views(heap.whole())[heap.rank] for heap in self.heaps]

    def begin(self) -> "EngineCluster":
        """All ranks serve the first placement in a new epoch, with nothing to do and a new book."""
        self.book, self.placement = Book(), placed(self.config)
        for rank in self.ranks:
            self.renew(rank)
        self.change(self.ranks)
        return self

    def change(self, members, placement: Placement | None = None) -> None:
        """What survivors do in a change: detach, attach, load experts, clear flags, resume."""
        self.epoch, self.placement = self.epoch + 1, placement or self.placement
        words = ["active" if rank in members else "absent" for rank in self.ranks]
        view = a_view(" ".join(words), epoch=self.epoch)
        for rank in members:
            self.engines[rank].lockstep.abort(self.epoch)
            self.engines[rank].quiesce()
        for rank in members:
            for peer in set(self.ranks) - {rank}:
                if peer in members:
                    self.heaps[rank].attach(peer, self.heaps[peer].export())
                else:
                    self.heaps[rank].detach(peer)
            fill_bank(self.engines[rank].bank, self.placement.slots[rank], self.experts)
            self.engines[rank].lockstep.clear_flags()
        for rank in members:
            self.engines[rank].resume(build_tables(view, self.placement, rank))

    def abort(self, members) -> None:
        """What the supervisor sends at once: a later epoch is being prepared."""
        for rank in members:
            self.engines[rank].lockstep.abort(self.epoch + 1)

    def renew(self, rank: int) -> None:
        """A new process of `rank` as far as its memory goes, but with the executables it had."""
        engine = self.engines[rank]
        engine.lockstep.abort(self.epoch + 1)
        engine.quiesce()
        engine.scheduler = Scheduler(self.config)
        engine._packed.reset(self._cache())
        for slot in range(self.layout.slots):
            engine.bank.write(slot, EMPTY, np.full(self.layout.expert_shape, np.nan))

    def restart(self, rank: int) -> None:
        """A new process of `rank`: its own heap, and an engine that compiles for itself."""
        self.heaps[rank].close()
        self.heaps[rank] = LoopbackHeap(rank, len(self.ranks), self.layout.slab_bytes)
        self.engines[rank] = self._engine(rank, self.heaps[rank])

    def step(self, members, steps: int) -> None:
        """Runs this many steps on all members; every one must be committed."""
        self._run(members, functools.partial(self._steps, steps=steps))

    def serve(self, members=None) -> dict[str, tuple[int, ...]]:
        """Runs until all members pause together; returns the tokens of all requests."""
        members = self.ranks if members is None else members
        rounds = self._run(members, self._until_paused)
        assert len(set(rounds.values())) <= 1, f"ranks paused at different rounds: {rounds}"
        return self.book.tokens

    def hold(self, wanting, members=None) -> None:
        """Some ranks want a planned change; runs until all hold, at the same round."""
        members = self.ranks if members is None else members
        for rank in wanting:
            self.engines[rank].vote_hold()
        rounds = self._run(members, self._until_held)
        assert len(set(rounds.values())) == 1, f"ranks hold at different rounds: {rounds}"

    def step_until_discarded(self, members) -> dict[int, tuple[int, ...]]:
        """Runs until a step is discarded, which aborts all others; returns the accused by rank."""
        survivors = lambda rank: self._until_discarded(rank, members)
        return self._run(members, survivors)

    def requeue(self, dead: int, target: int, requests: dict[str, Request]) -> None:
        """Gives the requests of a dead rank to another, with the tokens that are known of them."""
        for request_id in sorted(self.engines[dead].scheduler.ids()):
            request, known = requests[request_id], self.book.tokens.get(request_id, ())
            values = vars(request) | {"produced": known}
            self.engines[target].add(Request(**values))

    def _run(self, members, body) -> dict:
        def guarded(rank):
            # Membership is data: from here on nothing may be traced, let alone compiled.
            with jax.no_tracing():
                return body(rank)

        return in_threads({rank: functools.partial(guarded, rank) for rank in members})

    def _steps(self, rank: int, steps: int) -> None:
        for _ in range(steps):
            outcome = self.engines[rank].advance()
            assert outcome.committed, f"rank {rank} accuses {outcome.accused}"
            self.book.take(outcome.progress)

    def _until_paused(self, rank: int) -> int:
        engine = self.engines[rank]
        for _ in range(STEPS_MAX):
            if engine.paused and not engine.try_wake():
                return int(engine._round)
            self._steps(rank, 1)
        raise AssertionError(f"rank {rank} is not done after {STEPS_MAX} steps")

    def _until_held(self, rank: int) -> int:
        engine = self.engines[rank]
        for _ in range(STEPS_MAX * 100):
            if engine.held:
                return int(engine._round)
            if engine.paused and not engine.try_wake():
                engine.lockstep.sleep(engine.lockstep.doorbell(), 1)
                continue
            self._steps(rank, 1)
        raise AssertionError(f"rank {rank} does not hold")

    def _until_discarded(self, rank: int, members) -> tuple[int, ...]:
        for _ in range(STEPS_MAX):
            outcome = self.engines[rank].advance()
            if not outcome.committed:
                self.abort(members)
                return outcome.accused
            self.book.take(outcome.progress)
        raise AssertionError(f"rank {rank} discarded nothing in {STEPS_MAX} steps")

    def _open_heaps(self) -> list:
        return open_all(self.config.cluster.ranks, self.layout.slab_bytes)

    def _engine(self, rank: int, heap) -> Engine:
        engine = Engine(self.config, rank, heap, self.layout, self.dense, overlap=True)
        engine.warm_up()
        return engine

    def _cache(self):
        return empty_cache(self.config)


@contextlib.contextmanager
def compiling_nothing(engines):
    """Fails where one of these engines saw a compilation inside."""
    before = [engine.compilations_since_start for engine in engines]
    yield
    assert [engine.compilations_since_start for engine in engines] == before
