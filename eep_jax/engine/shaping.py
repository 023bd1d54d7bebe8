"""Shaping of logits before a draw: penalties, biases, and tokens that are forbidden for now.

What a sequence asks for is in device arrays by batch row, uploaded when such a request is admitted.
The tokens that penalties count are those in the KV cache's pages, so they are the same on every
rank and after every failure. A step without such requests skips all of it.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from eep_jax.engine.request import (
    BAD_WORD_TOKENS_MAX,
    BAD_WORDS_MAX,
    END_TOKENS_MAX,
    LOGIT_BIAS_MAX,
    Request,
)

BIASES_MAX = LOGIT_BIAS_MAX + END_TOKENS_MAX
ALWAYS = 2**31 - 1  # more tokens than any answer has
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingRows:
    """What each batch row asks for; N biases and W bad words of up to M tokens."""

    active: Bool[Array, "B"]  # whether the row asks for anything
    counting: Bool[Array, "B"]  # whether it has a penalty
    prompt_tokens: Int32[Array, "B"]
    top_k: Int32[Array, "B"]  # 0: all
    min_p_log: Float32[Array, "B"]  # -inf: none
    repetition: Float32[Array, "B"]
    presence: Float32[Array, "B"]
    frequency: Float32[Array, "B"]
    bias_ids: Int32[Array, "B N"]  # or NO_TOKEN
    biases: Float32[Array, "B N"]
    bias_until: Int32[Array, "B N"]  # for the tokens before this one of the answer
    words: Int32[Array, "B W M"]  # right-aligned behind NO_TOKEN


@functools.cache
def no_shaping(batch_rows: int) -> ShapingRows:
    """The arrays of rows that ask for nothing."""
    full = lambda value, dtype, *shape: np.full((batch_rows, *shape), value, dtype)
    return ShapingRows(
        active=full(False, np.bool_),
        counting=full(False, np.bool_),
        prompt_tokens=full(0, np.int32),
        top_k=full(0, np.int32),
        min_p_log=full(-np.inf, np.float32),
        repetition=full(1, np.float32),
        presence=full(0, np.float32),
        frequency=full(0, np.float32),
        bias_ids=full(NO_TOKEN, np.int32, BIASES_MAX),
        biases=full(0, np.float32, BIASES_MAX),
        bias_until=full(0, np.int32, BIASES_MAX),
        words=full(NO_TOKEN, np.int32, BAD_WORDS_MAX, BAD_WORD_TOKENS_MAX),
    )


def with_request(
    rows: ShapingRows, batch_row: int, request: Request, end_tokens: frozenset[int]
) -> ShapingRows:
    """`rows` once `request` is in `batch_row`; the same object where that changes nothing."""
    if not (request.shaping.shapes_logits or rows.active[batch_row]):
        return rows
    shaping = request.shaping
    changed = jax.tree.map(np.copy, rows)
    for field in dataclasses.fields(rows):
        neutral = getattr(no_shaping(1), field.name)
        getattr(changed, field.name)[batch_row] = neutral[0]
    if not shaping.shapes_logits:
        return changed
    changed.active[batch_row] = True
    changed.counting[batch_row] = shaping.counts_tokens
    changed.prompt_tokens[batch_row] = len(request.prompt)
    changed.top_k[batch_row] = shaping.top_k
    changed.min_p_log[batch_row] = math.log(shaping.min_p) if shaping.min_p else -np.inf
    changed.repetition[batch_row] = shaping.repetition_penalty
    changed.presence[batch_row] = shaping.presence_penalty
    changed.frequency[batch_row] = shaping.frequency_penalty
    biases = [(token, bias, ALWAYS) for token, bias in shaping.logit_bias]
    if shaping.min_tokens:
        early = sorted(end_tokens.union(shaping.stop_token_ids))
        biases += [(token, -np.inf, shaping.min_tokens) for token in early]
    for index, (token, bias, until) in enumerate(biases):
        changed.bias_ids[batch_row, index] = token
        changed.biases[batch_row, index] = bias
        changed.bias_until[batch_row, index] = until
    for index, word in enumerate(shaping.bad_words):
        changed.words[batch_row, index, -len(word) :] = word
    return changed


def shape_logits(
    logits: Float32[Array, "S V"],
    history: Int32[Array, "S P"],
    positions: Int32[Array, "S"],
    rows: ShapingRows,
) -> Float32[Array, "S V"]:
    """Biases first, then penalties, as vLLM has them; `rows` are those of the S sequences.

    `history[s, p]` is the token at position p, known up to `positions[s]`. A token that a
    repetition penalty r has seen gets logit / r above zero, else logit * r; what the answer has n
    times loses n * frequency, and presence where n > 0.
    """
    at = jnp.arange(history.shape[1])[None]
    known = at <= positions[:, None]
    answered = known & (at >= rows.prompt_tokens[:, None])
    produced = positions + 1 - rows.prompt_tokens
    biases = jnp.where(produced[:, None] < rows.bias_until, rows.biases, 0)
    bans = jnp.where(_matched(history, answered, positions, rows.words), -jnp.inf, 0)
    ids = jnp.concatenate([rows.bias_ids, rows.words[:, :, -1]], axis=1)
    logits = jax.vmap(_add)(logits, ids, jnp.concatenate([biases, bans], axis=1))

    def penalised():
        count = jax.vmap(functools.partial(_count, logits.shape[1]))
        others, own = jnp.moveaxis(count(history, known, answered), 1, 0)
        r = rows.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / r, logits * r)
        shaped = jnp.where(others + own > 0, repeated, logits)
        shaped = shaped - rows.frequency[:, None] * own.astype(jnp.float32)
        return shaped - jnp.where(own > 0, rows.presence[:, None], 0)

    return lax.cond(rows.counting.any(), penalised, lambda: logits)


def _add(logits, ids, values):
    beyond = jnp.where(ids < 0, logits.shape[0], ids)  # is dropped
    return logits.at[beyond].add(values, mode="drop")


def _count(size: int, tokens, known, answered) -> Int32[Array, "2 V"]:
    """How often each token stands in the prompt, and in the answer."""
    bins = jnp.where(known, tokens + size * answered, 2 * size)
    return jnp.zeros(2 * size, jnp.int32).at[bins].add(1, mode="drop").reshape(2, size)


def _matched(history, answered, positions, words) -> Bool[Array, "S W"]:
    """Whether the answer ends with all tokens of a word but its last one."""
    before = words.shape[2] - 1
    places = positions[:, None] - before + 1 + jnp.arange(before)[None]
    take = lambda array: jnp.take_along_axis(array, jnp.maximum(places, 0), axis=1)
    last, valid = take(history), take(answered) & (places >= 0)
    wanted = words[:, :, :-1]
    same = (wanted == last[:, None, :]) & valid[:, None, :]
    return jnp.all((wanted == NO_TOKEN) | same, axis=2)
