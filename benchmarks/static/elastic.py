"""One rank of elastic serving without supervisor or agent: heap, bank and engine, all attached.

What `Engine` computes is measured against static sharding, in the same processes. `FixedEngine` is
the same step with its members compiled in: the steady-state baseline of live membership.
"""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp

from benchmarks.static.engine import Weights
from eep_jax.config import RunConfig
from eep_jax.engine.engine import Engine
from eep_jax.engine.step import COMPILER_OPTIONS, StepKind, empty_batch
from eep_jax.heap.open import open_heap
from eep_jax.membership.view import Member, RankState, View
from eep_jax.models.expert_bank import slab_layout
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import initial_placement
from eep_jax.tables import build_tables

EXCHANGE_DEADLINE_S = 120.0


class FixedEngine(Engine):
    """Tables, members, epoch and deadline are constants of its executables."""

    def warm_up(self) -> None:
        """Compiles for the tables it has; call it after `resume`. Runs nothing."""
        tables, constant = jax.device_get((self._device_tables, self._epoch_call))

        def fixed(dense, bank, cache, heap, batch, round, vote):
            call = dataclasses.replace(jax.tree.map(jnp.asarray, constant), round=round, vote=vote)
            known = jax.tree.map(jnp.asarray, tables)
            return self._step(dense, bank, cache, heap, known, batch, call)

        for kind in (StepKind.DECODE, StepKind.MIXED):
            arguments = self._arguments(empty_batch(self.config, kind), StepKind.IDLE)
            jitted = jax.jit(fixed, donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
            self._executables[kind] = jitted.lower(*arguments).compile()

    def _arguments(self, batch, vote: StepKind):
        dense, bank, cache, heap, _, batch, call = super()._arguments(batch, vote)
        return dense, bank, cache, heap, batch, call.round, call.vote


def open_engine(
    config: RunConfig,
    rank: int,
    weights: Weights,
    meeting: pathlib.Path,
    *,
    redundancy: int,
    fixed: bool = False,
) -> Engine:
    """An engine whose heap has all peers attached, with its experts, ready for its first step.

    Handles are passed as files in `meeting`, which all ranks share. Raises TimeoutError where a
    peer does not come.
    """
    cluster, model = config.cluster, config.model
    layout = slab_layout(model, config.engine, cluster.ranks, cluster.slots_per_rank)
    heap = open_heap(rank, cluster.ranks, layout.slab_bytes, jax.default_backend())
    engine = (FixedEngine if fixed else Engine)(config, rank, heap, layout, weights.dense)
    if not fixed:
        engine.warm_up()
    placement = initial_placement(model.experts, cluster.ranks, cluster.slots_per_rank, redundancy)
    for slot, expert in enumerate(placement.slots[rank]):
        if expert != EMPTY:
            engine.bank.write(slot, expert, weights.experts[expert])
    engine.lockstep.clear_flags()
    meeting.mkdir(parents=True, exist_ok=True)
    _write(meeting / f"{rank}.handle", heap.export())
    for peer in set(range(cluster.ranks)) - {rank}:
        heap.attach(peer, _read(meeting / f"{peer}.handle"))
    everyone = (Member(RankState.ACTIVE, 1),) * cluster.ranks
    engine.resume(build_tables(View(epoch=1, members=everyone), placement, rank))
    if fixed:
        engine.warm_up()
    arrive(meeting, rank, cluster.ranks)
    return engine


def arrive(meeting: pathlib.Path, rank: int, ranks: int) -> None:
    """Waits until all ranks are here. Each meeting is a directory of its own."""
    meeting.mkdir(parents=True, exist_ok=True)
    _write(meeting / f"{rank}.here", "")
    for peer in range(ranks):
        _read(meeting / f"{peer}.here")


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.rename(path)


def _read(path: pathlib.Path) -> str:
    ends_s = time.monotonic() + EXCHANGE_DEADLINE_S
    while not path.exists():
        if time.monotonic() > ends_s:
            raise TimeoutError(f"{path} was not written within {EXCHANGE_DEADLINE_S:.0f} s")
        time.sleep(0.01)
    return path.read_text()
