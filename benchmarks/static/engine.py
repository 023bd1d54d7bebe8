"""One rank of static sharding: the decoder of `eep_jax`, with its experts spread over a mesh.

Same scheduler, same decoder and batches as `eep_jax/engine/engine.py`. Each step is one program of
all ranks (`jax.distributed`, `shard_map`); it ends when all have taken part, and hangs or fails
when one died. What is passed each step is one array; the cache is donated.
"""

import dataclasses

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.static.exchanges import AXIS, as_run_experts, no_call, slots_of
from eep_jax.config import RunConfig
from eep_jax.engine.packed_step import pack_batch, unpack_batch
from eep_jax.engine.request import Progress
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.step import COMPILER_OPTIONS, empty_batch, make_step
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.kv_cache import empty_cache
from eep_jax.models.moe_block import expert_mlp

# Fields of a batch that are not passed: no step here follows one under way.
APART = ("latest", "shaping")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The model in host memory: dense by name, experts `[L 3 F D]` by number."""

    dense: dict[str, np.ndarray]
    experts: dict[int, np.ndarray]


def mesh_of(devices) -> Mesh:
    """A mesh of one device per rank."""
    return jax.make_mesh(
        (len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,)
    )


class StaticEngine:
    """A rank of a mesh that never changes. `exchange` is one of `exchanges.EXCHANGES`."""

    def __init__(self, config: RunConfig, devices, exchange: str, weights: Weights, *, agree: bool):
        """`agree`: each step also finds the rows of the next one, which serving needs."""
        self.config, self.exchange, self._agree = config, exchange, agree
        self.mesh = mesh_of(devices)
        self.scheduler = Scheduler(config)
        self._here = jax.local_devices()[0]
        self._index = list(devices).index(self._here)
        ranks, engine = len(devices), config.engine
        self._split, self._same = NamedSharding(self.mesh, P(AXIS)), NamedSharding(self.mesh, P())
        run = as_run_experts(exchange, ranks, engine.row_tile, expert_mlp(config.model))
        self._step, dtypes = make_step(config, None, run)
        dense = (weights.dense[name].astype(dtype) for name, dtype in dtypes.items())
        self._dense = [self._everywhere(array) for array in dense]
        self._bank = self._own(self._bank_rows(weights, ranks))
        self._cache = jax.tree.map(self._own, jax.device_get(empty_cache(config)))
        self._compiled = {rows: self._jitted(rows) for rows in engine.step_sizes}
        self.next = engine.step_sizes[0]

    def advance(self, rows: int = 0) -> tuple[Progress, ...]:
        """One step of all ranks, of the rows they agreed on unless some are given."""
        plan = self.scheduler.plan(rows or self.next)
        vote = self.scheduler.vote([plan])
        words = self._own(pack_batch(plan.batch, vote, apart=APART)[None])
        tokens, agreed, self._cache = self._compiled[plan.rows](
            self._dense, self._bank, self._cache, words
        )
        tokens = np.asarray(tokens.addressable_data(0))
        if self._agree:
            found = int(np.asarray(agreed.addressable_data(0))[0])
            # Without work the cheapest step is run.
            self.next = max(found, self.config.engine.step_sizes[0])
        dropped = np.zeros(self.config.engine.batch_rows, np.int32)
        finite = np.ones(len(tokens), np.bool_)
        return tuple(self.scheduler.commit(plan, tokens, dropped, finite))

    def _jitted(self, rows: int):
        like = empty_batch(self.config, rows)
        step, agree = self._step, self._agree

        def local(dense, bank, cache, words):
            (vote,), batch = unpack_batch(words[0], like, 1, apart=APART)
            result = step(dense, bank, cache, None, None, batch, no_call(vote))
            agreed = lax.pmax(vote, AXIS) if agree else vote
            return result.tokens, agreed[None], result.cache

        spread = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(), P(AXIS), P(AXIS), P(AXIS)),
            out_specs=(P(AXIS), P(AXIS), P(AXIS)),
            check_vma=False,
        )
        return jax.jit(spread, donate_argnums=2, compiler_options=COMPILER_OPTIONS)

    def _bank_rows(self, weights: Weights, ranks: int) -> np.ndarray:
        """The experts of this rank, `[S L 3 F D]`, padded as the kernels need them."""
        model, count = self.config.model, slots_of(self.config.model.experts, ranks)
        layout = slab_layout(model, self.config.engine, ranks, count)
        rows = np.zeros((count, *layout.padded_shape), layout.bank.dtype)
        for slot in range(count):
            expert = self._index * count + slot
            if expert < model.experts:
                rows[slot, :, :, : model.expert_shape[2]] = weights.experts[expert]
        return rows

    def _own(self, array: np.ndarray) -> jax.Array:
        """This rank's part of an array that is split along its first axis."""
        shape = (array.shape[0] * self.mesh.size, *array.shape[1:])
        here = jax.device_put(array, self._here)
        return jax.make_array_from_single_device_arrays(shape, self._split, [here])

    def _everywhere(self, array: np.ndarray) -> jax.Array:
        here = jax.device_put(array, self._here)
        return jax.make_array_from_single_device_arrays(array.shape, self._same, [here])
