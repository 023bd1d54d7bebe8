"""Decode step of one rank of a configuration: its programs, arguments, weights and reference.

All benchmarks of a whole step use this one, whether the rank is alone or among others. Weights are
drawn on the device from seeds, so each rank can draw any expert.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu_timing import Program
from eep_jax.config import RunConfig
from eep_jax.engine.shaping import no_shaping
from eep_jax.engine.step import (
    COMPILER_OPTIONS,
    Batch,
    count_chosen,
    empty_batch,
    make_step,
    with_items,
)
from eep_jax.models.expert_bank import SlabLayout, slab_layout
from eep_jax.models.kv_cache import KVCache, zeros_of_cache
from eep_jax.models.moe_block import (
    ExpertSpread,
    elastic_experts,
    expert_mlp,
    shared_elastic_experts,
)
from eep_jax.models.weights import dense_names
from eep_jax.tables import NO_SLOT, Tables, assign, call_of, solo_tables
from pallas_kernels.exchange.call import Call, ExchangeSpec
from pallas_kernels.exchange.signals import first_round
from pallas_kernels.expert_gemm.reference import expert_gemm_reference

CLOSE = 0.02  # of keys and values behind the first experts, whose results are rounded to bfloat16
AGREEING = 0.5  # of the tokens at least; by chance it is one of the vocabulary
AGREEING_MIN = 8  # tokens; of fewer, too many may be near a tie


@dataclasses.dataclass(frozen=True)
class World:
    """A rank of a configuration; expert e has a slot, in its bank or in that of a peer."""

    config: RunConfig
    rank: int = 0

    @functools.cached_property
    def layout(self) -> SlabLayout:
        cluster = self.config.cluster
        return slab_layout(
            self.config.model, self.config.engine, cluster.ranks, cluster.slots_per_rank
        )

    def spread(self, slab_bytes: int = 0) -> ExpertSpread:
        """As `Engine` makes it; `slab_bytes` where the step gets the head of the heap only."""
        return ExpertSpread(
            exchange=ExchangeSpec(self.layout.window, self.layout.slots, slab_bytes),
            tile_rows=self.config.engine.row_tile,
            mlp=expert_mlp(self.config.model),
        )

    # Arguments.

    @property
    def context_tokens(self) -> int:
        """The tokens of every sequence: half of what there is room for."""
        return self.config.engine.context_tokens // 2

    @property
    def position(self) -> int:
        """The position of the token of this step, in every sequence."""
        return self.context_tokens - 1

    def alone(self, epoch: int, *, others: tuple[int, ...] = (), shift: int = 0) -> Tables:
        """Tables with all experts on this rank, `shift` slots further; `others` are active, too."""
        cluster, experts = self.config.cluster, self.config.model.experts
        solo = solo_tables(cluster.ranks, experts, cluster.slots_per_rank, self.rank)
        active = solo.active.copy()
        active[list(others)] = 1
        slots = solo.expert_slots.copy()
        slots[:, 0] = np.roll(slots[:, 0], shift)
        return dataclasses.replace(solo, epoch=np.uint32(epoch), active=active, expert_slots=slots)

    def together(self, epoch: int) -> Tables:
        """Tables with all ranks, and expert e where static sharding has it: flat slot e, once."""
        cluster, experts = self.config.cluster, self.config.model.experts
        slots = np.full((experts, cluster.ranks), NO_SLOT, np.int32)
        slots[:, 0] = np.arange(experts)
        return Tables(
            epoch=np.uint32(epoch),
            active=np.ones(cluster.ranks, np.int32),
            expert_slots=slots,
            replicas=np.ones(experts, np.int32),
        )

    def call(self, tables: Tables, abort_address: int = 0, deadline_ms: int = 0) -> Call:
        """As `Engine` makes it for the first step of the tables' epoch."""
        deadline_ms = deadline_ms or self.config.engine.step_deadline_ms
        return dataclasses.replace(
            call_of(tables, self.rank, deadline_ms, abort_address),
            round=np.uint32(first_round(int(tables.epoch))),
            vote=np.uint32(self.config.engine.batch_rows),
        )

    def batch(self) -> Batch:
        """A decode step of all sequences, each at the same position; ranks have other tokens."""
        rows = self.config.engine.batch_rows
        tokens = (self.rank * rows + np.arange(rows)) * 97 % self.config.model.vocab_size
        pages = self.config.engine.pages_per_sequence
        batch = dataclasses.replace(
            empty_batch(self.config, rows),
            table=np.arange(rows * pages, dtype=np.int32).reshape(rows, pages),
            tokens=tokens.astype(np.int32),
            batch_rows=np.arange(rows, dtype=np.int32),
            positions=np.full(rows, self.position, np.int32),
            sampled=np.ones(rows, np.bool_),
            shaping=jax.device_put(no_shaping(rows)),
        )
        return with_items(self.config, batch)

    def arguments(self, tables: Tables, heap=None) -> tuple:
        """The arguments of a step, with shapes instead of arrays; `heap`: that of what it gets."""
        shapes, dtypes = dense_names(self.config.model), self.dense_dtypes()
        window, bank = self.layout.window, self.layout.bank
        of = jax.ShapeDtypeStruct
        return (
            [of(shapes[name].shape, dtype) for name, dtype in dtypes.items()],
            of(bank.shape, jnp.dtype(bank.dtype)),
            self.cache_shapes(),
            heap or of((window.ranks, window.window_bytes), jnp.uint8),
            tables,
            self.batch(),
            self.call(tables),
        )

    def cache_shapes(self) -> KVCache:
        return jax.eval_shape(lambda: zeros_of_cache(self.config))

    def dense_dtypes(self) -> dict:
        """The dtypes of the dense weights by name, in the step's order."""
        return make_step(self.config, None)[1]

    # Random weights, drawn on the device.

    def dense(self) -> list[jax.Array]:
        """The dense weights in the step's order, equal on all ranks; they keep variances."""
        shapes = dense_names(self.config.model)
        return [
            _draw_dense(index, name, shapes[name].shape, dtype)
            for index, (name, dtype) in enumerate(self.dense_dtypes().items())
        ]

    def draw_experts(self, experts) -> jax.Array:
        """`[N L 3 F D]` of the bank for N numbers of experts; biases too, and zeros as padding."""
        layout = self.layout
        numbers = np.asarray(experts, np.uint32)
        dtype = jnp.dtype(layout.bank.dtype)
        return draw_experts(numbers, layout.padded_shape, layout.expert_shape[2], dtype)

    def bank(self) -> jax.Array:
        """A bank with expert e in slot e, as far as there are slots."""
        return self.draw_experts(range(self.layout.slots))

    def cache(self, seed: int) -> KVCache:
        """Random keys and values; every rank has its own."""
        shapes, tree = jax.tree.flatten(self.cache_shapes())
        key = jax.random.fold_in(jax.random.key(seed), self.rank)
        drawn = [
            _normal(jax.random.fold_in(key, index % 4), np.float32(1), leaf.shape, leaf.dtype)
            for index, leaf in enumerate(shapes)
        ]
        return jax.tree.unflatten(tree, drawn)

    # Programs.

    def live(self, arguments: tuple, slab_bytes: int = 0) -> Program:
        """The step that serving compiles: everything of the cluster is an argument."""
        step, _ = make_step(self.config, self.spread(slab_bytes))
        return Program(step, arguments, ("cache",), COMPILER_OPTIONS)

    def counting(self, arguments: tuple) -> Program:
        """The same step, whose result has what each layer chose: `chosen` is `[L E]`."""
        on_gpu = self.config.platform == "gpu"
        step = self._counting_step(shared_elastic_experts if on_gpu else elastic_experts)
        return Program(step, arguments, ("cache",), COMPILER_OPTIONS)

    def fixed(self, arguments: tuple, call: Call, slab_bytes: int = 0) -> Program:
        """The same step with the tables of `arguments` and `call` compiled in: members, epoch,
        deadline and addresses. `(dense, bank, cache, heap, batch, round, suspicion) -> result`.
        """
        step, _ = make_step(self.config, self.spread(slab_bytes))
        dense, bank, cache, heap, tables, batch, _ = arguments

        def fixed(dense, bank, cache, heap, batch, round, suspicion):
            constant = jax.tree.map(jnp.asarray, call)
            dynamic = dataclasses.replace(constant, round=round, suspicion=suspicion)
            return step(dense, bank, cache, heap, jax.tree.map(jnp.asarray, tables), batch, dynamic)

        given = (dense, bank, cache, heap, batch, call.round, call.suspicion)
        return Program(fixed, given, ("cache",), COMPILER_OPTIONS)

    def reference(self, arguments: tuple) -> Program:
        """`counting` with `plain_experts`, and a cache that is not donated.

        The bank of `arguments` may have any number of slots, as their tables say.
        """
        return Program(self._counting_step(plain_experts), arguments, (), COMPILER_OPTIONS)

    def _counting_step(self, run_experts):
        chosen: list = []

        def run_and_note(spread, layer, x, ids, *rest):
            chosen.append(ids)
            return run_experts(spread, layer, x, ids, *rest)

        step, _ = make_step(self.config, self.spread(), run_and_note)

        def counting(dense, bank, cache, heap, tables, batch, call):
            chosen.clear()
            result = step(dense, bank, cache, heap, tables, batch, call)
            counts = [count_chosen(ids, self.config.model.experts) for ids in chosen]
            return dataclasses.replace(result, chosen=jnp.stack(counts))

        return counting


def plain_experts(spread: ExpertSpread, layer, x, ids, weights, bank, heap, tables, call):
    """As `elastic_experts` for a rank that is alone, by the expert GEMM's reference in float32."""
    del heap
    slots = assign(ids, tables)
    local = jnp.where(slots >= 0, slots % bank.shape[0], -1)
    wide = x.astype(jnp.float32)[None]

    def of_slot(total, slot):
        mine = jnp.where(local == slot, slot * 0, -1)[None]
        expert = lax.dynamic_slice(bank, (slot, layer, 0, 0, 0), (1, 1, *bank.shape[2:]))[:, 0]
        y = expert_gemm_reference(wide, mine, expert.astype(jnp.float32), spread.mlp)[0]
        return total + y, None

    zero = jnp.zeros((*ids.shape, x.shape[1]), jnp.float32)
    results, _ = lax.scan(of_slot, zero, jnp.arange(bank.shape[0], dtype=jnp.int32))
    travelled = results.astype(spread.exchange.layout.row_dtype).astype(jnp.float32)
    y = jnp.einsum("tk,tkd->td", weights, travelled, precision="highest")
    return y, jnp.sum(slots < 0, axis=1, dtype=jnp.int32), call.next()


def touched_slots(tables: Tables, chosen) -> list[int]:
    """Slots with a row, of each layer, where every expert has one slot; `chosen` is `[L E]`."""
    slots = np.asarray(tables.expert_slots)[:, 0]
    return [len(np.unique(slots[counts > 0])) for counts in np.asarray(chosen)]


def differences(world: World, wanted, tokens, cache: KVCache, close: float = CLOSE) -> list[str]:
    """Descriptions of where tokens and cache of a step differ from the result of `reference`.

    Keys and values behind the first layer with experts depend on these experts alone, so they are
    close; later a rounding may move a token to another expert, so of the tokens only most must be
    equal.
    """
    model = world.config.model
    layer = min(model.dense_layers + 1, model.layers - 1)
    page, offset = divmod(world.position, world.config.engine.page_tokens)
    own, found = world.batch().table[:, page], []
    for name in ("keys", "values"):
        right, got = (
            np.asarray(getattr(c, name)[layer][own, :, offset], np.float32)
            for c in (wanted.cache, cache)
        )
        error = float(np.sqrt(np.mean((right - got) ** 2) / np.mean(right**2)))
        if not error < close:
            found.append(f"{name} of layer {layer} differ from the reference by {error:.3g} of it")
    share = agreeing(wanted.tokens, tokens)
    if len(tokens) >= AGREEING_MIN and share < AGREEING:
        found.append(f"only {share:.0%} of the tokens are those of the reference")
    return found


def agreeing(wanted, tokens) -> float:
    """The part of the tokens that are equal."""
    return float(np.mean(np.asarray(wanted) == np.asarray(tokens)))


def with_layers(config: RunConfig, layers: int) -> RunConfig:
    """The configuration with so many layers at most, then at most one of them dense; 0: all."""
    model = config.model
    if not 0 < layers < model.layers:
        return config
    dense = min(model.dense_layers, 1)
    layers = max(layers, dense + 1)
    changes = {"layers": layers, "dense_layers": dense, "windows": model.windows[:layers]}
    return dataclasses.replace(config, model=dataclasses.replace(model, **changes))


# What cannot be beaten.


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes that a decode step has to read."""

    experts: int
    dense: int
    cache: int

    @property
    def total(self) -> int:
        return self.experts + self.dense + self.cache


def bytes_of(world: World, touched: list[int], context_tokens: int) -> StepBytes:
    """`touched` are slots with a row, of each layer; every sequence has so many tokens.

    The embedding is a few rows, so it is not counted.
    """
    model, engine = world.config.model, world.config.engine
    size = jnp.dtype(engine.dtype).itemsize
    _, matrices, width, hidden = world.layout.padded_shape
    dense = sum(
        math.prod(leaf.shape)
        for name, leaf in dense_names(model).items()
        if not name.endswith("/embedding")
    )
    seen = [min(context_tokens, window or context_tokens) for window in model.windows]
    tokens = sum(seen or [context_tokens] * model.layers)
    return StepBytes(
        experts=sum(touched) * matrices * width * hidden * size,
        dense=dense * size,
        cache=engine.batch_rows * tokens * model.cache_elements // model.layers * size,
    )


def shape_of(world: World) -> dict:
    """The shape of a record."""
    model, engine = world.config.model, world.config.engine
    return {
        "tokens": engine.batch_rows,
        "context_tokens": world.context_tokens,
        "layers": model.layers,
        "hidden": model.hidden,
        "expert_hidden": model.expert_hidden,
        "experts": model.experts,
        "slots": world.layout.slots,
        "top_k": model.experts_per_token,
        "dtype": engine.dtype,
    }


def _draw_dense(index: int, name: str, shape, dtype) -> jax.Array:
    if name.endswith("/scale"):
        return jnp.ones(shape, dtype)
    if name.endswith(("/bias", "/sinks", "/router_correction")):
        return jnp.zeros(shape, dtype)
    scale = 1.0 if name.endswith("/embedding") else shape[-2] ** -0.5
    return _normal(jax.random.key(index), np.float32(scale), tuple(shape), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key, scale, shape, dtype):
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw_experts(numbers, shape, rows: int, dtype=jnp.bfloat16):
    """`[N L 3 F D]`: random experts of these numbers, of `shape`; below `rows` of F are zeros.

    Products with normal rows are of the size of one.
    """
    layers, matrices, padded, hidden = shape
    scale = jnp.array([hidden, hidden, rows], jnp.float32) ** -0.5
    real = (jnp.arange(padded) < rows)[None, :, None]

    def expert(number):
        key = jax.random.fold_in(jax.random.key(0xE), number)
        return lax.map(layer, jax.random.split(key, layers))

    def layer(key):
        normal = jax.random.normal(key, (matrices, padded, hidden), jnp.float32)
        return jnp.where(real, normal * scale[:, None, None], 0).astype(dtype)

    return lax.map(expert, numbers)
