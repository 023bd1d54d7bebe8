"""Weights drawn from a seed instead of read: for models without a checkpoint, of any size.

Each weight depends on (seed, its name) alone, so any rank can make any single expert again, and all
get the same bits. Drawing gigabytes would take minutes; a weight draws one pool of normal numbers
and goes around it. The matrices of an expert begin at offsets of their own.
"""

import collections.abc
import functools

import ml_dtypes
import numpy as np

from eep_jax.config import ModelConfig, RunConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.weights import dense_names, expert_name
from eep_jax.relocation.checkpoint import Checkpoint, digest
from eep_jax.relocation.hugging_face import HuggingFaceCheckpoint, is_hugging_face

POOL = 1_048_583  # prime, so that rows of a matrix do not repeat with the pool
STORED = np.dtype(ml_dtypes.bfloat16)
_DENSE, _EXPERT = 0, 1  # kinds of weights, each with streams of its own


class RandomCheckpoint:
    """Reads as a Checkpoint does. Nothing is drawn before it is asked for; the last expert is kept.

    `manifest` has the keys of a Checkpoint's; its digests are computed when they are looked up.
    """

    def __init__(self, model: ModelConfig, seed: int):
        self.model, self.seed, self.root = model, seed, f"random weights of seed {seed}"
        # An expert that was read is compared with its digest next.
        self._draw_expert = functools.lru_cache(maxsize=1)(self._draw_expert)
        self._dense_shapes = {name: leaf.shape for name, leaf in dense_names(model).items()}
        experts = {expert_name(e): e for e in range(model.experts)}
        self.manifest = {
            "dtype": STORED.name,
            "facts": {"random_weights": seed},
            "dense": _Digests(self._dense_shapes, self._draw_dense),
            "experts": _Digests(experts, lambda name: self._draw_expert(experts[name])),
        }

    def require_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError if these weights were made for another model."""
        if self.model != model:
            raise CheckpointError(f"random weights of {self.model} are not those of {model}")

    def content_name(self, expert: int) -> str:
        """As of a Checkpoint; nothing is drawn for it."""
        return f"{POOL} normal numbers of {self.model}, seed {self.seed}, expert {expert}"

    def read_dense(self) -> dict[str, np.ndarray]:
        """All weights outside the experts, by name, bfloat16.

        Norms are ones, the embedding is normal, a kernel `[i, o]` is normal times `i ** -0.5`.
        Biases are zeros.
        """
        return {name: self._draw_dense(name) for name in self._dense_shapes}

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """Just these experts, each bfloat16 `[L 3 F D]`, not to be written to.

        Gate and up are normal times `D ** -0.5`, down is normal times `F ** -0.5`. Raises
        CheckpointError for experts that the model does not have.
        """
        unknown = [e for e in experts if not 0 <= e < self.model.experts]
        if unknown:
            raise CheckpointError(f"there are no experts {unknown} of {self.model.experts}")
        return {expert: self._draw_expert(expert) for expert in experts}

    def _draw_dense(self, name: str) -> np.ndarray:
        shape = self._dense_shapes[name]
        if name.endswith("/scale"):
            return np.ones(shape, STORED)
        if name.endswith(("/bias", "/sinks", "/router_correction")):
            return np.zeros(shape, STORED)
        scale = 1.0 if name.endswith("/embedding") else shape[-2] ** -0.5
        pool = self._stream(_DENSE, *name.encode()).standard_normal(POOL, np.float32)
        return np.resize(_bits(pool * np.float32(scale)), shape).view(STORED)

    def _draw_expert(self, expert: int) -> np.ndarray:
        layers, matrices, rows, columns = shape = self.model.expert_shape
        stream, size = self._stream(_EXPERT, expert), rows * columns
        normal = stream.standard_normal(POOL, np.float32)
        offsets = stream.choice(POOL, (layers, matrices), replace=False)
        weights = np.empty((layers, matrices, size), np.uint16)
        for width, which in ((columns, (0, 1)), (rows, (2,))):
            around = np.resize(_bits(normal * np.float32(width**-0.5)), POOL + size)
            for matrix in which:
                for layer, offset in enumerate(offsets[:, matrix]):
                    weights[layer, matrix] = around[offset : offset + size]
        weights.flags.writeable = False
        return weights.view(STORED).reshape(shape)

    def _stream(self, *name: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *name])))


def _bits(values: np.ndarray) -> np.ndarray:
    """Rounded to the stored dtype, as uint16: NumPy copies that several times as fast."""
    return values.astype(STORED).view(np.uint16)


class _Digests(collections.abc.Mapping):
    """Digest by name of weight; computed at the first look, then remembered."""

    def __init__(self, names, draw):
        self._names = tuple(names)
        self._digest = functools.cache(lambda name: digest(draw(name)))

    def __getitem__(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        return self._digest(name)

    def __contains__(self, name) -> bool:
        return name in self._names

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_checkpoint(config: RunConfig) -> Checkpoint | RandomCheckpoint | HuggingFaceCheckpoint:
    """The weights that a run serves, of the configured model.

    A directory with a manifest is ours, one with a config.json is Hugging Face's: its experts are
    converted to the engine's dtype as they are read.

    Raises CheckpointError where the configuration names none or two, or they are of another model.
    """
    if bool(config.checkpoint) == (config.random_weights is not None):
        found = "both" if config.checkpoint else "neither"
        raise CheckpointError(
            f"{config.name} has {found} of checkpoint={config.checkpoint!r} and "
            f"random_weights={config.random_weights}; set just one: the directory of a checkpoint, "
            "or a seed of weights to draw"
        )
    if config.random_weights is not None:
        return RandomCheckpoint(config.model, config.random_weights)
    if is_hugging_face(config.checkpoint):
        checkpoint = HuggingFaceCheckpoint(config.checkpoint, config.engine.dtype)
    else:
        checkpoint = Checkpoint(config.checkpoint)
    checkpoint.require_model(config.model)
    return checkpoint
