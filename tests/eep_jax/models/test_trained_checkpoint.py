"""The checkpoint in this repository: small, whole, and able to write English."""

import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.tiny_cpu import get_config
from eep_jax.models.weights import build_dense_model
from eep_jax.storage.checkpoint import Checkpoint

PASSAGE = (
    "Give ear, O ye heavens, and I will speak; and hear, O earth, the words of my mouth.\n"
    "My doctrine shall drop as the rain, my speech shall distil as the dew, as the small rain "
    "upon the tender herb, and as the showers upon the grass:\n"
)
NATS_PER_BYTE_MAX = 1.6
BYTES_MAX = 8 << 20


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(get_config().checkpoint)


def test_it_is_of_the_configured_model_and_small(checkpoint):
    checkpoint.require_model(get_config().model)
    files = [f for f in pathlib.Path(checkpoint.root).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= BYTES_MAX
    assert 1_000_000 <= checkpoint.model.parameters <= 3_000_000


def test_its_recorded_loss_is_low_enough(checkpoint):
    assert checkpoint.manifest["facts"]["held_out_nats_per_byte"] <= NATS_PER_BYTE_MAX


def test_it_predicts_english(checkpoint):
    experts = checkpoint.read_experts(list(range(checkpoint.model.experts)))
    named = {f"e{e:03d}": w.astype(np.float32) for e, w in experts.items()}
    dense = {name: w.astype(np.float32) for name, w in checkpoint.read_dense().items()}
    model = build_dense_model(checkpoint.model, dense, named)
    tokens = np.array([[checkpoint.model.bos_token, *PASSAGE.encode()]], np.int32)
    logits, _ = model(jnp.asarray(tokens[:, :-1]))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    assert float(loss) <= NATS_PER_BYTE_MAX
