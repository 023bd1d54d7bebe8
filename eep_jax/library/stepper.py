"""What the agent drives instead of the serving engine: one function of the user, call by call.

It has the verbs of `engine.Engine`, so that agreement, repair and return are the agent's as always.
A call is run again, with the same arguments, until a step of it is committed. A rank without a call
runs the example, so that others can go on; when nobody has a call, all pause.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import time

import jax
import numpy as np

from eep_jax.config import RunConfig
from eep_jax.engine.engine import COMPILE_EVENT, StepOutcome, WarmUp
from eep_jax.engine.lockstep import Lockstep
from eep_jax.engine.step import COMPILER_OPTIONS, StepKind
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.library.elastic_moe import ExpertRouting
from eep_jax.models.expert_bank import ExpertBank, SlabLayout
from eep_jax.models.moe_block import ExpertSpread, expert_mlp
from eep_jax.tables import Tables, call_of, solo_tables
from pallas_kernels.exchange.call import ExchangeSpec
from pallas_kernels.exchange.signals import first_round

# A rank whose last step had a call gives the next call this time to come, before it runs the
# example: ranks that call together then step together. One that does not call delays nobody.
CALL_GRACE_MS = 5
CALLS_MAX = 64  # waiting at a time


@dataclasses.dataclass(frozen=True)
class _Pending:
    arguments: tuple
    result: concurrent.futures.Future


class StepCompilations:
    """Counts compilations in threads that are inside `with self:`, by JAX's monitoring events.

    The user's own threads may compile what they like at the same time.
    """

    def __init__(self):
        self.total = 0
        self._inside = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def __enter__(self) -> "StepCompilations":
        self._inside.yes = True
        return self

    def __exit__(self, *_) -> None:
        self._inside.yes = False

    def _on_event(self, event: str, duration: float, **_) -> None:
        self.total += event == COMPILE_EVENT and getattr(self._inside, "yes", False)


class _NoRequests:
    """The scheduler's verbs that the agent knows: this rank serves no requests."""

    def cancel(self, request_id: str) -> None: ...

    def snapshot(self) -> tuple:
        return ()


class StepEngine:
    """One rank's step. Of the agent's thread, except `submit`, `close` and the counts."""

    def __init__(
        self, config: RunConfig, rank: int, heap: SymmetricHeap, layout: SlabLayout, step, example
    ):
        """`step(place, *arguments) -> (result, place)`; `example` are arguments of its shapes.

        Nothing may be donated: a step that is discarded runs again with the same arguments.
        """
        self.config, self.rank, self.heap = config, rank, heap
        self.bank = ExpertBank(layout, heap)
        self.lockstep = Lockstep(layout.window, heap)
        self.scheduler = _NoRequests()
        self.steps = self.discarded = self.dropped = 0
        self.resumed = threading.Event()  # an epoch was committed
        self._compilations = StepCompilations()
        self._step, self._example = step, jax.tree.map(_as_array, tuple(example))
        self._shapes = jax.tree.map(_shape_of, self._example)
        self._calls: collections.deque[_Pending] = collections.deque()
        self._arrived = threading.Condition()
        self._closed: Exception | None = None
        self._votes_hold = self._had_call = False
        self._next = StepKind.DECODE
        self._spread = ExpertSpread(
            exchange=ExchangeSpec(layout.window, layout.slots, heap.slab_bytes),
            tile_rows=config.engine.row_tile,
            mlp=expert_mlp(config.model),
        )
        self._bank_array = device_array(heap, layout.bank)
        self._heap_array = heap_argument(heap)
        cluster, experts = config.cluster, config.model.experts
        self._take_tables(solo_tables(cluster.ranks, experts, cluster.slots_per_rank, rank))

    def submit(self, arguments: tuple) -> concurrent.futures.Future:
        """A call of the step; its result comes when it was committed. From any thread.

        Raises ValueError for arguments of other shapes than the example's or too many calls, and
        what `close` was given if the rank has ended.
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
        """No step will run any more: calls that wait, and later ones, fail with `error`."""
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

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks of the epoch."""
        return tuple(np.flatnonzero(self._tables.active).tolist())

    # What the agent asks for: see engine.Engine.

    def warm_up(self) -> WarmUp:
        """Compiles the step and runs it once, alone: no peer is waited for or written."""

        def only_the_call(place, *arguments):
            # The heap and the bank must not be outputs: they would be copied.
            result, after = self._step(place, *arguments)
            if not isinstance(after, ExpertRouting):
                raise TypeError(
                    f"the step returned {type(after).__name__} as its second value, expected the "
                    "ExpertRouting that its last expert layer returned: `return result, place`"
                )
            return result, after.call, after.dropped

        started = time.monotonic()
        jitted = jax.jit(only_the_call, compiler_options=COMPILER_OPTIONS)
        self._executable = jitted.lower(self._place(StepKind.IDLE), *self._example).compile()
        ready = time.monotonic()
        jax.block_until_ready(self._run(self._example, StepKind.IDLE))
        self._compilations.total = 0
        # A user's function has no name that would say whether a kept executable is of it.
        origins = {"step": "compiled: a step of a library's user is not kept"}
        return WarmUp(ready - started, time.monotonic() - ready, origins, 1)

    @property
    def compilations_since_start(self) -> int:
        """Compilations while a step ran; stays 0 over every change of membership."""
        return self._compilations.total

    @property
    def epoch(self) -> int:
        return int(self._tables.epoch)

    def resume(self, tables: Tables) -> None:
        self._take_tables(tables)
        self._next, self._votes_hold = StepKind.DECODE, False
        self.resumed.set()

    @property
    def paused(self) -> bool:
        return self._next is StepKind.IDLE

    @property
    def held(self) -> bool:
        return self._next is StepKind.HOLD

    def vote_hold(self) -> None:
        self._votes_hold = True

    def take_chosen(self) -> tuple[int, ...]:
        """Nothing is counted here, so placement follows no load."""
        return ()

    def add(self, request) -> None:
        raise ValueError(f"{request.id}: this run is a library's, it answers no completions")

    def try_wake(self) -> bool:
        """While paused: whether this rank or a peer has a call, so all go on. Tells the peers."""
        vote, paused_round = self._raised(self._vote()), int(self._round)
        if vote is not StepKind.IDLE:
            self.lockstep.wake_peers([p for p in self.active if p != self.rank], paused_round)
        elif not self.lockstep.is_woken(paused_round):
            return False
        self.lockstep.forget_wakes()
        self._next = StepKind.DECODE
        return True

    def advance(self) -> StepOutcome:
        """Runs one step. One that is discarded leaves its call waiting, to be run again."""
        pending = self._first_call()
        arguments = self._example if pending is None else pending.arguments
        vote = self._raised(self._vote(but=1))
        result, call, dropped = self._run(arguments, vote)
        call, dropped = jax.device_get((call, dropped))
        if call.suspicion.any() or self.lockstep.aborted_epoch > self.epoch:
            self.discarded += 1
            accused = set(np.flatnonzero(call.suspicion).tolist()) - {self.rank}
            return StepOutcome(False, accused=tuple(sorted(accused)))
        self._round, self._next = np.uint32(call.round), StepKind(int(call.vote))
        if pending is not None:
            self.steps += 1
            self.dropped += int(dropped)
            with self._arrived:
                if self._calls and self._calls[0] is pending:
                    self._calls.popleft()
            if not pending.result.done():
                pending.result.set_result(result)
        return StepOutcome(True)

    def _vote(self, but: int = 0) -> StepKind:
        """DECODE, the kind of a step here, if more than `but` calls wait."""
        return StepKind.DECODE if len(self._calls) > but else StepKind.IDLE

    def _raised(self, vote: StepKind) -> StepKind:
        return StepKind.HOLD if self._votes_hold else vote

    def _first_call(self) -> _Pending | None:
        with self._arrived:
            self._arrived.wait_for(lambda: self._calls, self._had_call * CALL_GRACE_MS / 1000)
            self._had_call = bool(self._calls)
            return self._calls[0] if self._calls else None

    def _run(self, arguments: tuple, vote: StepKind):
        with self._compilations:
            return self._executable(self._place(vote), *arguments)

    def _place(self, vote: StepKind) -> ExpertRouting:
        call = dataclasses.replace(self._place_of_epoch.call, round=self._round)
        call = dataclasses.replace(call, vote=np.uint32(vote))
        return dataclasses.replace(self._place_of_epoch, call=call)

    def _take_tables(self, tables: Tables) -> None:
        """Puts what stays the same for an epoch onto the device, once."""
        self._tables, self._round = tables, np.uint32(first_round(int(tables.epoch)))
        deadline_ms = self.config.engine.step_deadline_ms
        call = call_of(tables, self.rank, deadline_ms, self.heap.control_address())
        tables, call, dropped = jax.device_put((tables, call, np.int32(0)))
        self._place_of_epoch = ExpertRouting(
            tables=tables,
            call=call,
            heap=self._heap_array,
            bank=self._bank_array,
            dropped=dropped,
            spread=self._spread,
        )


def _as_array(leaf):
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _shape_of(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _brief(shapes) -> str:
    leaves = [f"{s.dtype}{list(s.shape)}" for s in jax.tree.leaves(shapes)]
    return f"{len(leaves)} arrays {', '.join(leaves[:6])}{', ...' if len(leaves) > 6 else ''}"
