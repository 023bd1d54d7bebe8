"""Weights as named arrays: the dense ones by path, each expert as one array over all layers."""

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from eep_jax.config import ModelConfig
from eep_jax.heap.copies import copy_values, empty_aligned
from eep_jax.models.decoder import Decoder, DenseModel


def expert_name(expert: int) -> str:
    """Checkpoint key of one expert: 7 is `e007`."""
    return f"e{expert:03d}"


def dense_names(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of all weights outside the experts, without allocating any."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return dict(_by_path(nnx.state(abstract, nnx.Param)))


def split_model(
    model: DenseModel, config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (dense weights by path, experts by name); an expert is `[L 3 F D]`."""
    dense = {path: np.asarray(leaf) for path, leaf in _by_path(nnx.state(model.decoder, nnx.Param))}
    stacked = np.asarray(model.experts.weights[...])
    return dense, {expert_name(e): stacked[e] for e in range(config.experts)}


def build_dense_model(
    config: ModelConfig,
    dense: Mapping[str, np.ndarray],
    experts: Mapping[str, np.ndarray],
    dtype: DTypeLike = jnp.float32,
) -> DenseModel:
    """Inverse of `split_model`, computing in `dtype`; for the reference and for evaluation."""
    model = nnx.eval_shape(lambda: DenseModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    stacked = np.stack([experts[expert_name(e)] for e in range(config.experts)])

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = _path_name(path)
        values = stacked if name == "experts/weights" else dense[name.removeprefix("decoder/")]
        kept = dtype if name == "experts/weights" else leaf.dtype
        return jnp.asarray(values, kept).reshape(leaf.shape)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def decoder_graph(
    config: ModelConfig, dtype: DTypeLike = jnp.float32
) -> tuple[tuple, dict[str, np.dtype]]:
    """Returns (graphdef, dtypes by name): `merge_decoder` rebuilds it from weights in that order.

    Nearly all have `dtype`, in which the decoder computes.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat, tree = jax.tree_util.tree_flatten_with_path(state)
    return (graph, tree), {_path_name(path): leaf.dtype for path, leaf in flat}


def put_dense(dense: Mapping[str, np.ndarray], dtypes: Mapping[str, np.dtype]) -> list[jax.Array]:
    """Puts the weights of `decoder_graph` on JAX's device, in its order and dtypes.

    A few at a time: `dense` may read a weight on lookup. Raises what the lookup raises.
    """

    def put(name: str) -> jax.Array:
        values = np.asarray(dense[name])
        if values.dtype != dtypes[name]:
            # Aligned, so that a CPU imports it without a copy.
            values, narrow = empty_aligned(values.shape, dtypes[name]), values
            copy_values(values, narrow)
        # Unlike `asarray`, `device_put` compiles no program per shape.
        return jax.device_put(values)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(put, dtypes))


def merge_decoder(graph: tuple, leaves: Sequence[jax.Array]) -> Decoder:
    """Decoder over the given leaves (arrays or tracers), without copies."""
    definition, tree = graph
    return nnx.merge(definition, jax.tree_util.tree_unflatten(tree, leaves))


def _by_path(state: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return [(_path_name(path), leaf) for path, leaf in flat]


def _path_name(path: tuple) -> str:
    keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return "/".join(k for k in keys if k not in ("value", "_value"))
