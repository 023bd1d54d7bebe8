"""One rank of elastic serving without supervisor or agent: heap, bank and engine, all attached.

`Engine` is measured against static sharding in the same processes. `FixedEngine` runs the same step
with its members compiled in: the steady-state baseline of live membership.
"""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.meeting import Meeting
from benchmarks.static.engine import Weights
from eep_jax.config import RunConfig
from eep_jax.engine.engine import Engine
from eep_jax.engine.step import make_step
from eep_jax.membership.view import Member, RankState, View
from eep_jax.models.expert_bank import slab_layout
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import initial_placement
from eep_jax.tables import build_tables


class FixedEngine(Engine):
    """An engine whose executables have tables, members, epoch and deadline as constants."""

    def warm_up(self) -> None:
        """Compiles for the tables it has; call it after `resume`. Runs nothing."""
        tables, constant = jax.device_get((self._device_tables, self._epoch_call))
        step, _ = make_step(self.config, self._spread)

        def fixed(dense, bank, cache, heap, _, batch, call):
            changing = {name: getattr(call, name) for name in ("round", "vote", "suspicion")}
            call = dataclasses.replace(jax.tree.map(jnp.asarray, constant), **changing)
            return step(dense, bank, cache, heap, jax.tree.map(jnp.asarray, tables), batch, call)

        self._packed.replace_step(fixed)
        self._packed.obtain((self._shaping(), self._device_tables, self._epoch_call))


def open_engine(
    config: RunConfig,
    rank: int,
    weights: Weights,
    meeting: Meeting,
    name: str,
    *,
    redundancy: int,
    fixed: bool = False,
) -> Engine:
    """An engine whose heap has all peers attached, with its experts, ready for its first step.

    `name` is that of the system in the meeting. Raises TimeoutError where a peer does not come.
    """
    cluster, model = config.cluster, config.model
    layout = slab_layout(model, config.engine, cluster.ranks, cluster.slots_per_rank)
    placement = initial_placement(model.experts, cluster.ranks, cluster.slots_per_rank, redundancy)
    engines = []

    def fill(heap) -> None:
        engine = (FixedEngine if fixed else Engine)(config, rank, heap, layout, weights.dense)
        engines.append(engine)
        if not fixed:
            engine.warm_up()
        for slot, expert in enumerate(placement.slots[rank]):
            if expert != EMPTY:
                engine.bank.write(slot, expert, weights.experts[expert])
        engine.lockstep.clear_flags()

    meeting.open_heap(name, layout.slab_bytes, fill)
    (engine,) = engines
    everyone = (Member(RankState.ACTIVE, 1),) * cluster.ranks
    engine.resume(build_tables(View(epoch=1, members=everyone), placement, rank))
    if fixed:
        engine.warm_up()
    return engine
