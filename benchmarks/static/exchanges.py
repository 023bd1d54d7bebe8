"""Four ways to spread experts over a fixed mesh with XLA's collectives, inside `shard_map`.

Expert e is in slot `e % S` of rank `e // S`, once. Each function takes what one rank has and gives
`y[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](x[t])` for its own tokens. What belongs
together travels together: rows, ids and weights are one array, so each direction is one collective
(ragged needs one more, for the sizes). The experts are computed by the same kernels as elastic's.

Raises, at compilation, what XLA says where a platform lacks a collective: XLA:CPU has no
`ragged_all_to_all`.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.exchange.call import Call
from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp

AXIS = "ranks"
EXCHANGES = ("psum", "all_to_all", "ring", "ragged_all_to_all")
GPU_ONLY = ("ragged_all_to_all",)
NOWHERE = -1


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of this rank in one layer, and where the others are."""

    bank: Float[Array, "S L 3 F D"]
    layer: int
    ranks: int
    tile_rows: int
    mlp: ExpertMlp = SWIGLU

    @property
    def slots(self) -> int:
        return self.bank.shape[0]

    def partial(
        self,
        rows: Float[Array, "N T D"],
        slots: Int32[Array, "N T K"],
        weights: Float32[Array, "N T K"],
    ) -> Float32[Array, "N T D"]:
        """This rank's part of each row: the weighted sum of the choices in its own slots."""
        results = expert_gemm(
            rows, slots, self.bank, layer=self.layer, tile_rows=self.tile_rows, mlp=self.mlp
        )
        # Results of choices that lie elsewhere may be anything on a GPU, NaN included.
        mine = jnp.where((slots >= 0)[..., None], results.astype(jnp.float32), 0)
        return jnp.sum(weights[..., None] * mine, axis=2)

    def slots_on(self, ids: Int32[Array, "*T K"], rank) -> Int32[Array, "*T K"]:
        """The slots of `rank` that these choices go to; -1 for choices that go elsewhere."""
        return jnp.where((ids >= 0) & (ids // self.slots == rank), ids % self.slots, NOWHERE)


def pack(x, ids, weights) -> Float[Array, "*T W"]:
    """Row, ids and weights side by side in the dtype of x, bit for bit."""
    words = [_as(ids, x.dtype), _as(weights.astype(jnp.float32), x.dtype)]
    return jnp.concatenate([x, *words], axis=-1)


def unpack(packed, hidden: int, choices: int):
    """The inverse: x `[*T D]`, ids and weights `[*T K]`."""
    width = (packed.shape[-1] - hidden) // 2
    x, ids, weights = jnp.split(packed, [hidden, hidden + width], axis=-1)
    back = lambda words, dtype: _from(words, dtype, choices)
    return x, back(ids, jnp.int32), back(weights, jnp.float32)


def _as(values, dtype):
    words = lax.bitcast_convert_type(values, dtype)
    return words.reshape(*values.shape[:-1], -1)


def _from(words, dtype, choices: int):
    if words.shape[-1] != choices:  # several narrow words make one value
        words = words.reshape(*words.shape[:-1], choices, -1)
    return lax.bitcast_convert_type(words, dtype)


def psum(x, ids, weights, experts: Experts):
    """Tokens replicated by an all-gather; every rank adds what its experts give, by a psum."""
    partial = _on_all_tokens(x, ids, weights, experts)
    return lax.psum(partial, AXIS)[lax.axis_index(AXIS)]


def ring(x, ids, weights, experts: Experts):
    """All-gather of tokens, reduce-scatter of results: what NCCL and Gloo do around a ring."""
    partial = _on_all_tokens(x, ids, weights, experts)
    return lax.psum_scatter(partial, AXIS, scatter_dimension=0)


def _on_all_tokens(x, ids, weights, experts: Experts) -> Float32[Array, "R T D"]:
    packed = lax.all_gather(pack(x, ids, weights), AXIS)
    rows, ids, weights = unpack(packed, x.shape[-1], ids.shape[-1])
    return experts.partial(rows, experts.slots_on(ids, lax.axis_index(AXIS)), weights)


def all_to_all(x, ids, weights, experts: Experts):
    """Dense: a place for every token on every rank, there and back."""
    ranks = jnp.arange(experts.ranks)[:, None, None]
    slots = experts.slots_on(ids, ranks)  # [R T K]
    wide = lambda array: jnp.broadcast_to(array, (experts.ranks, *array.shape))
    sent = lax.all_to_all(pack(wide(x), slots, wide(weights)), AXIS, 0, 0)
    partial = experts.partial(*unpack(sent, x.shape[-1], ids.shape[-1]))
    home = lax.all_to_all(partial.astype(x.dtype), AXIS, 0, 0)
    return jnp.sum(home.astype(jnp.float32), axis=0)


def ragged_all_to_all(x, ids, weights, experts: Experts):
    """Only tokens that have a choice on a rank go there; sizes are exchanged first."""
    tokens, hidden = x.shape
    choices, ranks = ids.shape[1], experts.ranks
    slots = experts.slots_on(ids, jnp.arange(ranks)[:, None, None])  # [R T K]
    goes = (slots >= 0).any(axis=-1)  # [R T]
    sizes = goes.sum(axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    most = tokens * min(choices, ranks)
    # Row n of what is sent: pairs (rank, token) that exist, in this order; the rest is not sent.
    rank_of, token_of = jnp.nonzero(goes, size=most, fill_value=0)
    rows = pack(x[token_of], slots[rank_of, token_of], weights[token_of])

    arriving = lax.all_to_all(jnp.stack([sizes, starts], axis=1), AXIS, 0, 0)  # [R 2]
    sizes_here, starts_there = arriving[:, 0], arriving[:, 1]
    me = lax.axis_index(AXIS).astype(jnp.int32)
    region = jnp.arange(ranks, dtype=jnp.int32) * tokens  # where a source's rows begin
    nothing = pack(
        jnp.zeros((ranks * tokens, hidden), x.dtype),
        jnp.full((ranks * tokens, choices), NOWHERE, jnp.int32),
        jnp.zeros((ranks * tokens, choices), jnp.float32),
    )
    sent = lax.ragged_all_to_all(
        rows,
        nothing,
        starts,
        sizes,
        jnp.full(ranks, me * tokens),
        sizes_here,
        axis_name=AXIS,
    )
    arrived = unpack(sent.reshape(ranks, tokens, -1), hidden, choices)
    partial = experts.partial(*arrived).astype(x.dtype).reshape(ranks * tokens, hidden)
    home = lax.ragged_all_to_all(
        partial,
        jnp.zeros((most, hidden), x.dtype),
        region,
        sizes_here,
        starts_there,
        sizes,
        axis_name=AXIS,
    )
    real = (jnp.arange(most) < sizes.sum())[:, None]
    home = jnp.where(real, home.astype(jnp.float32), 0)
    return jnp.zeros((tokens, hidden), jnp.float32).at[token_of].add(home)


def exchange(name: str):
    """The function of that name. Raises ValueError naming those there are."""
    if name not in EXCHANGES:
        raise ValueError(f"exchange {name!r} is not one of {EXCHANGES}")
    return {f.__name__: f for f in (psum, all_to_all, ring, ragged_all_to_all)}[name]


def slots_of(experts: int, ranks: int) -> int:
    """S: slots each rank needs for every expert to be somewhere."""
    return -(-experts // ranks)


def as_run_experts(name: str, ranks: int, tile_rows: int, mlp: ExpertMlp = SWIGLU):
    """The exchange as `make_step` takes it. It drops nothing and suspects no rank."""
    run = exchange(name)

    def run_experts(spread, layer, x, ids, weights, bank, heap, tables, call):
        y = run(x, ids, weights, Experts(bank, layer, ranks, tile_rows, mlp))
        return y, jnp.zeros(len(x), jnp.int32), call

    return run_experts


def no_call(vote=0) -> Call:
    """The Call of a step that exchanges nothing over the heap."""
    zero, no_rank = jnp.uint32(0), jnp.zeros(1, jnp.int32)
    return Call(
        rank=jnp.int32(0),
        active=no_rank,
        epoch=zero,
        round=zero,
        deadline_ms=zero,
        vote=jnp.uint32(vote),
        suspicion=no_rank,
    )
