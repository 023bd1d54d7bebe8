"""Promises of shaping: logits as a plain loop computes them, and the same tokens after a death."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.engine.request import NO_SHAPING, Shaping
from eep_jax.engine.sampler import most_likely, sample
from eep_jax.engine.shaping import no_shaping, shape_logits, with_request
from eep_jax.placement.planner import plan_repair
from tests.support.engines import EngineCluster, a_request, compiling_nothing
from tests.support.loopback import waits_that_know
from tests.support.models import a_model, a_run

SIZE, CONTEXT = 12, 24
ENDS = frozenset({0, 7})
tokens = st.integers(0, SIZE - 1)
shapings = st.builds(
    Shaping,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.0, 1.25]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0]), max_size=4).map(
        lambda found: tuple(sorted(found.items()))
    ),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
)


def by_hand(logits, prompt, answer, shaping: Shaping) -> np.ndarray:
    """What vLLM's documentation says, token by token."""
    found = np.array(logits, np.float32)
    for token, bias in shaping.logit_bias:
        found[token] += np.float32(bias)
    if len(answer) < shaping.min_tokens:
        found[list(ENDS | set(shaping.stop_token_ids))] = -np.inf
    for *before, last in shaping.bad_words:
        if not before or list(answer[-len(before) :]) == before:
            found[last] = -np.inf
    for token in range(SIZE):
        if token in prompt + answer:
            r = np.float32(shaping.repetition_penalty)
            found[token] = found[token] / r if found[token] > 0 else found[token] * r
        count = answer.count(token)
        found[token] -= np.float32(shaping.frequency_penalty) * np.float32(count)
        found[token] -= np.float32(shaping.presence_penalty if count else 0)
    return found


shaped = jax.jit(shape_logits)


def shape(sequences: list, logits: np.ndarray) -> np.ndarray:
    """The shaped logits of (prompt, answer, shaping), each in the batch row of its number."""
    rows = no_shaping(len(sequences))
    history = np.full((len(sequences), CONTEXT), 3, np.int32)  # of others, behind its end
    for row, (prompt, answer, shaping) in enumerate(sequences):
        request = a_request(prompt=prompt, shaping=shaping)
        rows = with_request(rows, row, request, ENDS)
        history[row, : len(prompt + answer)] = prompt + answer
    positions = np.int32([len(prompt + answer) - 1 for prompt, answer, _ in sequences])
    return np.asarray(shaped(logits, history, positions, rows))


some_text = st.tuples(
    st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, max_size=12), shapings
)


@given(st.lists(some_text, min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=150)
def test_the_logits_are_those_of_a_plain_loop(sequences, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (3, SIZE)).astype(np.float32)
    wanted = [by_hand(own, *sequence) for own, sequence in zip(logits, sequences, strict=True)]
    # A fused multiply-add rounds once where the loop rounds twice.
    np.testing.assert_allclose(shape(sequences, logits), wanted, rtol=1e-6, atol=1e-6)


def test_a_sequence_that_asks_for_nothing_keeps_its_bits_beside_one_that_does():
    logits = np.random.default_rng(3).normal(0, 3, (2, SIZE)).astype(np.float32)
    asking = Shaping(repetition_penalty=1.7, presence_penalty=1, logit_bias=((2, 9.0),))
    found = shape([([1, 2], [3], NO_SHAPING), ([1, 2], [3], asking)], logits)
    np.testing.assert_array_equal(found[0], logits[0])
    assert (found[1] != logits[1]).any()


def test_a_batch_row_forgets_what_its_last_sequence_asked_for():
    before = no_shaping(2)
    asking = with_request(before, 1, a_request(shaping=Shaping(top_k=3, min_tokens=2)), ENDS)
    assert asking.active.tolist() == [False, True] and asking.top_k[1] == 3
    after = with_request(asking, 1, a_request(), ENDS)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert with_request(after, 1, a_request(), ENDS) is after, "nothing is uploaded for it"


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=40)
def test_the_most_likely_k_are_those_that_sorting_finds(seed, k):
    logits = np.random.default_rng(seed).normal(0, 3, (2, 50)).astype(np.float32)
    logits[0, :5] = [-np.inf, np.inf, 0.0, 0.5, 0.5]
    found = np.asarray(jax.jit(most_likely)(logits, np.int32([k, 0])))
    kept = logits[0] >= np.sort(logits[0])[::-1][min(k, 50) - 1]
    np.testing.assert_array_equal(found, [kept, np.ones(50, bool)])


def test_a_number_that_is_none_takes_no_place_among_the_most_likely():
    logits = np.float32([[np.nan, 1, 3, 2, np.nan]])
    found = np.asarray(jax.jit(most_likely)(logits, np.int32([2])))
    assert found.tolist() == [[False, False, True, True, False]]


def drawn(top_k=0, min_p=0.0, draws=500) -> set:
    logits = np.tile(np.log(np.float32([0.1, 0.4, 0.3, 0.2])), (draws, 1))
    seeds, ones = np.zeros((draws, 2), np.uint32), np.ones(draws, np.float32)
    low = np.full(draws, np.log(min_p) if min_p else -np.inf, np.float32)
    how = (np.arange(draws, dtype=np.int32), ones, ones, np.full(draws, top_k, np.int32), low)
    return set(np.asarray(jax.jit(sample)(logits, seeds, *how)).tolist())


def test_draws_keep_within_the_limits():
    assert drawn() == drawn(top_k=4) == drawn(min_p=0.2) == {0, 1, 2, 3}
    assert drawn(top_k=1) == {1} and drawn(top_k=2) == {1, 2}
    assert drawn(min_p=0.6) == {1, 2} and drawn(min_p=1.0) == {1}
    assert drawn(top_k=3, min_p=0.6) == {1, 2}


RANKS, END_TOKEN = 2, 62
ASKED = {
    "plain": NO_SHAPING,
    "greedy, plain": NO_SHAPING,
    "top_k": Shaping(top_k=5),
    "min_p": Shaping(min_p=0.3),
    "repetition": Shaping(repetition_penalty=1.8),
    "counts": Shaping(presence_penalty=-2.0, frequency_penalty=-1.1),
    "bias": Shaping(logit_bias=((5, 40.0), (6, 40.0)), bad_words=((5, 6), (6, 6, 5))),
    "greedy, counts": Shaping(frequency_penalty=2.0, repetition_penalty=1.3),
}


def asked() -> dict:
    return {
        name: a_request(
            name,
            (3, 1, 4, n, 1),
            14 + n,
            temperature=0.0 if "greedy" in name else 0.9,
            seed=n,
            shaping=shaping,
        )
        for n, (name, shaping) in enumerate(ASKED.items())
    }


@functools.cache
def compiled_cluster() -> EngineCluster:
    return EngineCluster(a_run(RANKS, slots_per_rank=8, model=a_model(eos_token=END_TOKEN)))


def cluster_with_work() -> EngineCluster:
    cluster = compiled_cluster().begin()
    for n, request in enumerate(asked().values()):
        cluster.engines[n % RANKS].add(request)
    return cluster


@functools.cache
def unharmed() -> dict:
    return cluster_with_work().serve()


def test_what_is_asked_for_acts_in_an_engine():
    found = unharmed()
    assert {5, 6}.issuperset(found["bias"]) and len(found["bias"]) == 14 + 6
    pairs = list(zip(found["bias"], found["bias"][1:], strict=False))
    assert (5, 6) not in pairs
    cluster = compiled_cluster().begin()
    for request in asked().values():
        cluster.engines[0].add(dataclasses.replace(request, shaping=NO_SHAPING))
    plain = cluster.serve()
    assert plain["plain"] == found["plain"]
    assert plain["greedy, plain"] == found["greedy, plain"], "whatever its neighbours ask for"
    for name in ASKED.keys() - {"plain", "greedy, plain"}:
        assert plain[name] != found[name], name


@pytest.mark.parametrize("dead", range(RANKS))
def test_a_death_in_mid_generation_changes_no_token(dead):
    cluster = cluster_with_work()
    survivor = 1 - dead
    with compiling_nothing(cluster.engines):
        cluster.step(cluster.ranks, 9)
        with waits_that_know({dead}):
            cluster.step_until_discarded([survivor])
        cluster.change([survivor], plan_repair(cluster.placement, [survivor]).placement)
        cluster.requeue(dead, survivor, asked())
        assert cluster.serve([survivor]) == unharmed()


def finished(request) -> tuple:
    cluster = compiled_cluster().begin()
    cluster.engines[0].add(request)
    return cluster.serve()["a"], cluster.book.finished["a"]


def test_end_tokens_of_a_request_end_it_and_not_before_the_least_number():
    free, end = finished(a_request(max_tokens=20))
    assert end == "length"
    third = free[2]
    first = free.index(third)
    ended = a_request(max_tokens=20, shaping=Shaping(stop_token_ids=(third,)))
    assert finished(ended) == (free[: first + 1], "stop")
    later = Shaping(stop_token_ids=(third,), min_tokens=6)
    assert third not in finished(a_request(max_tokens=20, shaping=later))[0][:6]


def test_an_end_token_of_the_model_can_be_ignored():
    always = ((END_TOKEN, 100.0),)
    ended = finished(a_request(max_tokens=5, shaping=Shaping(logit_bias=always)))
    assert ended == ((END_TOKEN,), "stop")
    ignoring = Shaping(logit_bias=always, ignore_eos=True)
    assert finished(a_request(max_tokens=5, shaping=ignoring)) == ((END_TOKEN,) * 5, "length")
