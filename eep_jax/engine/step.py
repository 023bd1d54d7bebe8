"""The compiled step: (weights, bank, cache, heap, tables, batch, call) -> StepResult."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from eep_jax.config import RunConfig
from eep_jax.engine.sampler import sample
from eep_jax.engine.shaping import ShapingRows, shape_logits
from eep_jax.models.decoder import add
from eep_jax.models.kv_cache import KVCache
from eep_jax.models.moe_block import ExpertSpread, elastic_experts, shared_elastic_experts
from eep_jax.models.weights import decoder_graph, merge_decoder
from eep_jax.tables import Tables
from pallas_kernels.attention.api import fits as fits_items
from pallas_kernels.attention.plan import FIELDS, items_max, plan_items
from pallas_kernels.exchange.call import Call

# Rounds every bfloat16 where the step does. XLA would skip roundings inside fusions, which differ
# between a prefill and a decode step, and so would their bits.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def attends_by_items(config: RunConfig) -> bool:
    """Whether attention of this model runs by work items, and its step as a whole, not by tiles."""
    model = config.model
    heads = model.query_heads, model.kv_heads, model.head_dim
    return (
        config.platform == "gpu"
        and model.latent is None
        and fits_items(*heads, config.engine.page_tokens)
    )


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of one step. A row with position -1 is empty.

    T rows are of any sequences: one for a sequence that decodes, more for one whose prompt is read.
    At most S = min(T, B) sequences take part, and each may sample one token.
    """

    tokens: Int32[Array, "T"]
    from_latest: Bool[Array, "T"]  # rows whose token is that of `latest` instead
    latest: Int32[Array, "B"]  # the last token that each batch row sampled: of the step before
    batch_rows: Int32[Array, "T"]  # batch row of each row
    positions: Int32[Array, "T"]
    table: Int32[Array, "B J"]  # pages of the sequence in each batch row, see `KVCache`
    last_rows: Int32[Array, "S"]  # rows whose logits give the next tokens
    sampled: Bool[Array, "S"]  # whether they do in this step
    seeds: UInt32[Array, "S 2"]
    temperature: Float32[Array, "S"]
    top_p: Float32[Array, "S"]
    # What attention does, where it runs by items (see `pallas_kernels.attention.plan`); else None.
    items: Int32[Array, "W 5"] | None = None
    items_count: Int32[Array, "1"] | None = None
    # What sequences ask for beyond temperature and top_p; None: a step that has no such things.
    shaping: ShapingRows | None = None


@jax.tree_util.register_dataclass
@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of a step, provisional until the host finds `suspicion` zero."""

    tokens: Int32[Array, "S"]
    latest: Int32[Array, "B"]  # that of the batch, with these tokens
    finite: Bool[Array, "S"]  # whether the logits behind each token are numbers
    cache: KVCache
    suspicion: Int32[Array, "R"]
    round: UInt32[Array, ""]  # the round of the next step
    agreed: UInt32[Array, ""]  # the largest vote: rows of the next step, or one of `votes`
    dropped: Int32[Array, "B"]  # choices without a live expert, over the rows of each batch row
    chosen: Int32[Array, "E"]  # how often each expert was chosen, over all rows and layers


def make_step(config: RunConfig, spread: ExpertSpread | None, run_experts=None):
    """Returns (step, dtypes): the function to compile, and the dtype of each dense weight by name.

    Everything that can change while serving is an argument; nothing of the cluster is closed over.
    `run_experts` takes the place of `elastic_experts`, same arguments and results: the benchmarks
    compare this step with one whose experts are spread over a fixed mesh.
    """
    graph, dtypes = decoder_graph(config.model, jnp.dtype(config.engine.dtype))
    tile = config.engine.row_tile
    on_gpu, by_items = config.platform == "gpu", attends_by_items(config)
    # Where kernels keep a row's bits for any number of rows, nothing is cut into tiles.
    whole = lambda function, *arrays: function(*arrays)
    by_rows = whole if by_items else lambda function, *arrays: by_tile(function, tile, *arrays)
    run_experts = run_experts or (shared_elastic_experts if on_gpu else elastic_experts)
    number = jnp.int32 if on_gpu else int

    def step(dense, bank, cache, heap, tables: Tables, batch: Batch, call: Call) -> StepResult:
        decoder = merge_decoder(graph, dense)
        latest = jnp.asarray(batch.latest)
        known = jnp.where(batch.from_latest, latest[batch.batch_rows], batch.tokens)
        x = decoder.embed(known)
        visible = jnp.maximum(batch.positions, 0)
        places = cache.places_of(batch.table, batch.batch_rows, batch.positions)
        cache = cache.write_tokens(places, known)
        dropped, chosen = jnp.zeros(batch.tokens.shape, jnp.int32), []
        for index, layer in enumerate(decoder.layers):
            q, k, v = by_rows(layer.before_attention, x, visible)
            cache = cache.write(index, places, k, v)
            kept = cache.keys[index], cache.values[index], batch.table
            after = layer.after_attention if layer.routed else layer.finish

            def attend(x, q, batch_rows, positions, kept=kept, layer=layer, after=after):
                return after(x, layer.attention.attend(q, *kept, batch_rows, positions))

            if by_items:
                work = batch.positions, batch.items, batch.items_count
                parts = after(x, layer.attention.attend_items(q, *kept, *work))
            else:
                parts = by_rows(attend, x, q, batch.batch_rows, visible)
            if not layer.routed:
                x = parts
                continue
            x, normed, ids, weights = parts
            # An empty row has no expert.
            ids_or_none = jnp.where(batch.positions[:, None] >= 0, ids, -1)
            parts = normed, ids_or_none, weights, bank, heap, tables, call
            y, lost, call = run_experts(spread, number(layer.index), *parts)
            x, dropped = add(x, y), dropped + lost
            chosen.append(ids_or_none)
        logits = by_rows(decoder.logits, x[batch.last_rows])
        finite = jnp.all(jnp.isfinite(logits), axis=-1)
        tokens = next_tokens(logits, cache, batch)
        by_batch_row = jnp.zeros(len(batch.table), jnp.int32)
        real = jnp.where(batch.positions >= 0, dropped, 0)
        sampled_by = batch.batch_rows[batch.last_rows]
        nowhere = len(latest)
        return StepResult(
            tokens=tokens,
            latest=latest.at[jnp.where(batch.sampled, sampled_by, nowhere)].set(
                tokens, mode="drop"
            ),
            finite=finite,
            cache=cache,
            suspicion=call.suspicion,
            round=call.round,
            agreed=call.vote,
            dropped=by_batch_row.at[batch.batch_rows].add(real, mode="drop"),
            chosen=count_chosen(jnp.stack(chosen), config.model.experts),
        )

    return step, dtypes


def next_tokens(logits: Float[Array, "S V"], cache: KVCache, batch: Batch) -> Int32[Array, "S"]:
    """The token behind each of the last rows."""
    at = batch.positions[batch.last_rows]
    how = batch.seeds, at, batch.temperature, batch.top_p
    if batch.shaping is None:
        return sample(logits, *how)
    own = batch.batch_rows[batch.last_rows]

    def shaped(logits):
        rows = jax.tree.map(lambda array: array[own], batch.shaping)
        return shape_logits(logits, cache.history(batch.table[own]), at, rows)

    # An empty row is of batch row 0, whatever that asks for.
    wanted = batch.shaping.active[own] & (at >= 0)
    logits = lax.cond(wanted.any(), shaped, lambda same: same, logits.astype(jnp.float32))
    return sample(logits, *how, batch.shaping.top_k[own], batch.shaping.min_p_log[own])


def count_chosen(ids: Int32[Array, "*L T K"], experts: int) -> Int32[Array, "E"]:
    """The number of occurrences of each expert; -1 counts for none."""
    bins = jnp.where(ids >= 0, ids, experts)  # the last one is dropped
    return jnp.zeros(experts, jnp.int32).at[bins.reshape(-1)].add(1, mode="drop")


def by_tile(function, tile_rows: int, *arrays):
    """`function` over tiles of `tile_rows` rows of the leading axis, one after the other.

    Every product then has the same shape in a decode and in a prefill step, and a token's result
    the same bits in both, wherever it stands: XLA:CPU picks its loops, and so the order of sums, by
    shape.
    """
    rows = arrays[0].shape[0]
    if rows == tile_rows:
        return function(*arrays)
    tiles = [a.reshape(rows // tile_rows, tile_rows, *a.shape[1:]) for a in arrays]
    out = lax.map(lambda parts: function(*parts), tuple(tiles))
    return jax.tree.map(lambda a: a.reshape(rows, *a.shape[2:]), out)


def empty_batch(config: RunConfig, rows: int) -> Batch:
    """A batch without tokens, by which a rank without work takes part in a step of T rows."""
    engine, work = config.engine, {}
    sequences = min(rows, engine.batch_rows)
    if attends_by_items(config):
        shape = rows, engine.batch_rows, engine.context_tokens, config.model.heads_per_key
        work["items"] = np.zeros((items_max(*shape), len(FIELDS)), np.int32)
        work["items_count"] = np.zeros(1, np.int32)
    return Batch(
        **work,
        tokens=np.zeros(rows, np.int32),
        from_latest=np.zeros(rows, np.bool_),
        latest=np.zeros(engine.batch_rows, np.int32),
        batch_rows=np.zeros(rows, np.int32),
        positions=np.full(rows, -1, np.int32),
        table=np.zeros((engine.batch_rows, engine.pages_per_sequence), np.int32),
        last_rows=np.arange(sequences, dtype=np.int32),
        sampled=np.zeros(sequences, np.bool_),
        seeds=np.zeros((sequences, 2), np.uint32),
        temperature=np.zeros(sequences, np.float32),
        top_p=np.ones(sequences, np.float32),
    )


def with_items(config: RunConfig, batch: Batch) -> Batch:
    """Fills in what attention does for these tokens, where it runs by items."""
    if batch.items is None:
        return batch
    found = plan_items(batch.batch_rows, batch.positions, config.model.heads_per_key)
    batch.items[: len(found)], batch.items_count[0] = found, len(found)
    return batch
