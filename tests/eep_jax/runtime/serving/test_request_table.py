"""Whatever happens to ranks, every request ends with exactly its own tokens, in order, once."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eep_jax.engine.request import Progress, Request
from eep_jax.errors import ProtocolError, QueueFull
from eep_jax.runtime.serving.request_table import Entry, RequestTable

RANKS = (0, 1, 2)


def an_entry(name: str, max_tokens: int = 4, **fields) -> Entry:
    request = Request(
        id=name, prompt=(1,), max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0
    )
    return Entry(request, **fields)


def a_book(queue_max: int = 8, finished_max: int = 3, per_rank_max: int = 2) -> RequestTable:
    return RequestTable(queue_max, finished_max, per_rank_max)


def with_running(*names: str, rank: int = 0, per_rank_max: int = 8) -> RequestTable:
    """A table whose requests of these names, of four tokens each, are all on one rank."""
    table = a_book(per_rank_max=per_rank_max)
    for name in names:
        table.submit(an_entry(name))
    table.assign([rank])
    return table


def progress(name: str, start: int, *tokens: int, finish: str = "") -> Progress:
    return Progress(id=name, start=start, tokens=tokens, finish=finish)


class TestSubmit:
    def test_the_queue_is_full_exactly_at_its_limit(self):
        table = a_book(queue_max=2)
        table.submit(an_entry("a"))
        table.submit(an_entry("b"))
        with pytest.raises(QueueFull, match="2 requests"):
            table.submit(an_entry("c", key="k"))
        assert "c" not in table.entries and table.by_key("k") is None
        table.cancel("a")
        table.submit(an_entry("c"))

    def test_running_requests_count_and_finished_ones_do_not(self):
        table = a_book(queue_max=1)
        table.submit(an_entry("a"))
        table.assign([0])
        with pytest.raises(QueueFull):
            table.submit(an_entry("b"))
        table.produced(0, progress("a", 0, 5, 6, 7, 8, finish="length"))
        table.submit(an_entry("b"))

    def test_a_key_leads_to_its_request_until_that_is_forgotten(self):
        table = a_book(finished_max=1)
        entry = table.submit(an_entry("a", key="k"))
        assert table.by_key("k") is entry
        table.cancel("a")
        assert table.by_key("k") is entry
        table.submit(an_entry("b"))
        table.cancel("b")
        assert table.by_key("k") is None and list(table.entries) == ["b"]


class TestAssign:
    def test_requests_go_to_the_least_loaded_rank_then_to_the_lowest(self):
        table = a_book(per_rank_max=2)
        for name in "abcde":
            table.submit(an_entry(name))
        given = [(rank, request.id) for rank, request in table.assign([0, 1])]
        assert given == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
        assert (table.waiting, table.running) == (1, 4)
        assert [(r, q.id) for r, q in table.assign([0, 1, 2])] == [(2, "e")]

    def test_without_ranks_all_wait(self):
        table = a_book()
        table.submit(an_entry("a"))
        assert table.assign([]) == [] and table.waiting == 1

    def test_requests_of_a_dead_rank_come_first_in_their_old_order_with_their_tokens(self):
        table = with_running("a", "b")
        table.submit(an_entry("c"))
        table.produced(0, progress("b", 0, 5, 6))
        assert [e.request.id for e in table.release(0)] == ["a", "b"]
        given = table.assign([1])
        assert [(request.id, request.produced) for _, request in given] == [
            ("a", ()),
            ("b", (5, 6)),
            ("c", ()),
        ]
        assert table.counts["requeued"] == 2


class TestProduced:
    def test_repeated_progress_is_harmless(self):
        table = with_running("a")
        part = progress("a", 0, 5, 6)
        assert table.produced(0, part).produced == [5, 6]
        assert table.produced(0, part) is None
        assert table.produced(0, progress("a", 1, 6, 7)).produced == [5, 6, 7]
        assert table.counts["tokens"] == 3

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (progress("a", 3, 7), "from 3, but only 2 are known"),
            (progress("a", -1, 5), "from -1"),
            (progress("a", 1, 9), "other tokens"),
            (progress("a", 0, 5, 6, 7, 8, 9), "room for 2"),
        ],
        ids=["gap", "negative", "different", "too many"],
    )
    def test_wrong_tokens_are_refused_and_change_nothing(self, part, message):
        table = with_running("a")
        table.produced(0, progress("a", 0, 5, 6))
        with pytest.raises(ProtocolError, match=message):
            table.produced(0, part)
        assert table.entries["a"].produced == [5, 6] and not table.entries["a"].finish

    def test_a_rank_without_the_request_changes_nothing(self):
        table = with_running("a", rank=0)
        assert table.produced(1, progress("a", 0, 5)) is None
        assert table.produced(0, progress("unknown", 0, 5)) is None
        table.release(0)
        assert table.produced(0, progress("a", 0, 5)) is None
        assert table.entries["a"].produced == []


class TestReconcile:
    def test_each_side_learns_what_the_other_has(self):
        table = with_running("a", "b")
        forget, resend = table.reconcile(0, {"b", "old"})
        assert forget == ["old"] and [r.id for r in resend] == ["a"]

    def test_a_restarted_book_adopts_what_a_rank_has(self):
        table = a_book()
        table.restore(map(an_entry, "ab"))
        table.adopt(1, "b")
        table.adopt(1, "unknown")
        assert (table.waiting, [e.request.id for e in table.of_rank(1)]) == (1, ["b"])
        table.adopt(0, "b")  # another rank has it too, and will be told to forget it
        assert table.entries["b"].rank == 1

    def test_restored_requests_wait_in_their_old_order_and_finished_ones_are_bounded(self):
        table = a_book(finished_max=2)
        done = [an_entry(f"done{number}", finish="length") for number in range(5)]
        table.restore([*done, *map(an_entry, "ab")])
        assert [request.id for _, request in table.assign([0])] == ["a", "b"]
        assert [name for name in table.entries if "done" in name] == ["done3", "done4"]
        assert (table.waiting, table.running) == (0, 2)


def true_token(name: str, index: int) -> int:
    return (31 * sum(name.encode()) + 7 * index) % 256


class BookMachine(RuleBasedStateMachine):
    """Ranks that may die, forget, repeat and call again, against one table.

    `work[rank]` is what the rank itself believes: {request: number of tokens it has}.
    """

    @initialize(queue_max=st.integers(1, 6), finished_max=st.integers(0, 3))
    def begin(self, queue_max, finished_max):
        self.table = RequestTable(queue_max, finished_max, per_rank_max=2)
        self.queue_max, self.finished_max = queue_max, finished_max
        self.work: dict[int, dict[str, int]] = {rank: {} for rank in RANKS}
        self.seen: dict[str, list[int]] = {}  # what a client was shown
        self.submitted = 0

    @rule(max_tokens=st.integers(1, 5))
    def submit(self, max_tokens):
        unfinished = [e for e in self.table.entries.values() if not e.finish]
        name = f"r{self.submitted}"
        try:
            self.table.submit(an_entry(name, max_tokens))
        except QueueFull:
            assert len(unfinished) == self.queue_max
        else:
            assert len(unfinished) < self.queue_max
            self.submitted += 1

    @rule(ranks=st.sets(st.sampled_from(RANKS)))
    def assign(self, ranks):
        for rank, request in self.table.assign(sorted(ranks)):
            assert rank in ranks
            true = [true_token(request.id, i) for i in range(len(request.produced))]
            assert list(request.produced) == true
            self.work[rank][request.id] = len(request.produced)

    @precondition(lambda self: any(self.work.values()))
    @rule(data=st.data(), again=st.integers(0, 3), new=st.integers(0, 2), lost=st.booleans())
    def produce(self, data, again, new, lost):
        """A rank goes on; it may repeat tokens it told before, and what it tells may get lost."""
        rank = data.draw(st.sampled_from([r for r in RANKS if self.work[r]]))
        name = data.draw(st.sampled_from(sorted(self.work[rank])))
        entry = self.table.entries.get(name)
        if lost or entry is None or entry.rank != rank:
            self.work[rank][name] += 0 if entry is None else min(new, self._room(rank, name))
            return
        have = self.work[rank][name]
        told = len(entry.produced)
        end = have + min(new, self._room(rank, name))
        start = max(0, min(have, told) - again)
        finish = "length" if end == entry.request.max_tokens else ""
        tokens = tuple(true_token(name, i) for i in range(start, end))
        self.table.produced(rank, Progress(id=name, start=start, tokens=tokens, finish=finish))
        self.work[rank][name] = end

    def _room(self, rank, name):
        return self.table.entries[name].request.max_tokens - self.work[rank][name]

    @rule(rank=st.sampled_from(RANKS))
    def die(self, rank):
        self.table.release(rank)
        self.work[rank] = {}

    @rule(rank=st.sampled_from(RANKS), lost=st.sets(st.integers(0, 30), max_size=3))
    def call_again(self, rank, lost):
        """After a broken channel: the rank tells all it has, some of which it never got."""
        for number in lost:
            self.work[rank].pop(f"r{number}", None)
        held = self.work[rank]
        for name, have in held.items():
            self.table.adopt(rank, name)
            entry = self.table.entries.get(name)
            if entry is not None and entry.rank == rank:
                tokens = tuple(true_token(name, i) for i in range(have))
                finish = "length" if have == entry.request.max_tokens else ""
                self.table.produced(rank, Progress(id=name, start=0, tokens=tokens, finish=finish))
        forget, resend = self.table.reconcile(rank, set(held))
        for name in forget:
            del held[name]
        for request in resend:
            held[request.id] = len(request.produced)
        assert set(held) == {e.request.id for e in self.table.of_rank(rank)}

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data):
        name = f"r{data.draw(st.integers(0, self.submitted - 1))}"
        entry = self.table.entries.get(name)
        going = entry is not None and not entry.finish
        assert (self.table.cancel(name) is not None) == going

    @precondition(lambda self: hasattr(self, "table"))
    @invariant()
    def no_token_is_lost_doubled_or_changed(self):
        for name, entry in self.table.entries.items():
            assert entry.produced == [true_token(name, i) for i in range(len(entry.produced))]
            before = self.seen.get(name, [])
            assert entry.produced[: len(before)] == before
            self.seen[name] = list(entry.produced)
            if entry.finish == "length":
                assert len(entry.produced) == entry.request.max_tokens

    @precondition(lambda self: hasattr(self, "table"))
    @invariant()
    def every_request_is_in_one_place(self):
        entries = self.table.entries.values()
        waiting = [e for e in entries if e.rank is None and not e.finish]
        running = [e for e in entries if e.rank is not None and not e.finish]
        finished = [e for e in entries if e.finish]
        assert (len(waiting), len(running)) == (self.table.waiting, self.table.running)
        assert len(finished) <= self.finished_max
        assert self.table.counts["accepted"] == self.submitted
        ended = self.table.counts["finished"] + self.table.counts["cancelled"]
        assert ended + len(waiting) + len(running) == self.submitted

    def teardown(self):
        """In the end one rank that lives finishes everything."""
        if not hasattr(self, "table"):
            return
        for rank in RANKS:
            self.table.release(rank)
        while self.table.waiting:
            for rank, request in self.table.assign([0]):
                tokens = tuple(true_token(request.id, i) for i in range(request.max_tokens))
                done = Progress(id=request.id, start=0, tokens=tokens, finish="length")
                assert self.table.produced(rank, done) is not None
        self.every_request_is_in_one_place()


TestBook = BookMachine.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_the_next_rank_gets_is_the_request_with_its_tokens():
    entry = an_entry("a")
    entry.produced += [5, 6]
    assert entry.continuation() == dataclasses.replace(entry.request, produced=(5, 6))
    assert entry.request.produced == ()
