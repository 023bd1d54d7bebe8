"""Contract of all expert stores: one class of tests for four implementations."""

import numpy as np
import pytest

from eep_jax.errors import CheckpointError
from eep_jax.library.in_memory_experts import InMemoryExperts
from eep_jax.models.weights import expert_name
from eep_jax.storage.block_loader import BlockLoader
from eep_jax.storage.blocks import ArrayTarget
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.digests import digest
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from eep_jax.storage.random_checkpoint import RandomCheckpoint
from tests.support.hf_directories import write_directory
from tests.support.models import a_model, rounded_weights


@pytest.fixture(scope="module")
def hugging_face_directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("hugging_face"))


@pytest.fixture(params=["checkpoint", "Hugging Face", "random", "in memory"])
def stores(request, pristine_checkpoint, hugging_face_directory):
    """The same experts, opened twice."""
    experts = dict(enumerate(rounded_weights(a_model())[1]))
    named = {expert_name(expert): weights for expert, weights in experts.items()}
    open_one = {
        "checkpoint": lambda: Checkpoint(pristine_checkpoint),
        "Hugging Face": lambda: HuggingFaceCheckpoint(hugging_face_directory),
        "random": lambda: RandomCheckpoint(a_model(), 3),
        "in memory": lambda: InMemoryExperts(named, a_model(), np.dtype("float32")),
    }[request.param]
    return open_one(), open_one()


class TestExpertStore:
    def test_any_expert_is_read_alone_in_the_stored_dtype(self, stores):
        store, other = stores
        for expert in (store.model.experts - 1, 0):
            found = store.read_experts([expert])
            assert found.keys() == {expert}
            assert found[expert].shape == store.model.expert_shape
            assert found[expert].dtype == np.dtype(store.manifest["dtype"])
            again = other.read_experts([0, expert])[expert]
            assert digest(again) == digest(found[expert])

    def test_no_experts_are_nothing_to_read(self, stores):
        assert stores[0].read_experts([]) == {}

    def test_the_manifest_has_the_digest_of_every_expert(self, stores):
        store, other = stores
        digests = store.manifest["experts"]
        assert list(digests) == [expert_name(e) for e in range(store.model.experts)]
        assert len(digests) == store.model.experts and "e999" not in digests
        with pytest.raises(KeyError):
            digests["e999"]
        for expert in (0, 3):
            weights = other.read_experts([expert])[expert]
            assert digests[expert_name(expert)] == digest(weights)

    def test_experts_that_the_model_lacks_are_named_with_their_number(self, stores):
        store = stores[0]
        count = store.model.experts
        with pytest.raises(CheckpointError, match=rf"has no experts \[.*{count}.*\] of {count}"):
            store.read_experts([1, count])
        with pytest.raises(CheckpointError, match=r"has no experts \[-1\]"):
            store.read_experts([-1])

    def test_a_content_name_is_shared_by_equal_experts_only(self, stores):
        first, second = ({e: s.content_name(e) for e in range(s.model.experts)} for s in stores)
        assert first == second and len(set(first.values())) == len(first)

    def test_an_expert_that_is_loaded_block_by_block_is_the_one_that_is_read(self, stores):
        store = stores[0]
        out = np.zeros(store.model.expert_shape, store.manifest["dtype"])
        job = store.expert_job(2, ArrayTarget(out), in_place=False)
        if job is None:
            return  # the store reads whole experts only
        (done,) = BlockLoader().load([job])
        assert done is job and job.error is None
        assert digest(out) == digest(store.read_experts([2])[2])
