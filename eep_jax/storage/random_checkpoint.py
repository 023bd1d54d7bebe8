"""Random weights, drawn on the device from a seed: for models without a checkpoint.

Each weight depends on (seed, its name) alone, so any rank can draw any expert again, and ranks on
devices of one kind get the same bits: digests stay valid over repair and return. A device draws one
matrix at a time, which bounds its memory.
"""

import collections.abc
import functools
import pathlib
import threading
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eep_jax.config import ModelConfig, RunConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.weights import dense_names, expert_name
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.digests import digest
from eep_jax.storage.expert_store import ExpertStore, Lazy
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint, is_hugging_face
from eep_jax.storage.learned_digests import LearnedDigests

STORED = np.dtype(ml_dtypes.bfloat16)
_DENSE, _EXPERT = 0, 1  # kinds of weights, each with streams of its own


@functools.partial(jax.jit, static_argnames="shape")
def draw_normal(seed, kind, name, number, scale, *, shape: tuple[int, ...]):
    """Normal numbers times `scale`, bfloat16, determined by (seed, kind, name, number)."""
    key = jax.random.key(seed)
    for part in (kind, name, number):
        key = jax.random.fold_in(key, part)
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(STORED)


class RandomCheckpoint(ExpertStore):
    """An ExpertStore of drawn weights. It draws on demand and caches the last expert.

    Digests in `manifest` are computed when they are looked up.

    Args:
        model: Sizes of the model.
        seed: Determines all weights.
    """

    def __init__(self, model: ModelConfig, seed: int):
        self.model, self.seed, self.root = model, seed, f"random weights of seed {seed}"
        # A caller reads an expert and then compares its digest.
        self._draw_expert = functools.lru_cache(maxsize=1)(self._draw_expert)
        self._dense_shapes = {name: leaf.shape for name, leaf in dense_names(model).items()}
        self._dense = Lazy(self._dense_shapes, self._draw_dense)
        experts = {expert_name(e): e for e in range(model.experts)}
        self.manifest = {
            "dtype": STORED.name,
            "facts": {"random_weights": seed},
            "dense": Lazy(self._dense_shapes, functools.cache(lambda n: digest(self._dense[n]))),
            "experts": Lazy(
                experts, functools.cache(lambda n: digest(self._draw_expert(experts[n])))
            ),
        }
        self._one_draw = threading.Lock()  # several at a time would need memory for each
        # A rank that serves may have to draw an expert, but must not compile any more.
        self._draw_matrix = self._compile_draw((model.expert_hidden, model.hidden))

    def require_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError if these weights were drawn for another model."""
        if self.model != model:
            raise CheckpointError(f"{self.root} are of {self.model}, expected {model}")

    def content_name(self, expert: int) -> str:
        """See ExpertStore; draws nothing."""
        drawn = f"normal numbers of JAX {jax.__version__} on {jax.default_backend()}"
        return f"{drawn} for {self.model}, seed {self.seed}, expert {expert}"

    def read_dense(self) -> collections.abc.Mapping[str, np.ndarray]:
        """All weights outside the experts, by name, bfloat16, each drawn when it is looked up.

        Norms are ones, the embedding is normal, a kernel `[i, o]` is normal times `i ** -0.5`.
        Biases are zeros.
        """
        return self._dense

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """See ExpertStore; bfloat16.

        Gate and up are normal times `D ** -0.5`, down is normal times `F ** -0.5`; biases, in the
        rows below them, are zeros.
        """
        self._require_experts(experts)
        return {expert: self._draw_expert(expert) for expert in experts}

    def _draw_dense(self, name: str) -> np.ndarray:
        shape = self._dense_shapes[name]
        if name.endswith("/scale"):
            return np.ones(shape, STORED)
        if name.endswith(("/bias", "/sinks", "/router_correction")):
            return np.zeros(shape, STORED)
        scale = 1.0 if name.endswith("/embedding") else shape[-2] ** -0.5
        return self._draw(draw_normal, _DENSE, zlib.crc32(name.encode()), 0, scale, shape=shape)

    def _draw_expert(self, expert: int) -> np.ndarray:
        model = self.model
        layers, matrices, _, _ = model.expert_shape
        weights = np.zeros(model.expert_shape, STORED)
        for number in range(layers * matrices):
            layer, matrix = divmod(number, matrices)
            width = model.expert_hidden if matrix == matrices - 1 else model.hidden
            found = self._draw(self._draw_matrix, _EXPERT, expert, number, width**-0.5)
            weights[layer, matrix, : model.expert_hidden] = found
        weights.flags.writeable = False
        return weights

    def _draw(self, draw, kind: int, name: int, number: int, scale: float, **shape) -> np.ndarray:
        with self._one_draw:
            return np.asarray(draw(*_arguments(self.seed, kind, name, number, scale), **shape))

    def _compile_draw(self, shape: tuple[int, ...]):
        return draw_normal.lower(*_arguments(self.seed, 0, 0, 0, 1.0), shape=shape).compile()


def _arguments(seed: int, kind: int, name: int, number: int, scale: float) -> tuple:
    return (np.uint32(seed), *map(np.uint32, (kind, name, number)), np.float32(scale))


def open_checkpoint(config: RunConfig) -> Checkpoint | RandomCheckpoint | HuggingFaceCheckpoint:
    """Opens the weights that a run serves.

    A directory with manifest.json is our own checkpoint; one with config.json is Hugging Face's,
    whose experts are converted to the engine's dtype as they are read.

    Args:
        config: `checkpoint` names the directory, or `random_weights` the seed.

    Returns:
        The opened weights, of `config.model`.

    Raises:
        CheckpointError: The configuration names both or neither, or weights of another model.
    """
    if bool(config.checkpoint) == (config.random_weights is not None):
        found = "both" if config.checkpoint else "neither"
        raise CheckpointError(
            f"{config.name} has {found} of checkpoint={config.checkpoint!r} and "
            f"random_weights={config.random_weights}; set just one: the directory of a "
            "checkpoint, or the seed of weights to draw"
        )
    if config.random_weights is not None:
        return RandomCheckpoint(config.model, config.random_weights)
    if is_hugging_face(config.checkpoint):
        learned = LearnedDigests(pathlib.Path(config.checkpoint))
        checkpoint = HuggingFaceCheckpoint(config.checkpoint, config.engine.dtype, learned)
    else:
        checkpoint = Checkpoint(config.checkpoint)
    checkpoint.require_model(config.model)
    return checkpoint
