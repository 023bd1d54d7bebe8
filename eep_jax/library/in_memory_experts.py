"""Store of experts that the user has in memory."""

import os

import numpy as np

from eep_jax.config import ModelConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.weights import expert_name
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.digests import digest
from eep_jax.storage.expert_store import ExpertStore


class InMemoryExperts(ExpertStore):
    """An ExpertStore of arrays: `experts[name]` is `[L 3 F D]`, converted to `dtype` once.

    Raises CheckpointError naming the experts that are missing or of another shape than the model's.
    """

    def __init__(self, experts: dict[str, np.ndarray], model: ModelConfig, dtype: np.dtype):
        self.model, self.root = model, "the given experts"
        names = [expert_name(e) for e in range(model.experts)]
        shapes = {name: np.shape(array) for name, array in experts.items()}
        wrong = [n for n in names if shapes.get(n) != model.expert_shape] + [
            n for n in shapes if n not in names
        ]
        if wrong:
            found = {name: shapes.get(name, "missing") for name in wrong}
            raise CheckpointError(
                f"experts {found} are not as the run is configured: {names[0]}..{names[-1]}, each "
                f"[L 3 F D] = {model.expert_shape}; see expert_arrays"
            )
        self._experts = {name: np.asarray(experts[name]).astype(dtype) for name in names}
        digests = {name: digest(array) for name, array in self._experts.items()}
        self.manifest = {"dtype": np.dtype(dtype).name, "facts": {}, "experts": digests}

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """These experts, `[L 3 F D]`. Raises CheckpointError for unknown ones."""
        self._require_experts(experts)
        return {e: self._experts[expert_name(e)] for e in experts}


def open_experts(
    experts: dict[str, np.ndarray] | str | os.PathLike, model: ModelConfig, dtype: np.dtype
) -> InMemoryExperts | Checkpoint:
    """Experts by name in memory, or those of a checkpoint directory written by save_checkpoint.

    Raises CheckpointError where they are not `model.experts` of `model.expert_shape`.
    """
    if not isinstance(experts, str | os.PathLike):
        return InMemoryExperts(experts, model, dtype)
    checkpoint = Checkpoint(experts)
    found, wanted = checkpoint.model, model
    if (found.experts, found.expert_shape) != (wanted.experts, wanted.expert_shape):
        raise CheckpointError(
            f"{checkpoint.root} holds {found.experts} experts [L 3 F D] = {found.expert_shape}; "
            f"the run is configured for {wanted.experts} of {wanted.expert_shape}"
        )
    return checkpoint
