"""A small checkpoint on disk, copied for each test that damages it."""

import shutil

import pytest

from eep_jax.heap import loopback
from eep_jax.models.weights import expert_name
from eep_jax.storage.checkpoint import save_checkpoint
from tests.support.models import a_model, rounded_weights


@pytest.fixture(scope="session")
def pristine_checkpoint(tmp_path_factory):
    model = a_model()
    dense, experts = rounded_weights(model)
    named = {expert_name(e): experts[e] for e in range(model.experts)}
    root = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(root, model, dense, named, facts={"steps": 3})
    return root


@pytest.fixture
def checkpoint_dir(pristine_checkpoint, tmp_path):
    return shutil.copytree(pristine_checkpoint, tmp_path / "copy")


@pytest.fixture(autouse=True, scope="module")
def heaps_are_closed():
    """Closes the heaps that a module's tests opened: each holds files and memory."""
    before = set(loopback._open_heaps)
    yield
    for name, heap in list(loopback._open_heaps.items()):
        if name not in before:
            heap.close()
