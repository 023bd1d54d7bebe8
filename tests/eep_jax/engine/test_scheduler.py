"""Promises of the scheduler: every request gets its tokens, once, in order."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.engine.request import Progress
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.step import StepKind
from eep_jax.errors import QueueFull
from tests.support.engines import Book, a_request
from tests.support.models import a_model, a_run

CONFIG = a_run(waiting_max=64)
VOCABULARY = CONFIG.model.vocab_size


def next_token(seed: int, position: int) -> int:
    """What the imagined model answers: a function of request and position."""
    return (seed * 31 + position * 7) % VOCABULARY


class Model:
    """Stands in for the compiled step, and checks that it is fed as a model must be."""

    def __init__(self):
        self.fed: dict[int, list[int]] = {}  # by seed, the tokens in its cache
        self.cache_of: dict[int, int] = {}  # by batch row, the seed that wrote it last

    def run(self, plan) -> np.ndarray:
        """Tokens `[B]`; a row must come right after those before it, or be one of them again."""
        batch, tokens = plan.batch, np.zeros(CONFIG.engine.batch_rows, np.int32)
        widest = CONFIG.engine.batch_rows if plan.kind is StepKind.DECODE else 8
        assert len(batch.tokens) == widest
        for row in np.flatnonzero(batch.positions >= 0):
            batch_row, position = int(batch.batch_rows[row]), int(batch.positions[row])
            seed = int(batch.seeds[batch_row, 1])
            if self.cache_of.get(batch_row) != seed:
                assert position == 0, "a new sequence in a batch row must be written from its start"
                self.cache_of[batch_row], self.fed[seed] = seed, []
            written = self.fed[seed]
            assert position <= len(written), f"position {position} after {len(written)}"
            written[position:] = [int(batch.tokens[row])]
        for batch_row in np.flatnonzero(batch.sampled):
            last = batch.last_rows[batch_row]
            assert batch.batch_rows[last] == batch_row
            tokens[batch_row] = next_token(
                int(batch.seeds[batch_row, 1]), int(batch.positions[last])
            )
        return tokens


def expected(request) -> tuple[int, ...]:
    start = len(request.prompt)
    return tuple(next_token(request.seed, start - 1 + i) for i in range(request.max_tokens))


requests = st.builds(
    lambda prompt, max_tokens, done: (prompt, max_tokens, min(done, max_tokens - 1)),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    st.integers(1, 12),
    st.integers(0, 5),
)
events = st.one_of(
    requests.map(lambda r: ("add", r)),
    st.integers(0, 20).map(lambda i: ("cancel", i)),
    st.sampled_from(StepKind).map(lambda kind: ("step", kind)),
    st.sampled_from(StepKind).map(lambda kind: ("discard", kind)),
)


def kind_agreed(scheduler, peers_vote: StepKind) -> StepKind:
    return max(scheduler.vote(), peers_vote, StepKind.DECODE)


def commit(scheduler, model, book, kind) -> None:
    plan = scheduler.plan(kind)
    zeros = np.zeros(CONFIG.engine.batch_rows, np.int32)
    book.take(tuple(scheduler.commit(plan, model.run(plan), zeros)))


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=40))
def test_every_request_gets_all_its_tokens_whatever_comes_and_goes(drawn):
    scheduler, model, book = Scheduler(CONFIG), Model(), Book()
    added, cancelled = {}, set()
    for number, (what, value) in enumerate(drawn):
        if what == "add":
            prompt, max_tokens, done = value
            request = a_request(f"r{number}", prompt, max_tokens, seed=number)
            known = expected(request)[:done]
            book.tokens[request.id] = known
            added[request.id] = request
            scheduler.add(dataclasses.replace(request, produced=known))
        elif what == "cancel":
            chosen = sorted(scheduler.ids())[value : value + 1]
            cancelled |= {i for i in chosen if scheduler.cancel(i)}
        elif what == "step":
            commit(scheduler, model, book, kind_agreed(scheduler, value))
        else:
            before = sorted(scheduler.snapshot(), key=lambda p: p.id)
            model.run(scheduler.plan(kind_agreed(scheduler, value)))
            assert sorted(scheduler.snapshot(), key=lambda p: p.id) == before
    for _ in range(1000):
        if scheduler.vote() is StepKind.IDLE:
            break
        commit(scheduler, model, book, scheduler.vote())
    assert not scheduler.ids()
    for request_id, request in added.items():
        if request_id not in cancelled:
            assert book.tokens[request_id] == expected(request)
            assert book.finished[request_id] == "length"
            sequence = (*request.prompt, *expected(request))
            assert tuple(model.fed[request.seed]) == sequence[:-1], "the last needs no cache row"


def a_busy_scheduler(*prompts, config=CONFIG):
    scheduler = Scheduler(config)
    for number, prompt in enumerate(prompts):
        scheduler.add(a_request(f"r{number}", prompt, seed=number))
    return scheduler


def same(plan, other):
    leaves = lambda p: [np.asarray(v).tolist() for v in vars(p.batch).values()]
    return leaves(plan) == leaves(other) and plan.cached == other.cached


def test_a_discarded_plan_is_planned_again_alike():
    scheduler = a_busy_scheduler((1, 2, 3), (4,), range(9))
    first = scheduler.plan(StepKind.MIXED)
    assert same(scheduler.plan(StepKind.MIXED), first)
    scheduler.plan(StepKind.DECODE)
    assert same(scheduler.plan(StepKind.MIXED), first)


def test_prompts_share_the_prefill_rows_and_go_on_in_the_next_step():
    scheduler, model, book = a_busy_scheduler((1, 2, 3), (4, 5, 6)), Model(), Book()
    plan = scheduler.plan(StepKind.MIXED)
    assert plan.cached == {0: 3, 1: 1} and np.flatnonzero(plan.batch.sampled).tolist() == [0]
    commit(scheduler, model, book, StepKind.MIXED)
    assert scheduler.plan(StepKind.MIXED).cached == {0: 4, 1: 3}


def test_a_decode_step_leaves_prompts_for_a_later_one():
    scheduler = a_busy_scheduler((1, 2, 3), (4,))
    plan = scheduler.plan(StepKind.DECODE)
    assert plan.cached == {1: 1}
    assert scheduler.vote_after(plan) is StepKind.MIXED


def test_votes_are_prompts_then_tokens_then_nothing():
    scheduler, model, book = a_busy_scheduler(), Model(), Book()
    assert scheduler.vote() is StepKind.IDLE
    scheduler.add(a_request(prompt=(1, 2, 3), max_tokens=2))
    assert scheduler.vote() is StepKind.MIXED
    plan = scheduler.plan(StepKind.MIXED)
    assert scheduler.vote_after(plan) is StepKind.DECODE
    commit(scheduler, model, book, StepKind.MIXED)
    assert scheduler.vote() is StepKind.DECODE
    commit(scheduler, model, book, StepKind.DECODE)
    assert scheduler.vote() is StepKind.IDLE


def test_the_end_of_text_ends_a_request_early():
    config = a_run(model=a_model(eos_token=5))
    scheduler = a_busy_scheduler((1,), config=config)
    nothing = np.zeros(4, np.int32)
    (progress,) = scheduler.commit(scheduler.plan(StepKind.DECODE), np.full(4, 9), nothing)
    assert (progress.tokens, progress.finish) == ((9,), "")
    (progress,) = scheduler.commit(scheduler.plan(StepKind.DECODE), np.full(4, 5), nothing)
    assert progress == Progress(id="r0", start=0, tokens=(9, 5), finish="stop")
    assert not scheduler.ids()


def test_dropped_choices_are_told_with_the_token_they_belong_to():
    scheduler = a_busy_scheduler((1,), (2,))
    plan = scheduler.plan(StepKind.DECODE)
    progress = scheduler.commit(plan, np.zeros(4, np.int32), np.array([0, 3, 0, 0]))
    assert [p.dropped for p in progress] == [0, 3]


def test_a_request_that_is_here_is_not_taken_twice():
    scheduler = a_busy_scheduler((1, 2))
    scheduler.add(a_request("r0", (9, 9, 9)))
    scheduler.plan(StepKind.MIXED)
    scheduler.add(a_request("r0", (9, 9, 9)))
    assert [p.id for p in scheduler.snapshot()] == ["r0"]
    assert scheduler.plan(StepKind.MIXED).batch.tokens[4:6].tolist() == [1, 2]


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
    scheduler.plan(StepKind.DECODE)
    found = [scheduler.cancel(name) for name in ("r0", "r5", "r5", "r9")]
    assert found == [True, True, False, False]
    assert scheduler.ids() == {"r1", "r2", "r3", "r4"}


def test_a_snapshot_tells_all_tokens_of_running_and_waiting_requests():
    scheduler = Scheduler(CONFIG)
    for number in range(6):
        scheduler.add(a_request(f"r{number}", (1,), produced=(2, 3), seed=number))
    plan = scheduler.plan(StepKind.MIXED)
    scheduler.commit(plan, np.full(4, 9), np.zeros(4, np.int32))
    assert {p.tokens for p in scheduler.snapshot()} == {(2, 3), (2, 3, 9)}
    told = {p.id: (p.start, p.tokens[:2]) for p in scheduler.snapshot()}
    assert told == {f"r{n}": (0, (2, 3)) for n in range(6)}


def test_an_older_prompt_is_not_held_up_by_a_newer_one_in_a_lower_batch_row():
    """A batch row does not show the age of its sequence.

    Batch row 0 was freed and taken again after batch row 1's long prompt came.
    """
    scheduler, nothing = Scheduler(CONFIG), np.zeros(CONFIG.engine.batch_rows, np.int32)
    length = CONFIG.engine.prefill_tokens + 4
    scheduler.add(a_request("first", (5, 6), max_tokens=2))
    scheduler.add(a_request("old", (5,) * length, max_tokens=2))
    scheduler.plan(StepKind.MIXED)
    scheduler.cancel("first")
    scheduler.add(a_request("new", (5,) * length, max_tokens=2))
    plan = scheduler.plan(StepKind.MIXED)
    assert plan.cached == {1: CONFIG.engine.prefill_tokens}
    scheduler.commit(plan, nothing, nothing)
    assert scheduler.plan(StepKind.MIXED).cached[1] == length


class TestSeveralMixedSteps:
    CONFIG = a_run(prefill_tokens=16, prompt_shapes=(4, 8), waiting_max=64)

    def a_scheduler(self, *lengths: int) -> Scheduler:
        scheduler = Scheduler(self.CONFIG)
        for i, length in enumerate(lengths):
            scheduler.add(a_request(f"r{i}", range(length), 3, seed=i))
        return scheduler

    @pytest.mark.parametrize(
        ("lengths", "kind", "rows"),
        [
            ((1,), StepKind.MIXED, 4 + 4),
            ((4,), StepKind.MIXED, 4 + 4),
            ((3, 2), StepKind.MIXED_2, 4 + 8),
            ((9,), StepKind.MIXED_3, 4 + 16),
            ((20, 20), StepKind.MIXED_3, 4 + 16),
        ],
    )
    def test_the_vote_is_for_the_smallest_step_that_takes_all_prompts(self, lengths, kind, rows):
        scheduler = self.a_scheduler(*lengths)
        assert scheduler.vote() is kind
        plan = scheduler.plan(kind)
        assert len(plan.batch.tokens) == rows
        assert sum(plan.cached.values()) == min(sum(lengths), rows - 4)

    def test_what_is_left_of_a_prompt_is_for_a_smaller_step(self):
        scheduler = self.a_scheduler(18)
        assert scheduler.vote_after(scheduler.plan(StepKind.MIXED_3)) is StepKind.MIXED

    def test_a_larger_step_of_a_peer_is_filled_as_far_as_there_are_tokens(self):
        plan = self.a_scheduler(6).plan(StepKind.MIXED_3)
        assert plan.cached == {0: 6} and (plan.batch.positions >= 0).sum() == 6
