"""Promises of one engine: its tokens are the model's, to the bit, whoever stands beside."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_cpu
from eep_jax.config import ClusterConfig
from eep_jax.engine.engine import Engine
from eep_jax.engine.request import NOT_FINITE
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.weights import build_dense_model, expert_name
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.random_checkpoint import open_checkpoint
from eep_jax.tables import solo_tables
from tests.support.engines import Book, a_request
from tests.support.models import a_run, some_weights


def an_engine(config, dense, experts) -> Engine:
    """One rank that holds every expert in the slot of its number, warmed up."""
    layout = slab_layout(config.model, config.engine, 1, config.model.experts)
    heap = LoopbackHeap(0, 1, layout.slab_bytes)
    engine = Engine(config, 0, heap, layout, dense, overlap=True)
    for expert in range(config.model.experts):
        engine.bank.write(expert, expert, experts[expert])
    engine.warm_up()
    return engine


@functools.cache
def small() -> Engine:
    config = a_run()
    return an_engine(config, *some_weights(config.model))


@functools.cache
def trained() -> Engine:
    """The shipped checkpoint in the shapes of the CPU demo, with a shorter context."""
    base = tiny_cpu.get_config()
    config = dataclasses.replace(
        base,
        cluster=ClusterConfig(ranks=1, slots_per_rank=base.model.experts),
        engine=dataclasses.replace(base.engine, context_tokens=64),
    )
    checkpoint = Checkpoint(config.checkpoint)
    checkpoint.require_model(config.model)
    experts = checkpoint.read_experts(list(range(config.model.experts)))
    widened = {expert: weights.astype(np.float32) for expert, weights in experts.items()}
    return an_engine(config, checkpoint.read_dense(), widened)


ENGINES = pytest.mark.parametrize("make", [small, trained], ids=lambda f: f.__name__)


def next_epoch(engine: Engine) -> None:
    """A View change for a rank that is alone: only the epoch is new."""
    cluster, experts = engine.config.cluster, engine.config.model.experts
    tables = solo_tables(1, experts, cluster.slots_per_rank, 0)
    engine.lockstep.clear_flags()
    engine.resume(dataclasses.replace(tables, epoch=np.uint32(engine.epoch + 1)))


def rows_of(engine: Engine, pages: list[int], length: int) -> list[np.ndarray]:
    """Keys and values of every layer at the first positions of a sequence, `[H length C]`."""
    take = lambda leaf: np.moveaxis(np.asarray(leaf)[pages], 1, 0)
    leaves = (*engine._packed.cache.keys, *engine._packed.cache.values)
    return [take(leaf).reshape(leaf.shape[1], -1, leaf.shape[3])[:, :length] for leaf in leaves]


def pages_of(engine: Engine) -> dict[str, list[int]]:
    """The pages of each request in the next step."""
    engine.scheduler.plan(engine._next)  # changes nothing but who has which pages
    return {s.request.id: list(s.pages) for _, s in engine.scheduler._running()}


def serve(engine: Engine, *requests, discard_every: int = 0) -> tuple[Book, dict]:
    """Serves to the end; returns the tokens, and the cache rows of each request as it ended.

    With `discard_every=n`, every n-th step is discarded by an abort and run again.
    """
    book, rows, prompts = Book(), {}, {r.id: len(r.prompt) for r in requests}
    for request in requests:
        engine.add(request)
    for attempt in range(1, 500):
        if engine.paused and not engine.try_wake():
            return book, rows
        if discard_every and attempt % discard_every == 0:
            engine.lockstep.abort(engine.epoch + 1)
            outcome = engine.advance()
            assert not outcome.committed and not outcome.accused and not outcome.progress
            next_epoch(engine)
            continue
        pages = pages_of(engine)
        outcome = engine.advance()
        assert outcome.committed
        book.take(outcome.progress)
        for part in outcome.progress:
            if part.finish and part.id in prompts:
                length = prompts[part.id] + len(part.tokens) - 1
                rows[part.id] = rows_of(engine, pages[part.id], length)
    raise AssertionError("the engine does not pause")


def test_greedy_tokens_are_those_of_the_dense_model():
    engine, prompt = trained(), (0, *b"And God said")
    checkpoint, model = Checkpoint(engine.config.checkpoint), engine.config.model
    experts = checkpoint.read_experts(list(range(model.experts)))
    named = {expert_name(e): weights for e, weights in experts.items()}
    oracle = build_dense_model(model, checkpoint.read_dense(), named)
    logits = jax.jit(lambda tokens: oracle(tokens)[0].astype(jnp.float32))
    tokens = list(prompt)
    for _ in range(40):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(padded)[0, len(tokens) - 1])))
    book, _ = serve(engine, a_request("oracle", prompt, max_tokens=40))
    assert book.tokens["oracle"] == tuple(tokens[len(prompt) :])


def test_drawn_weights_serve_like_read_ones():
    config = dataclasses.replace(a_run(), random_weights=11)
    checkpoint = open_checkpoint(config)
    named = checkpoint.read_experts(list(range(config.model.experts)))
    widened = {expert: weights.astype(np.float32) for expert, weights in named.items()}
    engine, prompt = an_engine(config, checkpoint.read_dense(), widened), (3, 1, 4, 1, 5)
    book, _ = serve(engine, a_request("drawn", prompt, max_tokens=20))
    named = {expert_name(e): weights for e, weights in widened.items()}
    oracle = build_dense_model(config.model, checkpoint.read_dense(), named)
    whole = (*prompt, *book.tokens["drawn"])
    greedy = jnp.argmax(oracle(jnp.array([whole], jnp.int32))[0][0], axis=-1)
    assert tuple(greedy[len(prompt) - 1 : -1].tolist()) == book.tokens["drawn"]


def test_kernels_are_told_where_the_abort_word_is():
    engine = small()
    call = engine._epoch_call
    low, high = call.abort_address.tolist()
    assert high << 32 | low == engine.heap.control_address()
    assert call.abort_address.dtype == np.uint32


def some_prompt(engine: Engine, length: int, seed: int = 0) -> tuple[int, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.integers(1, engine.config.model.vocab_size, length).tolist())


def by_turns(n: int) -> dict:
    """Greedy, then sampled with a seed of its own, and so on."""
    return {"temperature": n % 2 * 0.8, "seed": n}


def same_rows(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        length = min(one.shape[1], other.shape[1])
        np.testing.assert_array_equal(one[:, :length], other[:, :length])


@ENGINES
def test_a_cache_row_has_the_same_bits_from_prefill_and_from_decode(make):
    engine = make()
    prompt = some_prompt(engine, 3)
    book, rows = serve(engine, a_request("decoded", prompt, max_tokens=16))
    whole = prompt + book.tokens["decoded"]
    for length in (4, 5, 9, len(whole) - 1):
        left = len(whole) - length
        request = a_request("prefilled", whole[:length], max_tokens=left)
        again, prefilled = serve(engine, request)
        assert again.tokens["prefilled"] == whole[length:]
        same_rows(prefilled["prefilled"], rows["decoded"])


@ENGINES
def test_tokens_and_cache_rows_are_the_same_in_any_company(make):
    engine = make()
    batch_rows = engine.config.engine.batch_rows
    requests = [
        a_request(f"r{n}", some_prompt(engine, 1 + 5 * n % 17, n), 4 + n, **by_turns(n))
        for n in range(2 * batch_rows)
    ]
    together, _ = serve(engine, *requests)
    for request in requests[:: batch_rows // 2 + 1]:
        alone, _ = serve(engine, request)
        assert alone.tokens[request.id] == together.tokens[request.id]


@ENGINES
def test_cache_rows_do_not_depend_on_batch_row_or_chunks(make):
    engine = make()
    request = a_request("it", some_prompt(engine, 14), max_tokens=3)
    _, alone = serve(engine, request)
    for before in (1, 2, 3):
        others = [a_request(f"o{n}", some_prompt(engine, 3 + n, n), 12) for n in range(before)]
        _, beside = serve(engine, *others, request)
        same_rows(beside["it"], alone["it"])


@pytest.mark.parametrize("discard_every", [3, 4])
def test_a_discarded_step_run_again_changes_no_token_and_no_cache_row(discard_every):
    engine = small()
    requests = [
        a_request(f"r{n}", some_prompt(engine, 2 + 3 * n, n), 6, temperature=0.9, seed=n)
        for n in range(4)
    ]
    calm, calm_rows = serve(engine, *requests)
    disturbed, rows = serve(engine, *requests, discard_every=discard_every)
    assert disturbed.tokens == calm.tokens
    for name in calm_rows:
        same_rows(rows[name], calm_rows[name])


def test_tokens_already_produced_elsewhere_are_continued():
    engine = small()
    request = a_request("a", some_prompt(engine, 6), 9, temperature=0.7, seed=3)
    whole, _ = serve(engine, request)
    for count in (1, 4, 8):
        book = Book()
        book.tokens["a"] = known = whole.tokens["a"][:count]
        moved = dataclasses.replace(request, produced=known)
        engine.add(moved)
        while not engine.paused or engine.try_wake():
            book.take(engine.advance().progress)
        assert book.tokens["a"] == whole.tokens["a"]


def test_a_rank_that_is_alone_pauses_and_wakes_by_itself():
    engine = small()
    serve(engine)
    assert engine.paused and not engine.try_wake()
    engine.add(a_request("a", (1,), 1))
    assert engine.try_wake() and not engine.paused
    serve(engine)
    assert engine.paused and not engine.scheduler.ids()


def test_a_cancelled_request_leaves_its_batch_row_to_the_next():
    engine = small()
    batch_rows = engine.config.engine.batch_rows
    for number in range(batch_rows):
        engine.add(a_request(f"r{number}", (5, number), 30))
    engine.try_wake()
    for _ in range(5):
        assert engine.advance().committed
    for number in range(batch_rows):
        assert engine.scheduler.cancel(f"r{number}")
    request = a_request("new", some_prompt(engine, 9), 5)
    after, _ = serve(engine, request)
    alone, _ = serve(engine, request)
    assert after.tokens == alone.tokens


def test_nothing_compiles_after_the_warm_up():
    engine = small()
    serve(engine)
    before = engine.compilations.total
    with jax.no_tracing():
        serve(engine, *[a_request(f"r{n}", (1, 2, n), 5, temperature=0.5) for n in range(6)])
        next_epoch(engine)
        serve(engine, a_request("b", (3,), 2))
    assert engine.compilations.total == before


def test_a_step_without_tokens_sends_no_row_and_gives_no_progress():
    engine = small()
    steps, (window,) = engine.steps, engine.bank.layout.window.views(engine.heap.whole())
    window["slots"][...] = 0
    engine._launch(engine.config.engine.tokens_max)
    outcome = engine.advance()
    assert outcome.committed and outcome.progress == () and engine.steps == steps + 1
    assert set(window["slots"].ravel().tolist()) == {-1}, "an empty row goes to no expert"


def test_tokens_are_the_same_whatever_sizes_of_steps_there_are():
    weights = some_weights(a_run().model)
    requests = [
        a_request(f"r{i}", range(1, length), 5, seed=i, temperature=0.7 * (i % 2))
        for i, length in enumerate((2, 6, 20, 40))
    ]

    def answers(**sizes):
        engine = an_engine(a_run(**sizes), *weights)
        assert engine._packed.sizes == engine.config.engine.step_sizes
        return serve(engine, *requests)[0].tokens

    assert answers(prefill_tokens=16, step_rows=(4, 8, 12)) == answers()


def test_a_known_prefix_changes_no_token_and_is_not_computed_again():
    engine = an_engine(a_run(), *some_weights(a_run().model))
    prompt = some_prompt(engine, 30)
    requests = [
        a_request("whole", prompt, 6, temperature=0.8, seed=3),
        a_request("longer", (*prompt, 7, 9), 6),
        a_request("again", prompt, 6, temperature=0.8, seed=3),
    ]
    cold = {r.id: serve(small(), dataclasses.replace(r, cache_salt=r.id))[0] for r in requests}
    for request in requests:
        warm, _ = serve(engine, request)
        assert warm.tokens == cold[request.id].tokens
    use = engine.cache_use()
    assert use.hit_tokens == 2 * 24, "three of four pages of 8, twice"
    assert use.held == 0 and use.cached > 0


def test_preempted_requests_get_the_tokens_that_they_would_have_had():
    scarce = a_run(kv_pages=8, context_tokens=48)
    engine = an_engine(scarce, *some_weights(scarce.model))
    requests = [a_request(f"r{n}", some_prompt(engine, 9, n), 30, **by_turns(n)) for n in range(4)]
    found, _ = serve(engine, *requests, discard_every=7)
    wanted, _ = serve(small(), *requests)
    assert found.tokens == wanted.tokens and engine.cache_use().preempted > 0


def test_numbers_that_are_none_end_one_request_and_reach_no_other():
    """A token whose embedding is NaN poisons its pages, which others get afterwards."""
    config = a_run(kv_pages=12, prefix_cache=True)
    dense, experts = some_weights(config.model)
    poisoned = dict(dense)
    name = next(name for name in dense if name.endswith("embedding"))
    poisoned[name] = np.array(dense[name])
    poisoned[name][11] = np.nan
    engine = an_engine(config, poisoned, experts)
    clean = lambda length, seed: tuple(t for t in some_prompt(engine, length, seed) if t != 11)
    good = [a_request(f"good{n}", clean(20, n), 10, **by_turns(n)) for n in range(2)]
    bad = a_request("bad", (*clean(20, 9), 11, 5), 10)
    wanted, _ = serve(small(), *good)
    for _ in range(3):
        found, _ = serve(engine, *good, bad)
        assert found.finished["bad"] == NOT_FINITE and found.tokens["bad"] == ()
        assert all(found.tokens[r.id] == wanted.tokens[r.id] for r in good)
    assert engine.cache_use().not_finite == 3
