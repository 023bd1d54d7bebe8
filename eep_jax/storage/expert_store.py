"""Contract of the sources of all experts: checkpoints, directories, seeds and memory."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eep_jax.config import ModelConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.weights import expert_name
from eep_jax.storage.block_loader import Job
from eep_jax.storage.blocks import Target


@runtime_checkable
class ExpertStore(Protocol):
    """All experts of one model, each readable alone. Implementations inherit the defaults.

    Attributes:
        model: Sizes of the model.
        root: Directory or description, for messages.
        manifest: "dtype" of the stored experts; "experts", their digests by `expert_name`; "facts".
    """

    model: ModelConfig
    root: Any
    manifest: Mapping[str, Any]

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """Reads these experts and nothing else; may block as storage does.

        Args:
            experts: Numbers of experts, each in `0..model.experts - 1`.

        Returns:
            The weights of each, `[L 3 F D]` in the stored dtype; not to be written to.

        Raises:
            CheckpointError: An expert does not exist, is not readable, or has another digest.
        """

    def content_name(self, expert: int) -> str:
        """A string that equal experts share in all processes, and others do not; reads nothing."""
        return self.manifest["experts"][expert_name(expert)]

    def expert_job(self, expert: int, target: Target, in_place: bool) -> Job | None:
        """How to load an expert block by block into `target`; None if it is only read as a whole.

        `in_place`: blocks may be read into the target's own memory.
        """
        return None

    def _require_experts(self, experts: list[int]) -> None:
        """Raises CheckpointError unless the model has all of these."""
        if unknown := [e for e in experts if not 0 <= e < self.model.experts]:
            raise CheckpointError(
                f"{self.root} has no experts {unknown} of {self.model.experts}; they count from 0"
            )


class Lazy(Mapping):
    """Values by name, each computed by `make(name)` whenever it is looked up."""

    def __init__(self, names, make: Callable[[str], Any]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
