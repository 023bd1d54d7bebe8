"""A batch comes out of its words as it went in, and results where the host reads them."""

import dataclasses

import jax
import numpy as np
import pytest

from eep_jax.engine.packed_step import ALIGNED, StateLayout, pack_batch, unpack_batch
from eep_jax.engine.step import StepResult, empty_batch
from eep_jax.engine.votes import HOLD
from tests.support.models import a_run

CONFIG = a_run()


@pytest.mark.parametrize("apart", [(), ("table", "latest")], ids=["whole", "without two"])
@pytest.mark.parametrize("rows", CONFIG.engine.step_sizes)
def test_a_batch_comes_out_of_its_words_as_it_went_in(rows, apart):
    like, rng = empty_batch(CONFIG, rows), np.random.default_rng(rows)
    given = {}
    for field in dataclasses.fields(like):
        model = getattr(like, field.name)
        if model is None:  # attention by items is of GPUs
            continue
        bits = rng.integers(0, 2**32, model.shape, np.uint32)
        given[field.name] = bits > 2**31 if model.dtype == np.bool_ else bits.view(model.dtype)
    for name in ("temperature", "top_p"):
        given[name] = rng.random(given[name].shape, np.float32)
    batch = dataclasses.replace(like, **given)
    words = pack_batch(batch, HOLD, 7, apart=apart)
    assert len(words) % ALIGNED == 0
    (vote, seven), found = jax.jit(lambda words: unpack_batch(words, like, 2, apart))(words)
    assert int(vote) == HOLD and int(seven) == 7
    for name, value in given.items():
        wanted = getattr(like, name) if name in apart else value
        assert getattr(found, name).dtype == value.dtype
        np.testing.assert_array_equal(getattr(found, name), wanted, err_msg=name)


def test_results_come_out_of_the_state_as_the_step_gave_them():
    layout, rng = StateLayout(CONFIG), np.random.default_rng(0)
    few = 2  # sequences of the step, of fewer than there are batch rows
    drawn = lambda shape: rng.integers(0, 1000, shape, np.int32)
    shapes = layout.shapes | {"tokens": (few,), "finite": (few,)}
    given = {name: drawn(shape) for name, shape in shapes.items()}
    given |= {"finite": np.array([True, False]), "round": np.uint32(2**32 - 2)}
    given |= {"agreed": np.uint32(HOLD), "cache": None}
    state = jax.jit(lambda values: layout.pack(StepResult(**values)))(given)
    found = layout.results(np.asarray(state))
    assert (found.round, found.agreed) == (given["round"], given["agreed"])
    for name in ("tokens", "finite", "dropped", "chosen", "suspicion"):
        value = getattr(found, name)
        np.testing.assert_array_equal(value[: len(given[name])], given[name], err_msg=name)
    np.testing.assert_array_equal(layout.views(np.asarray(state))["latest"], given["latest"])
