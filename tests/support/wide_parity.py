"""The parity checkpoints in sizes that the GPU kernels take, with the same logits.

Their D is 32, and kernels need a multiple of 64. Here D is 128: what is added to rows, weights and
biases is zero. The mean that a norm of D channels divides by is then a quarter of what it was, so
its weights are halved, which is exact. F is padded likewise where experts have biases; elsewhere
the bank does it.
"""

import dataclasses

import numpy as np

from eep_jax.config import ModelConfig
from eep_jax.models.weights import dense_names
from tests.support.parity import Reference

HIDDEN, WIDTH = 128, 64
NORMS = ("attention_norm", "moe_norm", "final_norm")  # over D channels


def wide_model(model: ModelConfig) -> ModelConfig:
    """The same model with D = 128, and F a multiple of 64 if it has biases."""
    width = -(-model.expert_hidden // WIDTH) * WIDTH if model.expert_biases else model.expert_hidden
    # Norms of heads have the same epsilon, but are as wide as they were: there it must stay. It is
    # some 1e-6 of the squares that it is added to, so a quarter of it more or less is no error.
    eps = model.norm_eps if model.qk_norm != "none" else model.norm_eps * model.hidden / HIDDEN
    return dataclasses.replace(model, hidden=HIDDEN, expert_hidden=width, norm_eps=eps)


def wide_weights(wanted: Reference) -> tuple[ModelConfig, dict, np.ndarray]:
    """(model, dense weights by name, experts `[E L 3 F D]`), float32."""
    checkpoint = wanted.checkpoint
    old, new = checkpoint.model, wide_model(checkpoint.model)
    shapes, given = dense_names(new), checkpoint.read_dense()
    dense = {name: _padded(given[name], leaf.shape) for name, leaf in shapes.items()}
    for name in dense:
        if name.split("/")[-2] in NORMS:
            dense[name] *= np.sqrt(old.hidden / HIDDEN, dtype=np.float32)
    found = checkpoint.read_experts(list(range(old.experts)))
    return new, dense, np.stack([_wide_expert(found[e], old, new) for e in range(old.experts)])


def _padded(values, shape) -> np.ndarray:
    """`values` in the low corner of zeros of this shape."""
    wide = np.zeros(shape, np.float32)
    wide[tuple(slice(n) for n in np.shape(values))] = values
    return wide


def _wide_expert(expert: np.ndarray, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    layers, matrices, _, hidden = new.expert_shape
    wide = _padded(expert[:, :, : old.expert_hidden], (layers, matrices, new.expert_hidden, hidden))
    if not old.expert_biases:
        return wide
    # Biases are one row after the other of D values, which are as many rows as there need be.
    biases = expert[:, :, old.expert_hidden :].reshape(layers, matrices, -1)
    known = biases[:, :, : max(old.expert_hidden, old.hidden)]
    rows = _padded(known, (layers, matrices, new.bias_rows * hidden))
    return np.concatenate([wide, rows.reshape(layers, matrices, -1, hidden)], axis=2)
