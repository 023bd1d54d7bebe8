"""Scheduler of a rank: continuous batching of decoding sequences and of prompts in pieces.

It uses no clock and no JAX arrays. A plan changes nothing that a client sees until it is committed,
so a discarded step is planned again.

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


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request with its tokens. Positions below `cached` are in `pages` of the KV cache."""

    request: Request
    tokens: list[int]  # prompt and all produced
    keys: PrefixKeys
    number: int = 0  # grows with every admission
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

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache; the last one is always among them."""
        return len(self.tokens) - self.cached


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one sequence in a step. Its token, if it samples one, is that of its number."""

    batch_row: int
    start: int  # first position
    end: int  # length of its cache once the step is committed


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

    def vote(self) -> int:
        """Rows of the step that this rank needs next; IDLE if it has nothing to do."""
        return self._vote(())

    def vote_after(self, plan: StepPlan) -> int:
        """Same, once `plan` is committed, as far as it is known before the tokens are."""
        return self._vote(plan.parts)

    def _vote(self, parts: Iterable[Part]) -> int:
        cached = {part.batch_row: part.end for part in parts}
        decoding = prompts = 0
        for batch_row, sequence in self._running():
            missing = len(sequence.tokens) - cached.get(batch_row, sequence.cached)
            if missing > 1:
                prompts += missing
            # A step that samples adds a token to a sequence, which is then one behind again, or
            # at its end.
            elif missing or sequence.produced + 1 < sequence.request.max_tokens:
                decoding += 1
        prompts += sum(self._new_tokens(s) for s in self._admissible())
        if not decoding + prompts:
            return IDLE
        wanted = self._smallest(decoding + prompts)
        if decoding and prompts:
            # However slow the steps are, one prompt moves on.
            wanted = min(wanted, max(self.rows_max, self._smallest(decoding + 1)))
        return wanted

    def _smallest(self, rows: int) -> int:
        """Rows of the smallest step with so many, or of the largest one."""
        sizes = self._config.engine.step_sizes
        return next((size for size in sizes if size >= rows), sizes[-1])

    def plan(self, rows: int) -> StepPlan:
        """The fullest batch of so many rows: first what decodes, then prompts, the oldest first."""
        self._admit()
        self._grow()
        oldest = sorted(self._running(), key=lambda entry: entry[1].number)
        parts, left = [], rows
        for decodes in (True, False):
            for batch_row, sequence in oldest:
                if left and (sequence.missing == 1) == decodes:
                    count = min(sequence.missing, left)
                    parts.append(Part(batch_row, sequence.cached, sequence.cached + count))
                    left -= count
        return StepPlan(with_items(self._config, self._batch(rows, parts)), tuple(parts))

    def _batch(self, rows: int, parts: list[Part]) -> Batch:
        """The rows of all parts, one after the other."""
        batch = empty_batch(self._config, rows)
        batch.table[...] = self._table
        if not parts:
            return batch
        sequences = [self._sequences[part.batch_row] for part in parts]
        counts = [part.end - part.start for part in parts]
        pairs = list(zip(sequences, parts, strict=True))
        tokens = [token for s, part in pairs for token in s.tokens[part.start : part.end]]
        positions = [at for part in parts for at in range(part.start, part.end)]
        used, own = slice(len(tokens)), slice(len(parts))
        batch.tokens[used], batch.positions[used] = tokens, positions
        batch.batch_rows[used] = np.repeat([part.batch_row for part in parts], counts)
        batch.last_rows[own] = np.cumsum(counts) - 1
        batch.sampled[own] = [part.end == len(s.tokens) for s, part in pairs]
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
            sequence, lost = self._sequences[part.batch_row], int(dropped[part.batch_row])
            sequence.cached = part.end
            sequence.dropped += lost
            if lost:
                first = part.start // self.pool.page_tokens
                sequence.publishable = min(sequence.publishable, first)
            if not plan.batch.sampled[index]:
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

    def _grow(self) -> None:
        """Gives every sequence the pages of its known tokens; preempts where there are too few."""
        for _, sequence in sorted(self._running(), key=lambda entry: entry[1].number):
            while sequence.pages and len(sequence.pages) < self._pages_of(sequence):
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
        return -(-len(sequence.tokens) // self.pool.page_tokens)

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
