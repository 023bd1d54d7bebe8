"""Scheduler of a rank: continuous batching of decoding sequences and of prompts in pieces.

It uses no clock and no JAX arrays. A plan changes nothing that a client sees until it is committed,
so a discarded step is planned again. A step may be planned while others are under way: the tokens
that these will sample are then taken from the device.

Sequences hold pages of the KV cache. A waiting request is admitted, first come first served, once a
batch row is free and its known tokens fit into free pages; pages of a prefix that is still cached
are taken over and not computed again. A sequence that grows beyond its pages takes a free one; if
there is none, the youngest sequence is preempted: it gives back its pages, keeps its tokens, and
waits in front of all others.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.pages import PagePool, PrefixKeys
from eep_jax.engine.request import NOT_FINITE, CacheUse, Progress, Request
from eep_jax.engine.shaping import no_shaping, with_request
from eep_jax.engine.step import Batch, empty_batch, with_items
from eep_jax.engine.votes import IDLE
from eep_jax.errors import QueueFull

WAITS = -1


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request with its tokens. Positions below `cached` are in `pages` of the KV cache."""

    request: Request
    tokens: list[int]  # prompt and all produced
    keys: PrefixKeys
    number: int = WAITS  # of its admission; they grow
    pages: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    published: int = 0  # pages that others may share
    publishable: float = math.inf  # pages from here on depend on experts that were missing
    dropped: int = 0  # choices without a live expert since the last token

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def seed_words(self) -> tuple[int, int]:
        return self.request.seed >> 32 & 0xFFFFFFFF, self.request.seed & 0xFFFFFFFF

    @property
    def pages_max(self) -> int:
        """The most pages that it can come to hold."""
        return -(-(len(self.request.prompt) + self.request.max_tokens) // self.keys.page_tokens)


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one sequence in a step. Its token, if it samples one, is that of its number."""

    sequence: Sequence
    number: int  # of the sequence's admission: a part of an earlier one is void
    batch_row: int
    start: int  # first position
    end: int  # length of its cache once the step is committed
    samples: bool

    @property
    def is_void(self) -> bool:
        """Whether the sequence has left its batch row since the step was planned."""
        return self.sequence.number != self.number


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A sequence as it will be once the steps under way are committed."""

    sequence: Sequence
    batch_row: int
    cached: int
    unknown: int  # tokens that these steps sample

    @property
    def missing(self) -> int:
        """Tokens that will not be in the cache; the last one is always among them."""
        return len(self.sequence.tokens) + self.unknown - self.cached

    def goes_on(self, more: int = 0) -> bool:
        """Whether it needs a step after these, and after `more` that sample."""
        return self.sequence.produced + self.unknown + more < self.sequence.request.max_tokens


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A batch, and what it does for each sequence: part i samples token i, where it does."""

    batch: Batch
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return len(self.batch.tokens)

    @property
    def cached(self) -> dict[int, int]:
        """Length of the cache of each batch row once the step is committed."""
        return {part.batch_row: part.end for part in self.parts}


@dataclasses.dataclass
class CacheCounts:
    """Since the start: tokens admitted, and how many of them a cached prefix had."""

    asked_tokens: int = 0
    hit_tokens: int = 0
    preempted: int = 0
    not_finite: int = 0  # requests that ended so


class Scheduler:
    """The sequences in the batch rows, and the queue of requests before them."""

    def __init__(self, config: RunConfig):
        self._config, engine = config, config.engine
        self._sequences: list[Sequence | None] = [None] * engine.batch_rows
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._numbers = itertools.count()
        self._table = np.zeros((engine.batch_rows, engine.pages_per_sequence), np.int32)
        self.pool = PagePool(config.kv_pages, engine.page_tokens, engine.prefix_cache)
        self.counts = CacheCounts()
        self.shaping = no_shaping(engine.batch_rows)  # of the sequences in the batch rows
        self.rows_max = engine.tokens_max  # of a step with prompts, while others decode

    def add(self, request: Request) -> None:
        """Queues a request; ignores one that it has already.

        Raises QueueFull beyond `waiting_max`, ValueError for a request that cannot fit the context.
        """
        engine = self._config.engine
        if (
            len(request.prompt) < 1
            or len(request.prompt) + request.max_tokens > engine.context_tokens
        ):
            raise ValueError(
                f"request {request.id}: {len(request.prompt)} prompt tokens + {request.max_tokens} "
                f"do not fit a context of {engine.context_tokens} (at least one prompt token)"
            )
        if request.id in self.ids():
            return
        if len(self._waiting) >= engine.waiting_max:
            raise QueueFull(f"rank has {len(self._waiting)} waiting requests, its maximum")
        tokens = [*request.prompt, *request.produced]
        self._waiting.append(Sequence(request, tokens, self.pool.keys(request.cache_salt)))

    def cancel(self, request_id: str) -> bool:
        """Drops a request; False if it is unknown."""
        for batch_row, sequence in self._running():
            if sequence.request.id == request_id:
                self._leave(batch_row)
                return True
        kept = [s for s in self._waiting if s.request.id != request_id]
        found = len(kept) < len(self._waiting)
        self._waiting = collections.deque(kept)
        return found

    def ids(self) -> set[str]:
        return {sequence.request.id for sequence in self._all()}

    def snapshot(self) -> list[Progress]:
        """All tokens of every request, from the first."""
        return [
            Progress(id=s.request.id, start=0, tokens=tuple(s.tokens[len(s.request.prompt) :]))
            for s in self._all()
        ]

    def cache_use(self) -> CacheUse:
        pool, counts = self.pool, dataclasses.asdict(self.counts)
        return CacheUse(pages=pool.pages, held=pool.held, cached=pool.cached, **counts)

    def vote(self, under_way: Iterable[StepPlan] = (), rows: int = 0) -> int:
        """Rows of the step that this rank needs next; IDLE if it has nothing to do.

        Args:
            under_way: steps that are not committed yet; the vote is about one after them.
            rows: of one more step in between, which is not planned yet; 0 for none.
        """
        ahead = self._ahead(under_way)
        decoding = sum(s.goes_on(more=bool(rows)) for s in ahead if s.missing == 1)
        left = max(0, rows - sum(s.missing == 1 for s in ahead))
        prompts = 0
        waiting = ((s, self._new_tokens(s)) for s in self._admissible())
        reading = ((s.sequence, s.missing) for s in ahead if s.missing > 1)
        for sequence, missing in itertools.chain(reading, waiting):
            read = min(missing, left)
            left -= read
            if missing > read:
                prompts += missing - read
            elif sequence.produced + 1 < sequence.request.max_tokens:
                decoding += 1
        if not decoding + prompts:
            return IDLE
        wanted = self._smallest(decoding + prompts)
        if decoding and prompts:
            # However slow the steps are, one prompt moves on.
            wanted = min(wanted, max(self.rows_max, self._smallest(decoding + 1)))
        return wanted

    def _ahead(self, under_way: Iterable[StepPlan]) -> list[Ahead]:
        """The running sequences that need a step after those under way, the oldest first."""
        parts = collections.defaultdict(list)
        for plan in under_way:
            for part in plan.parts:
                parts[part.number].append(part)
        found = []
        for batch_row, sequence in self._running():
            own = parts[sequence.number]
            cached = own[-1].end if own else sequence.cached
            found.append(Ahead(sequence, batch_row, cached, sum(part.samples for part in own)))
        return sorted((s for s in found if s.goes_on()), key=lambda s: s.sequence.number)

    def _smallest(self, rows: int) -> int:
        """Rows of the smallest step with so many, or of the largest one."""
        sizes = self._config.engine.step_sizes
        return next((size for size in sizes if size >= rows), sizes[-1])

    def plan(self, rows: int, under_way: Iterable[StepPlan] = ()) -> StepPlan:
        """The fullest batch of so many rows: first what decodes, then prompts, the oldest first.

        `under_way` are steps that come before and are not committed yet.
        """
        under_way = tuple(under_way)
        self._admit()
        self._grow(under_way)
        ahead, left, parts = self._ahead(under_way), rows, []
        for decodes in (True, False):
            for s in ahead:
                if left and (s.missing == 1) == decodes:
                    count = min(s.missing, left)
                    place = s.batch_row, s.cached, s.cached + count
                    parts.append(Part(s.sequence, s.sequence.number, *place, count == s.missing))
                    left -= count
        return StepPlan(with_items(self._config, self._batch(rows, parts)), tuple(parts))

    def _batch(self, rows: int, parts: list[Part]) -> Batch:
        """The rows of all parts, one after the other."""
        batch = empty_batch(self._config, rows)
        batch.table[...] = self._table
        if not parts:
            return batch
        sequences = [part.sequence for part in parts]
        counts = [part.end - part.start for part in parts]
        ends = np.cumsum(counts)
        used, own = slice(int(ends[-1])), slice(len(parts))
        batch.tokens[used] = list(itertools.chain.from_iterable(map(_tokens_of, parts)))
        steps = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
        batch.positions[used] = steps + np.repeat([part.start for part in parts], counts)
        batch.batch_rows[used] = np.repeat([part.batch_row for part in parts], counts)
        batch.last_rows[own] = ends - 1
        known = np.array([len(s.tokens) for s in sequences])
        batch.from_latest[ends - 1] = np.array([part.end for part in parts]) > known
        batch.sampled[own] = [part.samples for part in parts]
        batch.seeds[own] = [s.seed_words for s in sequences]
        batch.temperature[own] = [s.request.temperature for s in sequences]
        batch.top_p[own] = [s.request.top_p for s in sequences]
        return batch

    def commit(
        self, plan: StepPlan, tokens: np.ndarray, dropped: np.ndarray, finite: np.ndarray
    ) -> list[Progress]:
        """Adds the tokens of a step to their sequences, and frees the rows of finished ones.

        Args:
            plan: the step that was run.
            tokens: int32 [S], the token of each part.
            dropped: int32 [B], choices without a live expert of each batch row.
            finite: bool [S], whether the logits of each part were numbers.
        """
        progress = []
        for index, part in enumerate(plan.parts):
            if part.is_void:
                continue
            sequence, lost = part.sequence, int(dropped[part.batch_row])
            sequence.cached = part.end
            sequence.dropped += lost
            if lost:
                first = part.start // self.pool.page_tokens
                sequence.publishable = min(sequence.publishable, first)
            if not part.samples:
                continue
            start, finish = sequence.produced, NOT_FINITE
            if finite[index]:
                self._publish(sequence)
                sequence.tokens.append(int(tokens[index]))
                finish = self._finish_of(sequence)
            else:
                self.counts.not_finite += 1
            if finish:
                self._leave(part.batch_row)
            # The last report has all tokens: it may be sent again after a reconnect.
            start = 0 if finish else start
            new = tuple(sequence.tokens[len(sequence.request.prompt) + start :])
            progress.append(
                Progress(
                    id=sequence.request.id,
                    start=start,
                    tokens=new,
                    finish=finish,
                    dropped=sequence.dropped,
                )
            )
            sequence.dropped = 0
        return progress

    def _finish_of(self, sequence: Sequence) -> str:
        shaping, last = sequence.request.shaping, sequence.tokens[-1]
        ends = not shaping.ignore_eos and last in self._config.model.end_tokens
        if ends or last in shaping.stop_token_ids:
            return "stop"
        return "length" if sequence.produced >= sequence.request.max_tokens else ""

    # Pages.

    def _admissible(self) -> Iterator[Sequence]:
        """The waiting sequences that there are batch rows and pages for, first come first served.

        Whatever runs may need one page more soon, if it can grow. One sequence alone always fits,
        since the pool holds one context.
        """
        running = [sequence for _, sequence in self._running()]
        growing = sum(len(s.pages) < s.pages_max for s in running)
        count, free = len(running), self.pool.free
        for sequence in self._waiting:
            free -= self.pool.cost(self._known(sequence), self._pages_of(sequence))
            if count == len(self._sequences) or (count and free < growing):
                return
            yield sequence
            count, growing = count + 1, growing + 1

    def _admit(self) -> None:
        for sequence in list(self._admissible()):
            self._waiting.popleft()
            held = self.pool.claim(self._known(sequence))
            batch_row = self._sequences.index(None)
            self._sequences[batch_row] = sequence
            ends = self._config.model.end_tokens
            self.shaping = with_request(self.shaping, batch_row, sequence.request, ends)
            sequence.number = next(self._numbers)
            sequence.pages = held + self.pool.allocate(self._pages_of(sequence) - len(held))
            sequence.cached = len(held) * self.pool.page_tokens
            sequence.published = len(held)
            self.counts.asked_tokens += len(sequence.tokens)
            self.counts.hit_tokens += sequence.cached
            self._table[batch_row, : len(sequence.pages)] = sequence.pages

    def _grow(self, under_way: tuple[StepPlan, ...]) -> None:
        """Gives every sequence the pages of its tokens; preempts where there are too few."""
        for s in self._ahead(under_way):
            sequence, needed = s.sequence, self._pages_for(s.cached + s.missing)
            while sequence.pages and len(sequence.pages) < needed:
                if (more := self.pool.allocate(1)) is None:
                    self._preempt()  # perhaps this sequence, which then has no pages
                    continue
                sequence.pages += more
                batch_row = self._sequences.index(sequence)
                self._table[batch_row, len(sequence.pages) - 1] = more[0]

    def _preempt(self) -> None:
        """Puts the youngest sequence back in front of all that wait."""
        batch_row, sequence = max(self._running(), key=lambda entry: entry[1].number)
        self._leave(batch_row)
        self._waiting.appendleft(sequence)
        self.counts.preempted += 1

    def _leave(self, batch_row: int) -> None:
        """Frees a batch row and the pages of its sequence."""
        sequence = self._sequences[batch_row]
        self._sequences[batch_row] = None
        self._table[batch_row] = 0
        self.pool.release(sequence.pages)
        sequence.pages, sequence.cached, sequence.published = [], 0, 0
        sequence.number = WAITS
        sequence.publishable = math.inf

    def _publish(self, sequence: Sequence) -> None:
        """Lets others share the full pages; called once a token behind them was a number."""
        end = min(sequence.cached // self.pool.page_tokens, sequence.publishable)
        if end <= sequence.published:
            return
        keys = sequence.keys.of(sequence.tokens)
        for index in range(sequence.published, int(end)):
            self.pool.publish(sequence.pages[index], keys[index])
        sequence.published = int(end)

    def _pages_of(self, sequence: Sequence) -> int:
        return self._pages_for(len(sequence.tokens))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_tokens)

    def _known(self, sequence: Sequence) -> list[bytes]:
        """Keys of the cached pages of its prefix; its last token is computed in any case."""
        keys = sequence.keys.of(sequence.tokens)
        keys = keys[: (len(sequence.tokens) - 1) // self.pool.page_tokens]
        return keys[: self.pool.known(keys)]

    def _new_tokens(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - len(self._known(sequence)) * self.pool.page_tokens

    def _running(self) -> list[tuple[int, Sequence]]:
        return [(row, s) for row, s in enumerate(self._sequences) if s is not None]

    def _all(self) -> list[Sequence]:
        return [*(s for _, s in self._running()), *self._waiting]


def _tokens_of(part: Part) -> list[int]:
    """Tokens of a part; 0 for one that a step under way samples."""
    known = part.sequence.tokens[part.start : part.end]
    return known if len(known) == part.end - part.start else [*known, 0]
