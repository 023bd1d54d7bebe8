"""A one-layer model of the sizes of `tiny_cpu`, saved as a checkpoint: it compiles fast."""

import dataclasses
import pathlib

import numpy as np

from configs import tiny_cpu
from eep_jax.models.weights import expert_name
from eep_jax.storage.checkpoint import save_checkpoint
from tests.support.models import rounded_weights

MODEL = dataclasses.replace(tiny_cpu.get_config().model, layers=1)
STRONG = 16.0


def save_small(directory: pathlib.Path, liked: tuple[int, ...] = ()) -> str:
    """Writes the checkpoint and returns the flag that serves it.

    Each token chooses those of the experts `liked` whose router logits are positive.
    """
    dense, experts = rounded_weights(MODEL)
    (router,) = [name for name in dense if name.endswith("router/kernel")]
    kernel = np.array(dense[router])
    kernel[..., list(liked)] *= np.asarray(STRONG, kernel.dtype)
    named = {expert_name(expert): weights for expert, weights in enumerate(experts)}
    save_checkpoint(directory, MODEL, dict(dense) | {router: kernel}, named, facts={})
    return f"--checkpoint={directory}"
