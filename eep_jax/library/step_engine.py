"""The engine of a rank that runs a step of the user, call by call.

A call runs again, with the same arguments, until a step of it is committed. A rank without a call
runs the example, so that other ranks can go on; when no rank has a call, all pause.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from eep_jax.config import RunConfig
from eep_jax.engine.compilations import CompileCounter
from eep_jax.engine.lockstep_engine import LockstepEngine
from eep_jax.engine.protocol import StepOutcome, WarmUp
from eep_jax.engine.request import Progress, Request
from eep_jax.engine.step import COMPILER_OPTIONS
from eep_jax.engine.votes import IDLE
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.library.elastic_moe import ExpertRouting
from eep_jax.models.expert_bank import SlabLayout
from eep_jax.tables import Tables
from pallas_kernels.exchange.call import Call

Array = jax.Array | np.ndarray

# A rank whose last step had a call waits this long for the next one before it runs the example, so
# that ranks which call together step together. A rank that does not call delays no other.
CALL_GRACE_MS = 5
CALLS_MAX = 64  # waiting at a time


@dataclasses.dataclass(frozen=True)
class _Pending:
    arguments: tuple
    result: concurrent.futures.Future


class StepEngine(LockstepEngine):
    """A RankEngine for calls of one function. `submit` and `close` are thread-safe."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        heap: SymmetricHeap,
        layout: SlabLayout,
        step: Callable[..., tuple[PyTree, ExpertRouting]],
        example: tuple,
    ):
        """`step(routing, *arguments) -> (result, routing)`; `example` are arguments of its shapes.

        Nothing may be donated: a step that is discarded runs again with the same arguments.
        """
        super().__init__(config, rank, heap, layout)
        self.dropped = 0
        self.resumed = threading.Event()  # set once an epoch was committed, or by `close`
        # The user's own threads may compile at the same time.
        self._compilations = CompileCounter(only_inside=True)
        self._step, self._example = step, jax.tree.map(_as_array, tuple(example))
        self._shapes = jax.tree.map(_shape_of, self._example)
        self._calls: collections.deque[_Pending] = collections.deque()
        self._arrived = threading.Condition()
        self._closed: Exception | None = None
        self._had_call = False
        self._none_dropped = jax.device_put(np.int32(0))

    def submit(self, arguments: tuple) -> concurrent.futures.Future:
        """Queues a call of the step, whose result is set when it is committed. Thread-safe.

        Raises ValueError for shapes unlike the example's or too many calls, and the error given to
        `close` if the rank has ended.
        """
        arguments = jax.tree.map(_as_array, tuple(arguments))
        shapes = jax.tree.map(_shape_of, arguments)
        if shapes != self._shapes:
            raise ValueError(
                f"the step was compiled for {_brief(self._shapes)}, not for {_brief(shapes)}; "
                "pad to the shapes and dtypes of the example"
            )
        pending = _Pending(arguments, concurrent.futures.Future())
        with self._arrived:
            self.raise_if_closed()
            if len(self._calls) >= CALLS_MAX:
                raise ValueError(f"{CALLS_MAX} calls wait already; wait for their results first")
            self._calls.append(pending)
            self._arrived.notify_all()
        self.lockstep.nudge()
        return pending.result

    def close(self, error: Exception) -> None:
        """Fails all waiting and later calls with `error`."""
        with self._arrived:
            if self._closed is None:
                self._closed = error
            waiting, self._calls = list(self._calls), collections.deque()
        for pending in waiting:
            pending.result.set_exception(error)
        self.resumed.set()

    def raise_if_closed(self) -> None:
        if self._closed is not None:
            raise self._closed

    def warm_up(self) -> WarmUp:
        def only_the_call(routing: ExpertRouting, *arguments: PyTree) -> tuple[PyTree, Call, Array]:
            # The heap and the bank must not be outputs: they would be copied.
            result, after = self._step(routing, *arguments)
            if not isinstance(after, ExpertRouting):
                raise TypeError(
                    f"the step returned {type(after).__name__} as its second value, expected the "
                    "ExpertRouting that its last expert layer returned: `return result, routing`"
                )
            return result, after.call, after.dropped

        started = time.monotonic()
        jitted = jax.jit(only_the_call, compiler_options=COMPILER_OPTIONS)
        self._executable = jitted.lower(self._place(IDLE), *self._example).compile()
        ready = time.monotonic()
        jax.block_until_ready(self._run(self._example, IDLE))
        self._compilations.total = 0
        # Nothing identifies a user's function across processes, so its executable is not kept.
        origins = {"step": "compiled: the step of a user is not kept"}
        return WarmUp(ready - started, time.monotonic() - ready, origins, 1)

    @property
    def compilations_since_start(self) -> int:
        return self._compilations.total

    def resume(self, tables: Tables) -> None:
        super().resume(tables)
        self.resumed.set()

    def add(self, request: Request) -> None:
        raise ValueError(f"{request.id}: this run has a step of its own and serves no completions")

    def cancel(self, request_id: str) -> bool:
        return False

    def snapshot(self) -> list[Progress]:
        return []

    def cache_use(self) -> None:
        return None

    def take_chosen(self) -> tuple[int, ...]:
        """Empty: choices are not counted here, so placement follows no load."""
        return ()

    def advance(self) -> StepOutcome:
        pending = self._first_call()
        arguments = self._example if pending is None else pending.arguments
        result, call, dropped = self._run(arguments, self._vote(but=1))
        call, dropped = jax.device_get((call, dropped))
        outcome = self._settle(call.suspicion, call.round, call.vote)
        if not outcome.committed or pending is None:
            return outcome
        self.steps += 1
        self.dropped += int(dropped)
        with self._arrived:
            if self._calls and self._calls[0] is pending:
                self._calls.popleft()
        if not pending.result.done():
            pending.result.set_result(result)
        return outcome

    def _vote(self, but: int = 0) -> int:
        """A step, if more than `but` calls wait; all steps here are of one size."""
        return self._smallest if len(self._calls) > but else IDLE

    def _first_call(self) -> _Pending | None:
        with self._arrived:
            self._arrived.wait_for(lambda: self._calls, self._had_call * CALL_GRACE_MS / 1000)
            self._had_call = bool(self._calls)
            return self._calls[0] if self._calls else None

    def _run(self, arguments: tuple, vote: int) -> tuple[PyTree, Call, Array]:
        with self._compilations:
            return self._executable(self._place(vote), *arguments)

    def _place(self, vote: int) -> ExpertRouting:
        return ExpertRouting(
            tables=self._device_tables,
            call=self._call(vote),
            heap=self._heap_array,
            bank=self.bank_array,
            dropped=self._none_dropped,
            spread=self._spread,
        )


def _as_array(leaf: ArrayLike) -> Array:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _shape_of(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _brief(shapes: PyTree) -> str:
    leaves = [f"{s.dtype}{list(s.shape)}" for s in jax.tree.leaves(shapes)]
    return f"{len(leaves)} arrays {', '.join(leaves[:6])}{', ...' if len(leaves) > 6 else ''}"
