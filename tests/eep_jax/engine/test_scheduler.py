"""Promises of the scheduler: every request gets its tokens, once, in order, from its own pages."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.engine.request import NOT_FINITE, Progress
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.votes import IDLE
from eep_jax.errors import QueueFull
from tests.support.engines import Book, a_request
from tests.support.models import a_model, a_run

CONFIG = a_run(waiting_max=64)  # 4 batch rows, pages of 8, steps of 4 and 8 rows
SCARCE = a_run(
    waiting_max=64, kv_pages=8, context_tokens=32, page_tokens=4, prefill_tokens=16, step_rows=(4,)
)
NARROW, WIDE = CONFIG.engine.step_sizes
VOCABULARY = CONFIG.model.vocab_size
NOBODY_DROPPED = np.zeros(CONFIG.engine.batch_rows, np.int32)


def next_token(seed: int, known: tuple[int, ...]) -> int:
    """What the imagined model answers: a function of the request and all tokens before."""
    return hash((seed, *known)) % VOCABULARY


class Model:
    """Stands in for the compiled step: its cache holds, at each place, all tokens up to there.

    So a token that is computed from a page of another text comes out different.
    """

    def __init__(self):
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.computed = 0  # rows

    def run(self, plan, size: int) -> np.ndarray:
        """Tokens `[S]`; `size` is that of a page."""
        batch, tokens = plan.batch, np.zeros(len(plan.batch.sampled), np.int32)
        ends = {}
        for row in np.flatnonzero(batch.positions >= 0).tolist():
            position, table = int(batch.positions[row]), batch.table[batch.batch_rows[row]]
            place = lambda at, table=table: (int(table[at // size]), at % size)
            before = self.cache[place(position - 1)] if position else ()
            assert len(before) == position, "its page was given to another sequence"
            ends[row] = self.cache[place(position)] = (*before, int(batch.tokens[row]))
            self.computed += 1
        for index in np.flatnonzero(batch.sampled).tolist():
            known = ends[int(batch.last_rows[index])]
            tokens[index] = next_token(int(batch.seeds[index, 1]), known)
        return tokens


def expected(request) -> tuple[int, ...]:
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(next_token(request.seed, tuple(tokens)))
    return tuple(tokens[len(request.prompt) :])


def commit(scheduler, model, book, rows, dropped=NOBODY_DROPPED) -> None:
    plan = scheduler.plan(rows)
    tokens = model.run(plan, scheduler.pool.page_tokens)
    book.take(tuple(scheduler.commit(plan, tokens, dropped, np.ones(len(tokens), bool))))
    scheduler.pool.check()


# Few different tokens, so that prompts often begin alike.
requests = st.builds(
    lambda prompt, max_tokens, done, salt: (prompt, max_tokens, min(done, max_tokens - 1), salt),
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(1, 12),
    st.integers(0, 5),
    st.sampled_from(["", "one", "two"]),
)
events = st.one_of(
    requests.map(lambda r: ("add", r)),
    st.integers(0, 20).map(lambda i: ("cancel", i)),
    st.tuples(st.integers(0, 1), st.integers(0, 3)).map(lambda value: ("step", value)),
    st.integers(0, 1).map(lambda size: ("discard", size)),
)


@pytest.mark.parametrize("config", [CONFIG, SCARCE], ids=["roomy", "scarce"])
@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(events, max_size=40))
def test_every_request_gets_all_its_tokens_whatever_comes_and_goes(config, drawn):
    scheduler, model, book = Scheduler(config), Model(), Book()
    added, cancelled = {}, set()
    agreed = lambda size: max(scheduler.vote(), config.engine.step_sizes[size])
    for number, (what, value) in enumerate(drawn):
        if what == "add":
            prompt, max_tokens, done, salt = value
            request = a_request(f"r{number}", prompt, max_tokens, seed=number, cache_salt=salt)
            known = expected(request)[:done]
            book.tokens[request.id] = known
            added[request.id] = request
            scheduler.add(dataclasses.replace(request, produced=known))
        elif what == "cancel":
            chosen = sorted(scheduler.ids())[value : value + 1]
            cancelled |= {i for i in chosen if scheduler.cancel(i)}
        elif what == "step":
            size, row = value
            dropped = np.eye(4, dtype=np.int32)[row]
            commit(scheduler, model, book, agreed(size), dropped)
        else:
            before = sorted(scheduler.snapshot(), key=lambda p: p.id)
            model.run(scheduler.plan(agreed(value)), scheduler.pool.page_tokens)
            assert sorted(scheduler.snapshot(), key=lambda p: p.id) == before
    for _ in range(1000):
        if scheduler.vote() == IDLE:
            break
        commit(scheduler, model, book, scheduler.vote())
    assert not scheduler.ids() and scheduler.pool.held == 0
    for request_id, request in added.items():
        if request_id not in cancelled:
            assert book.tokens[request_id] == expected(request)
            assert book.finished[request_id] == "length"


def a_busy_scheduler(*prompts, config=CONFIG):
    scheduler = Scheduler(config)
    for number, prompt in enumerate(prompts):
        scheduler.add(a_request(f"r{number}", prompt, seed=number))
    return scheduler


def same(plan, other):
    leaves = lambda p: [np.asarray(v).tolist() for v in vars(p.batch).values()]
    return leaves(plan) == leaves(other) and plan.parts == other.parts


def test_a_discarded_plan_is_planned_again_alike():
    scheduler = a_busy_scheduler((1, 2, 3), (4,), range(9))
    first = scheduler.plan(WIDE)
    assert same(scheduler.plan(WIDE), first)
    scheduler.plan(NARROW)
    assert same(scheduler.plan(WIDE), first)


def test_prompts_share_the_rows_and_go_on_in_the_next_step():
    scheduler, model, book = a_busy_scheduler(range(1, 6), range(6, 11)), Model(), Book()
    plan = scheduler.plan(WIDE)
    assert (
        plan.cached == {0: 5, 1: 3} and plan.batch.sampled.tolist() == [True, False] + [False] * 2
    )
    commit(scheduler, model, book, WIDE)
    assert scheduler.plan(WIDE).cached == {0: 6, 1: 5}


def test_what_decodes_comes_before_prompts():
    scheduler = a_busy_scheduler(range(9), (4,))
    plan = scheduler.plan(NARROW)
    assert plan.cached == {1: 1, 0: 3}
    assert plan.batch.tokens.tolist() == [4, 0, 1, 2]
    assert scheduler.vote([plan]) == WIDE


def test_votes_are_for_all_rows_that_are_needed_then_for_one_then_for_nothing():
    scheduler, model, book = a_busy_scheduler(), Model(), Book()
    assert scheduler.vote() == IDLE
    scheduler.add(a_request(prompt=range(6), max_tokens=2))
    assert scheduler.vote() == WIDE
    plan = scheduler.plan(WIDE)
    assert scheduler.vote([plan]) == NARROW
    commit(scheduler, model, book, WIDE)
    assert scheduler.vote() == NARROW
    # Its last token: nothing follows.
    assert scheduler.vote([scheduler.plan(NARROW)]) == IDLE
    commit(scheduler, model, book, NARROW)
    assert scheduler.vote() == IDLE


ALL_FINITE = np.ones(4, np.bool_)


def test_the_end_of_text_ends_a_request_early():
    config = a_run(model=a_model(eos_token=5))
    scheduler = a_busy_scheduler((1,), config=config)
    (progress,) = scheduler.commit(
        scheduler.plan(NARROW), np.full(4, 9), NOBODY_DROPPED, ALL_FINITE
    )
    assert (progress.tokens, progress.finish) == ((9,), "")
    (progress,) = scheduler.commit(
        scheduler.plan(NARROW), np.full(4, 5), NOBODY_DROPPED, ALL_FINITE
    )
    assert progress == Progress(id="r0", start=0, tokens=(9, 5), finish="stop")
    assert not scheduler.ids()


def test_dropped_choices_are_told_with_the_token_they_belong_to():
    scheduler = a_busy_scheduler((1,), (2,))
    plan = scheduler.plan(NARROW)
    progress = scheduler.commit(plan, np.zeros(4, np.int32), np.array([0, 3, 0, 0]), ALL_FINITE)
    assert [p.dropped for p in progress] == [0, 3]


def test_a_request_that_is_here_is_not_taken_twice():
    scheduler = a_busy_scheduler((1, 2))
    scheduler.add(a_request("r0", (9, 9, 9)))
    scheduler.plan(WIDE)
    scheduler.add(a_request("r0", (9, 9, 9)))
    assert [p.id for p in scheduler.snapshot()] == ["r0"]
    assert scheduler.plan(WIDE).batch.tokens[:2].tolist() == [1, 2]


def test_what_cannot_fit_the_context_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"40 prompt tokens \+ 9 do not fit a context of 48"):
        Scheduler(CONFIG).add(a_request(prompt=range(40), max_tokens=9))
    with pytest.raises(ValueError, match="at least one prompt token"):
        Scheduler(CONFIG).add(a_request(prompt=()))
    Scheduler(CONFIG).add(a_request(prompt=range(40), max_tokens=8))


def test_the_queue_has_an_end():
    scheduler = Scheduler(a_run(waiting_max=2))
    for number in range(2):
        scheduler.add(a_request(f"r{number}"))
    with pytest.raises(QueueFull, match="2 waiting"):
        scheduler.add(a_request("r2"))


def test_cancelling_says_whether_it_was_here():
    scheduler = a_busy_scheduler(*[(1,)] * 6)
    scheduler.plan(NARROW)
    found = [scheduler.cancel(name) for name in ("r0", "r5", "r5", "r9")]
    assert found == [True, True, False, False]
    assert scheduler.ids() == {"r1", "r2", "r3", "r4"}


def test_a_snapshot_tells_all_tokens_of_running_and_waiting_requests():
    scheduler = Scheduler(CONFIG)
    for number in range(6):
        scheduler.add(a_request(f"r{number}", (1,), produced=(2, 3), seed=number))
    plan = scheduler.plan(WIDE)
    scheduler.commit(plan, np.full(4, 9), NOBODY_DROPPED, ALL_FINITE)
    assert {p.tokens for p in scheduler.snapshot()} == {(2, 3), (2, 3, 9)}
    told = {p.id: (p.start, p.tokens[:2]) for p in scheduler.snapshot()}
    assert told == {f"r{n}": (0, (2, 3)) for n in range(6)}


def test_an_older_prompt_is_not_held_up_by_a_newer_one_in_a_lower_batch_row():
    """A batch row does not show the age of its sequence.

    Batch row 0 was freed and taken again after batch row 1's long prompt came.
    """
    scheduler = Scheduler(CONFIG)
    scheduler.add(a_request("first", (5, 6), max_tokens=2))
    scheduler.add(a_request("old", (5,) * (WIDE + 4), max_tokens=2))
    scheduler.plan(WIDE)
    scheduler.cancel("first")
    scheduler.add(a_request("new", (7,) * (WIDE + 4), max_tokens=2))
    plan = scheduler.plan(WIDE)
    assert plan.cached == {1: WIDE}
    scheduler.commit(plan, np.zeros(4, np.int32), NOBODY_DROPPED, ALL_FINITE)
    assert scheduler.plan(WIDE).cached[1] == WIDE + 4


class TestSizesOfSteps:
    CONFIG = a_run(prefill_tokens=16, step_rows=(4, 8, 12), waiting_max=64)

    def a_scheduler(self, *lengths: int) -> Scheduler:
        scheduler = Scheduler(self.CONFIG)
        for i, length in enumerate(lengths):
            scheduler.add(a_request(f"r{i}", range(100 * i, 100 * i + length), 3, seed=i))
        return scheduler

    @pytest.mark.parametrize(
        ("lengths", "rows"),
        [((1,), 4), ((1, 1, 1, 1), 4), ((4,), 4), ((3, 2), 8), ((9,), 12), ((20, 20), 20)],
    )
    def test_the_vote_is_for_the_smallest_step_that_takes_all_rows(self, lengths, rows):
        scheduler = self.a_scheduler(*lengths)
        assert scheduler.vote() == rows
        plan = scheduler.plan(rows)
        assert len(plan.batch.tokens) == rows
        assert sum(plan.cached.values()) == min(sum(lengths), rows)

    def test_what_is_left_of_a_prompt_is_for_a_smaller_step(self):
        scheduler = self.a_scheduler(22)
        assert scheduler.vote([scheduler.plan(20)]) == 4

    def test_a_larger_step_of_a_peer_is_filled_as_far_as_there_are_tokens(self):
        plan = self.a_scheduler(6).plan(20)
        assert plan.cached == {0: 6} and (plan.batch.positions >= 0).sum() == 6

    def test_prompts_beside_decoding_sequences_keep_to_the_limit_and_move_on(self):
        scheduler = self.a_scheduler(1, 40)
        scheduler.plan(20)  # which admits both
        assert scheduler.vote() == 20
        scheduler.rows_max = 8
        assert scheduler.vote() == 8
        scheduler.rows_max = 0
        assert scheduler.vote() == 4, "room for the one and three tokens of the other"
        scheduler.cancel("r0")
        assert scheduler.vote() == 20, "nobody waits for the next token"


class TestPages:
    def test_a_prefix_that_is_known_is_not_computed_again(self):
        scheduler, model, book = Scheduler(CONFIG), Model(), Book()
        prompt = tuple(range(20))  # two full pages of 8
        scheduler.add(a_request("first", prompt, 2))
        while scheduler.vote() != IDLE:
            commit(scheduler, model, book, scheduler.vote())
        assert model.computed == 21
        scheduler.add(a_request("second", (*prompt[:17], 99), 1))
        plan = scheduler.plan(scheduler.vote())
        assert plan.parts[0].start == 16 and plan.batch.positions[:2].tolist() == [16, 17]
        commit(scheduler, model, book, WIDE)
        assert book.tokens["second"] == expected(a_request("x", (*prompt[:17], 99), 1))
        assert (scheduler.counts.hit_tokens, scheduler.counts.asked_tokens) == (16, 20 + 18)

    @pytest.mark.parametrize("salts", [("a", "b"), ("", "a")])
    def test_other_salts_share_nothing(self, salts):
        scheduler, model, book = Scheduler(CONFIG), Model(), Book()
        for salt in salts:
            scheduler.add(a_request(f"of {salt}", range(20), 1, cache_salt=salt))
            while scheduler.vote() != IDLE:
                commit(scheduler, model, book, scheduler.vote())
        assert scheduler.counts.hit_tokens == 0

    def test_the_last_token_is_computed_even_if_all_pages_are_known(self):
        scheduler, model, book = Scheduler(CONFIG), Model(), Book()
        for name in ("first", "second"):
            scheduler.add(a_request(name, range(16), 1))
            commit(scheduler, model, book, 8)
            if scheduler.vote() != IDLE:
                commit(scheduler, model, book, 8)
        assert book.tokens["first"] == book.tokens["second"]
        assert scheduler.counts.hit_tokens == 8

    def test_a_preempted_request_keeps_its_tokens_and_waits_in_front(self):
        scheduler, model, book = Scheduler(SCARCE), Model(), Book()
        made = [a_request(f"r{n}", (n,) * 9, 20, seed=n) for n in range(4)]
        for request in made:
            scheduler.add(request)
        while scheduler.counts.preempted == 0:
            commit(scheduler, model, book, scheduler.vote())
        first_waiting = scheduler._waiting[0].request.id
        assert len(book.tokens[first_waiting]) >= 1
        while scheduler.vote() != IDLE:
            commit(scheduler, model, book, scheduler.vote())
        assert {r.id: expected(r) for r in made} == book.tokens
        assert scheduler.pool.held == 0

    def test_nobody_overtakes_a_request_that_waits_for_pages(self):
        scheduler, model, book = Scheduler(SCARCE), Model(), Book()
        for name, length in (("old", 21), ("long", 20), ("short", 1)):
            scheduler.add(a_request(name, range(length), 4))
        commit(scheduler, model, book, scheduler.vote())
        running = {s.request.id for _, s in scheduler._running()}
        assert running == {"old"}

    def test_pages_that_miss_experts_are_not_shared(self):
        scheduler, model, book = Scheduler(CONFIG), Model(), Book()
        for name in ("first", "second"):
            scheduler.add(a_request(name, range(20), 1))
            dropped = np.array([0, 0, 0, 0])
            while scheduler.vote() != IDLE:
                if name == "first":  # in the second step, at positions 8 to 15
                    dropped[0] = model.computed == 8
                commit(scheduler, model, book, min(scheduler.vote(), 8), dropped.astype(np.int32))
        assert scheduler.counts.hit_tokens == 8

    def test_logits_that_are_no_numbers_end_that_request_and_leave_no_prefix(self):
        scheduler, model, book = Scheduler(CONFIG), Model(), Book()
        scheduler.add(a_request("bad", range(16), 5))
        scheduler.add(a_request("good", (7,), 5))
        for _ in range(3):
            plan = scheduler.plan(8)
            tokens = model.run(plan, 8)
            bad = [scheduler._sequences[p.batch_row].request.id == "bad" for p in plan.parts]
            finite = np.array([not is_bad for is_bad in bad] + [True] * (4 - len(bad)))
            book.take(tuple(scheduler.commit(plan, tokens, NOBODY_DROPPED, finite)))
        assert book.finished == {"bad": NOT_FINITE} and book.tokens["bad"] == ()
        assert scheduler.counts.not_finite == 1 and scheduler.pool.cached == 0
        assert len(book.tokens["good"]) == 3

    def test_a_pool_that_cannot_hold_one_context_is_refused(self):
        with pytest.raises(ValueError, match="kv_pages=5 of 8 positions cannot hold one context"):
            a_run(kv_pages=5)
