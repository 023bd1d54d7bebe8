"""Arguments of a static rank: batches as words, and configurations for any number of ranks."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.processes import with_ranks
from benchmarks.static.engine import pack_batch, unpack_batch
from eep_jax.engine.step import empty_batch
from eep_jax.engine.votes import HOLD
from launch.flags import UsageError, load_config


@pytest.mark.parametrize("rows", load_config("tiny_cpu").engine.step_sizes)
def test_a_batch_comes_out_of_its_words_as_it_went_in(rows):
    like, rng = empty_batch(load_config("tiny_cpu"), rows), np.random.default_rng(rows)
    given = {}
    for field in dataclasses.fields(like):
        model = getattr(like, field.name)
        if model is None:  # attention by items is of GPUs
            continue
        bits = rng.integers(0, 2**32, model.shape, np.uint32)
        given[field.name] = bits > 2**31 if model.dtype == np.bool_ else bits.view(model.dtype)
    given["temperature"], given["top_p"] = (rng.random(8, np.float32) for _ in range(2))
    batch = dataclasses.replace(like, **given)
    found, vote = jax.jit(lambda words: unpack_batch(words, like))(pack_batch(batch, HOLD)[0])
    assert int(vote) == HOLD
    for name, value in given.items():
        assert getattr(found, name).dtype == value.dtype
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


@pytest.mark.parametrize("ranks, slots, redundancy", [(1, 16, 1), (2, 16, 2), (4, 8, 2), (8, 8, 2)])
def test_any_number_of_ranks_has_slots_for_all_replicas(ranks, slots, redundancy):
    cluster = with_ranks(load_config("tiny_cpu"), ranks).cluster
    assert (cluster.ranks, cluster.slots_per_rank, cluster.redundancy) == (ranks, slots, redundancy)


def test_no_rank_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        with_ranks(load_config("tiny_cpu"), -1)
