"""Promises of random weights: determined by the seed, each expert drawn alone."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from eep_jax.engine.compilations import CompileCounter
from eep_jax.errors import CheckpointError
from eep_jax.heap.loopback import open_all
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.models.weights import dense_names, expert_name
from eep_jax.relocation.executor import Executor
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.digests import digest
from eep_jax.storage.random_checkpoint import STORED, RandomCheckpoint, open_checkpoint
from tests.support.models import a_model, a_run

MODEL = a_model()


def bits(weights: np.ndarray) -> np.ndarray:
    return weights.view(np.uint16)


def test_a_seed_gives_the_same_weights_in_every_process():
    one, other = RandomCheckpoint(MODEL, 5), RandomCheckpoint(MODEL, 5)
    for expert, weights in one.read_experts([0, 7]).items():
        np.testing.assert_array_equal(bits(weights), bits(other.read_experts([expert])[expert]))
    again = other.read_dense()
    for name, weights in one.read_dense().items():
        np.testing.assert_array_equal(bits(weights), bits(again[name]))


def test_weights_have_the_names_shapes_and_dtype_of_a_checkpoint():
    checkpoint = RandomCheckpoint(MODEL, 1)
    dense = checkpoint.read_dense()
    assert {n: w.shape for n, w in dense.items()} == {
        n: leaf.shape for n, leaf in dense_names(MODEL).items()
    }
    assert list(checkpoint.manifest["dense"]) == list(dense)
    assert checkpoint.manifest["dtype"] == "bfloat16"
    experts = checkpoint.read_experts([2])
    assert set(experts) == {2} and experts[2].shape == MODEL.expert_shape
    assert {w.dtype for w in (*dense.values(), experts[2])} == {STORED}


def test_an_expert_needs_no_other_expert_to_be_drawn_and_nothing_compiled(monkeypatch):
    checkpoint, drawn = RandomCheckpoint(MODEL, 1), []
    draw, counter = checkpoint._draw, CompileCounter()

    def noted(function, kind, name, *rest, **shape):
        drawn.append((kind, name))
        return draw(function, kind, name, *rest, **shape)

    monkeypatch.setattr(checkpoint, "_draw", noted)
    checkpoint.read_experts([6])
    assert set(drawn) == {(1, 6)}
    count = len(drawn)
    assert checkpoint.manifest["experts"]["e006"] and len(drawn) == count, "it was just read"
    assert counter.total == 0


def test_seeds_experts_layers_and_matrices_differ():
    experts = RandomCheckpoint(MODEL, 1).read_experts(list(range(MODEL.experts)))
    other = RandomCheckpoint(MODEL, 2).read_experts([0])
    parts = [w[layer, m] for w in (*experts.values(), other[0]) for layer in (0, 1) for m in (0, 1)]
    assert len({digest(part) for part in parts}) == len(parts)
    names = [name for name in dense_names(MODEL) if not name.endswith("/scale")]
    dense = RandomCheckpoint(MODEL, 1).read_dense()
    assert len({digest(dense[name]) for name in names}) == len(names)


def test_weights_have_the_scale_of_the_width_they_sum_over():
    wide = a_model(hidden=256, expert_hidden=64)
    checkpoint = RandomCheckpoint(wide, 0)
    gate, up, down = np.asarray(checkpoint.read_experts([0])[0], np.float32)[1]
    for weights, width in ((gate, 256), (up, 256), (down, 64)):
        assert abs(weights.std() * width**0.5 - 1) < 0.05 and abs(weights.mean()) < 0.01
    dense = checkpoint.read_dense()
    assert abs(np.asarray(dense["head/kernel"], np.float32).std() * 16 - 1) < 0.05
    np.testing.assert_array_equal(dense["final_norm/scale"], np.ones(256))


def test_another_process_draws_the_same_bits():
    code = (
        "from eep_jax.storage.random_checkpoint import RandomCheckpoint\n"
        "from tests.support.models import a_model\n"
        "found = RandomCheckpoint(a_model(), 4)\n"
        "print(found.manifest['experts']['e003'], found.manifest['dense']['head/kernel'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    own = RandomCheckpoint(MODEL, 4).manifest
    assert done.stdout.split() == [own["experts"]["e003"], own["dense"]["head/kernel"]]


def test_biases_of_experts_are_zeros():
    model = a_model(expert_biases=True, activation="clamped_swiglu")
    (expert,) = RandomCheckpoint(model, 0).read_experts([1]).values()
    assert expert.shape == model.expert_shape and model.bias_rows
    assert not expert[:, :, model.expert_hidden :].any()
    assert expert[:, :, : model.expert_hidden].any(axis=-1).all()


def test_digests_are_those_of_the_bytes():
    checkpoint = RandomCheckpoint(MODEL, 3)
    digests = checkpoint.manifest["experts"]
    assert digests["e004"] == digest(checkpoint.read_experts([4])[4])
    assert list(digests) == [expert_name(e) for e in range(MODEL.experts)]
    assert "e007" in digests and "e008" not in digests
    with pytest.raises(KeyError):
        digests["e008"]


def test_an_expert_that_was_read_cannot_be_changed_for_others():
    weights = RandomCheckpoint(MODEL, 3).read_experts([1])[1]
    with pytest.raises(ValueError, match="read-only"):
        weights[...] = 0


def test_experts_that_do_not_exist_are_named():
    with pytest.raises(CheckpointError, match=r"no experts \[8, -1\] of 8"):
        RandomCheckpoint(MODEL, 0).read_experts([3, 8, -1])


def test_another_model_is_refused():
    checkpoint = RandomCheckpoint(MODEL, 0)
    checkpoint.require_model(a_model())
    with pytest.raises(CheckpointError, match="hidden=64"):
        checkpoint.require_model(a_model(hidden=64))


def test_an_executor_fills_a_bank_and_knows_right_bytes_from_wrong_ones():
    config, checkpoint = a_run(2, slots_per_rank=4), RandomCheckpoint(MODEL, 9)
    layout = slab_layout(config.model, config.engine, 2, 4)
    banks = [ExpertBank(layout, heap) for heap in open_all(2, layout.slab_bytes)]
    executor = Executor(banks[0], checkpoint)
    assert executor.carry_out((5, 1, 5, 0), ()) == (5, 1, 5, 0)
    right = checkpoint.read_experts([5])[5].astype(np.float32)
    np.testing.assert_array_equal(banks[0].read(2), right)
    assert executor.moved == {"checkpoint": 4}


class TestOpen:
    def run(self, **changes):
        return dataclasses.replace(a_run(), **changes)

    def test_a_seed_opens_drawn_weights_of_the_configured_model(self):
        checkpoint = open_checkpoint(self.run(random_weights=0))
        assert isinstance(checkpoint, RandomCheckpoint)
        assert (checkpoint.model, checkpoint.seed) == (MODEL, 0)

    def test_a_directory_opens_its_checkpoint(self, pristine_checkpoint):
        checkpoint = open_checkpoint(self.run(checkpoint=str(pristine_checkpoint)))
        assert isinstance(checkpoint, Checkpoint) and checkpoint.model == MODEL

    def test_a_checkpoint_of_another_model_is_refused(self, pristine_checkpoint):
        run = self.run(checkpoint=str(pristine_checkpoint), model=a_model(vocab_size=65))
        with pytest.raises(CheckpointError, match="'vocab_size': '64 instead of 65'"):
            open_checkpoint(run)

    @pytest.mark.parametrize(
        ("changes", "found"),
        [({}, "neither"), ({"checkpoint": "somewhere", "random_weights": 0}, "both")],
    )
    def test_none_or_two_sources_of_weights_are_refused(self, changes, found):
        with pytest.raises(CheckpointError, match=f"test has {found} of checkpoint=.*set just one"):
            open_checkpoint(self.run(**changes))
