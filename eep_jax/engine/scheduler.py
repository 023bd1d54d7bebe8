"""Scheduler of a rank: continuous batching into fixed batch rows, with chunked prefill.

It uses no clock and no JAX arrays. A plan changes nothing until it is committed, so a discarded
step is planned again.
"""

import collections
import dataclasses
import itertools

import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.request import Progress, Request
from eep_jax.engine.step import Batch, StepKind, empty_batch, mixed_kinds, with_items
from eep_jax.errors import QueueFull


@dataclasses.dataclass
class Sequence:
    """A request in a batch row. Positions below `cached` are in the KV cache."""

    request: Request
    tokens: list[int]  # prompt and all produced
    number: int = 0  # grows with every sequence that was given a batch row
    cached: int = 0
    dropped: int = 0  # choices without a live expert since the last token

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A batch, and the length of the cache of each batch row once the step is committed."""

    kind: StepKind
    batch: Batch
    cached: dict[int, int]


class Scheduler:
    """The sequences in the batch rows, and the queue of requests before them."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._sequences: list[Sequence | None] = [None] * config.engine.batch_rows
        self._waiting: collections.deque[Request] = collections.deque()
        self._numbers = itertools.count()

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
        self._waiting.append(request)

    def cancel(self, request_id: str) -> bool:
        """Drops a request; False if it is unknown."""
        for index, sequence in enumerate(self._sequences):
            if sequence is not None and sequence.request.id == request_id:
                self._sequences[index] = None
                return True
        kept = [r for r in self._waiting if r.id != request_id]
        found = len(kept) < len(self._waiting)
        self._waiting = collections.deque(kept)
        return found

    def ids(self) -> set[str]:
        running = {s.request.id for s in self._sequences if s is not None}
        return running | {r.id for r in self._waiting}

    def snapshot(self) -> list[Progress]:
        """All tokens of every request, from the first."""
        running = [s for s in self._sequences if s is not None]
        held = [(s.request.id, tuple(s.tokens[len(s.request.prompt) :])) for s in running]
        held += [(r.id, r.produced) for r in self._waiting]
        return [Progress(id=i, start=0, tokens=tokens) for i, tokens in held]

    def vote(self) -> StepKind:
        """The kind of step that this rank needs next."""
        return self._vote({})

    def vote_after(self, plan: StepPlan) -> StepKind:
        """Same, once `plan` is committed, as far as it is known before the tokens are."""
        return self._vote(plan.cached)

    def _vote(self, cached: dict[int, int]) -> StepKind:
        running = {i: s for i, s in enumerate(self._sequences) if s is not None}
        # A step that samples adds one token to a sequence, which is then one behind again.
        missing = [len(s.tokens) - cached.get(i, s.cached) for i, s in running.items()]
        prompts = sum(count for count in missing if count > 1)
        free = len(self._sequences) - len(running)
        for request in itertools.islice(self._waiting, free):
            prompts += len(request.prompt) + len(request.produced)
        if prompts:
            return self._mixed(prompts)
        return StepKind.DECODE if running else StepKind.IDLE

    def _mixed(self, prompt_tokens: int) -> StepKind:
        """The smallest mixed step that takes so many prompt tokens, else the largest one."""
        kinds = mixed_kinds(self._config.engine)
        sizes = zip(kinds, self._config.engine.prompt_sizes, strict=True)
        return next((kind for kind, size in sizes if size >= prompt_tokens), kinds[-1])

    def plan(self, kind: StepKind) -> StepPlan:
        """The fullest batch of this kind. Prompts go into the prefill rows oldest first."""
        self._fill_batch()
        batch, cached = empty_batch(self._config, kind), {}
        next_row = self._config.engine.batch_rows
        running = [(s.number, i, s) for i, s in enumerate(self._sequences) if s is not None]
        for _, batch_row, sequence in sorted(running, key=lambda entry: entry[0]):
            missing = len(sequence.tokens) - sequence.cached
            if missing == 1:
                rows = np.array([batch_row])
            else:
                rows = np.arange(next_row, min(next_row + missing, len(batch.tokens)))
                next_row += len(rows)
            if not len(rows):
                continue
            start, end = sequence.cached, sequence.cached + len(rows)
            batch.tokens[rows] = sequence.tokens[start:end]
            batch.batch_rows[rows] = batch_row
            batch.positions[rows] = np.arange(start, end)
            batch.last_rows[batch_row] = rows[-1]
            batch.sampled[batch_row] = end == len(sequence.tokens)
            request = sequence.request
            batch.seeds[batch_row] = (request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF)
            batch.temperature[batch_row], batch.top_p[batch_row] = (
                request.temperature,
                request.top_p,
            )
            cached[batch_row] = end
        return StepPlan(kind, with_items(self._config, batch), cached)

    def commit(self, plan: StepPlan, tokens: np.ndarray, dropped: np.ndarray) -> list[Progress]:
        """Adds the tokens of a step to their sequences, and frees the rows of finished ones."""
        progress = []
        for batch_row, cached in plan.cached.items():
            sequence = self._sequences[batch_row]
            sequence.cached = cached
            sequence.dropped += int(dropped[batch_row])
            if not plan.batch.sampled[batch_row]:
                continue
            token, start = int(tokens[batch_row]), sequence.produced
            sequence.tokens.append(token)
            finish = self._finish_of(sequence, token)
            if finish:
                self._sequences[batch_row] = None
            progress.append(
                Progress(
                    id=sequence.request.id,
                    # The last report has all tokens: it may be sent again after a reconnect.
                    start=0 if finish else start,
                    tokens=tuple(sequence.tokens[len(sequence.request.prompt) :])
                    if finish
                    else (token,),
                    finish=finish,
                    dropped=sequence.dropped,
                )
            )
            sequence.dropped = 0
        return progress

    def _finish_of(self, sequence: Sequence, token: int) -> str:
        if token in self._config.model.end_tokens:
            return "stop"
        return "length" if sequence.produced >= sequence.request.max_tokens else ""

    def _fill_batch(self) -> None:
        for index, sequence in enumerate(self._sequences):
            if sequence is None and self._waiting:
                request = self._waiting.popleft()
                tokens = [*request.prompt, *request.produced]
                self._sequences[index] = Sequence(request, tokens, number=next(self._numbers))
