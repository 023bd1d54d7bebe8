"""Engines that serve a parity checkpoint and keep the logits of every token they sample."""

import functools
import itertools

import numpy as np
from jax.experimental import io_callback

from eep_jax.config import ClusterConfig, EngineConfig, RunConfig
from eep_jax.engine import step as step_module
from eep_jax.engine.engine import Engine
from eep_jax.engine.executables import ExecutableStore
from eep_jax.placement.placement import EMPTY, Placement
from eep_jax.placement.planner import plan_admission, plan_repair
from tests.support.engines import Book, EngineCluster, a_request
from tests.support.loopback import waits_that_know
from tests.support.parity import Reference

WHOLE = "whole"  # name of the requests that decode
_sample = step_module.sample


class ExpertsOnDemand:
    """Reads an expert from the checkpoint when a rank asks for it, as ranks do."""

    def __init__(self, checkpoint):
        self.checkpoint, self.read = checkpoint, []

    def __getitem__(self, expert: int) -> np.ndarray:
        self.read.append(expert)
        return self.checkpoint.read_experts([expert])[expert]


class OneCompilation(ExecutableStore):
    """Steps that the first rank compiles, and the others of this process run as well."""

    def __init__(self):
        super().__init__(None, {})
        self._compiled = {}

    def obtain(self, name: str, lower, arguments: tuple, result):
        if name not in self._compiled:
            self._compiled[name] = super().obtain(name, lower, arguments, result)
        return self._compiled[name]


def parity_run(wanted: Reference, ranks: int, slots_per_rank: int) -> RunConfig:
    return RunConfig(
        name="parity",
        model=wanted.checkpoint.model,
        cluster=ClusterConfig(ranks=ranks, slots_per_rank=slots_per_rank),
        engine=EngineConfig(
            batch_rows=4,
            prefill_tokens=4,
            step_rows=(),
            kv_pages=0,
            row_tile=4,
            context_tokens=48,
            step_deadline_ms=60_000,
        ),
    )


class ParityCluster(EngineCluster):
    """Serves `wanted.prompt` and each beginning of it; keeps logits by (seed, position)."""

    def __init__(self, wanted: Reference, ranks: int, slots_per_rank: int):
        self.wanted, self.logits = wanted, {}
        weights = wanted.checkpoint.read_dense(), ExpertsOnDemand(wanted.checkpoint)
        super().__init__(parity_run(wanted, ranks, slots_per_rank), weights)

    @functools.cached_property
    def _steps_of_all(self) -> ExecutableStore:
        return OneCompilation()

    def begin_with(self, shares: dict[int, int]) -> "ParityCluster":
        """As `begin`, with these ranks alone; a rank has as many experts as its share says."""
        self.book, experts = Book(), iter(range(self.config.model.experts))
        slots = [[EMPTY] * self.layout.slots for _ in self.ranks]
        for rank, share in shares.items():
            self.renew(rank)
            slots[rank][:share] = itertools.islice(experts, share)
        self.change(tuple(shares), Placement(self.config.model.experts, tuple(map(tuple, slots))))
        return self

    def submit(self, members=None) -> dict:
        """One whole request for each rank, and the beginnings of the prompt one after the other."""
        members = members or self.ranks
        prompt, requests = self.wanted.prompt.tolist(), {}
        for rank in members:
            tokens = len(self.wanted.tokens) + 1  # whose last one's logits are the last we know
            requests[f"{WHOLE}{rank}"] = a_request(f"{WHOLE}{rank}", prompt, tokens, seed=rank + 1)
        for length in range(1, len(prompt)):
            name = f"first{length}"
            requests[name] = a_request(name, prompt[:length], 1, seed=100 + length)
        for number, request in enumerate(requests.values()):
            self.engines[members[number % len(members)]].add(request)
        self.logits.clear()
        return requests

    def lose_one_and_take_it_back(self, dead: int, requests: dict) -> None:
        """In mid-generation `dead` is gone; the others repair, go on, and later it is back."""
        survivors = [rank for rank in self.ranks if rank != dead]
        self.step(self.ranks, 6)
        with waits_that_know({dead}):
            self.step_until_discarded(survivors)
        self.change(survivors, plan_repair(self.placement, survivors).placement)
        self.requeue(dead, survivors[0], requests)
        self.step(survivors, 12)
        self.renew(dead)
        plan = plan_admission(self.placement, survivors, [dead], redundancy=1)
        self.change(self.ranks, plan.placement)

    def assert_parity(self, tokens: dict, members=None) -> None:
        """All logits and tokens of the requests of `submit`."""
        wanted = self.wanted
        first = len(wanted.prompt) - 1
        for rank in members or self.ranks:
            assert tokens[f"{WHOLE}{rank}"][:-1] == tuple(wanted.tokens.tolist())
            places = np.arange(first, len(wanted.logits))
            found = np.stack([self.logits[rank + 1, place] for place in places])
            wanted.assert_same(found, places)
        places = np.arange(first)
        found = np.stack([self.logits[101 + place, place] for place in places])
        wanted.assert_same(found, places)

    def _engine(self, rank: int, heap):
        engine = Engine(self.config, rank, heap, self.layout, self.dense, self._steps_of_all)
        # The step is traced and compiled in here.
        step_module.sample = self._sample
        try:
            engine.warm_up()
        finally:
            step_module.sample = _sample
        return engine

    def _sample(self, logits, seeds, positions, temperature, top_p, *narrowing):
        """As the step's own; keeps what it was given."""

        def keep(logits, seeds, positions):
            for row, seed, position in zip(logits, seeds, positions, strict=True):
                self.logits[int(seed[1]), int(position)] = np.array(row)

        io_callback(keep, None, logits, seeds, positions)
        return _sample(logits, seeds, positions, temperature, top_p, *narrowing)
