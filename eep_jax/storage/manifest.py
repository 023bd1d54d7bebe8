"""Manifest of a directory of weights, read without loading JAX or any weight."""

import json
import pathlib

from eep_jax.errors import CheckpointError
from eep_jax.model_config import ModelConfig, model_from_values
from eep_jax.models.families.registry import CONFIG as HUGGING_FACE_CONFIG
from eep_jax.models.families.registry import read_model as read_hugging_face_model

MANIFEST = "manifest.json"


def read_manifest(directory) -> tuple[dict, ModelConfig]:
    """manifest.json of our own checkpoint and its model. Raises CheckpointError."""
    root = pathlib.Path(directory).absolute()
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        return manifest, model_from_values(manifest["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{root} is not a checkpoint: {error!r}; expected {MANIFEST} and weights/ as "
            f"launch.convert or launch.train_tiny write them, or {HUGGING_FACE_CONFIG} of "
            "Hugging Face"
        ) from error


def read_model(directory) -> ModelConfig:
    """The model of our own checkpoint or a Hugging Face directory. Raises CheckpointError."""
    root = pathlib.Path(directory).absolute()
    if not (root / MANIFEST).exists() and (root / HUGGING_FACE_CONFIG).exists():
        return read_hugging_face_model(root)
    return read_manifest(root)[1]
