"""The tiny checkpoints that transformers wrote, what it computed from them, and how to compare."""

import dataclasses
import functools
import pathlib

import numpy as np

from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from tests.eep_jax.models.make_parity import EXPECTED, FAMILIES

ROOT = pathlib.Path(__file__).parents[1] / "eep_jax" / "models" / "parity"
NAMES = tuple(FAMILIES)
RELATIVE = 1e-4  # of the largest logit; float32 sums in another order differ by some 1e-6


@dataclasses.dataclass(frozen=True)
class Reference:
    """One family: its checkpoint, and transformers' logits for `prompt` and what comes after it."""

    checkpoint: HuggingFaceCheckpoint
    prompt: np.ndarray  # [T]
    tokens: np.ndarray  # [N] that greedy decoding goes on with
    logits: np.ndarray  # [T + N, V] of every position

    def assert_same(self, found: np.ndarray, positions) -> None:
        """`found` `[n V]` are the logits of these positions."""
        wanted = self.logits[positions]
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert error <= RELATIVE, f"{self.checkpoint.root.name}: logits differ by {error:.2e}"


@functools.cache
def reference(name: str, root: pathlib.Path = ROOT) -> Reference:
    with np.load(root / name / EXPECTED) as stored:
        values = {key: stored[key] for key in stored}
    return Reference(
        checkpoint=HuggingFaceCheckpoint(root / name),
        prompt=values["prompt"],
        tokens=values["tokens"],
        logits=np.concatenate([values["prefill"], values["decode"]]),
    )
