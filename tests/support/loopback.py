"""Ranks as threads of one process over loopback heaps; windows, flags and programs are real."""

import contextlib
import dataclasses
import functools
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.exchange.host
from eep_jax.heap.arrays import heap_array
from eep_jax.heap.loopback import open_all
from pallas_kernels.combine.api import combine
from pallas_kernels.combine.host import HostCombine
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.dispatch.host import HostDispatch
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.exchange.signals import first_round, next_round, parity, post, wait_round
from pallas_kernels.window import WindowLayout, round_up
from tests.support.kernels import Exchange

JOIN_S = 30  # a thread that runs longer hangs
DEADLINE_MS = 60_000  # longer than JOIN_S: no healthy rank is suspected because a machine is slow
_running = threading.local()  # rank: whose exchange runs in this thread


class Killed(Exception):
    """Ends the thread of a rank in the middle of a step."""


def in_threads(functions: dict) -> dict:
    """Runs `functions[rank]()` at once, each in a thread named after its rank; returns the results.

    Raises the first error of a thread; a thread that was Killed has no result.
    """
    results, errors = {}, []

    def run(rank, function):
        try:
            results[rank] = function()
        except BaseException as error:  # a rank that raised is reported below
            if "Killed" not in str(error) and not isinstance(error, Killed):
                errors.append(error)

    threads = [
        threading.Thread(target=run, args=item, name=f"rank{item[0]}", daemon=True)
        for item in functions.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    if errors:
        raise errors[0]
    hanging = [thread.name for thread in threads if thread.is_alive()]
    assert not hanging, f"these hang: {hanging}"
    return results


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of the ranks of an exchange; rows and y of ranks that took no part are zero."""

    rows: np.ndarray
    here: np.ndarray
    sent_weights: np.ndarray
    vote: np.ndarray
    y: np.ndarray
    suspicion: dict[int, np.ndarray]

    def accused_by(self, rank: int) -> list[int]:
        return np.flatnonzero(self.suspicion[rank]).tolist()


class LoopbackRanks:
    """R ranks with a heap each. Every exchange is a new epoch, in windows full of stale garbage."""

    def __init__(self, layout: WindowLayout, slots_per_rank: int, open_heaps=open_all):
        """`open_heaps(ranks, slab_bytes)` are heaps attached to each other."""
        self.spec = ExchangeSpec(layout, slots_per_rank)
        self.heaps = open_heaps(layout.ranks, round_up(layout.window_bytes, 4096))
        self.arrays = [heap_array(heap) for heap in self.heaps]
        self.windows = [layout.views(heap.whole())[heap.rank] for heap in self.heaps]
        self.epoch, self.round = 0, first_round(0)
        # One each: a program keeps views of the heap that it was called with last.
        self._programs = [self._compile() for _ in range(layout.ranks)]
        self._chains = {}

    def start_epoch(self) -> None:
        """The next epoch, at its first or (to use both halves) its second round; flags are kept."""
        self.epoch += 1
        self.round = int(next_round(np.uint32(first_round(self.epoch)), self.epoch % 2))

    def poison(self, value: float = np.nan) -> None:
        """Leftovers of earlier rounds: every row is `value`, every slot a real one."""
        for window in self.windows:
            for name in ("rows", "returns", "weights"):
                window[name][...] = value
            window["slots"][...] = 0
            window["votes"][...] = 99

    def call(self, rank: int, active, vote: int = 1, deadline_ms: int = DEADLINE_MS) -> Call:
        return Call(
            rank=np.int32(rank),
            active=np.asarray(active, np.int32),
            epoch=np.uint32(self.epoch),
            round=np.uint32(self.round),
            deadline_ms=np.uint32(deadline_ms),
            vote=np.uint32(vote),
            suspicion=np.zeros(len(active), np.int32),
        )

    def exchange(self, work: Exchange, results, *, votes=None, absent=(), **options) -> Outcome:
        """One dispatch and combine of all members but the absent; `results` are their experts'."""
        self.start_epoch()
        self.poison()
        votes = votes or [1] * work.ranks

        def run(rank):
            call = self.call(rank, work.active, votes[rank], **options)
            mine = (work.x[rank], work.slots[rank], work.weights[rank], results[rank])
            return jax.tree.map(np.asarray, self._programs[rank](*mine, self.arrays[rank], call))

        present = [r for r in work.members if r not in absent]
        return _gather(work, in_threads({r: functools.partial(run, r) for r in present}))

    def chain(self, work: Exchange, layers: int, *, absent=(), **options):
        """`layers` exchanges in one compiled step; returns by rank (x, suspicion).

        The expert of flat slot i multiplies by `(i + 1) / 4`; x of a layer is y of the one before.
        """
        self.start_epoch()
        self.poison()
        programs = [self.chain_program(rank, layers) for rank in range(work.ranks)]

        def run(rank):
            mine = (work.x[rank], work.slots[rank], work.weights[rank])
            out = programs[rank](*mine, self.arrays[rank], self.call(rank, work.active, **options))
            return jax.tree.map(np.asarray, out)

        present = [r for r in work.members if r not in absent]
        return in_threads({r: functools.partial(run, r) for r in present})

    def _compile(self):
        def exchange(x, slots, weights, results, heap, call):
            choices = Choices(slots, weights)
            rows, received, suspicion, vote = dispatch(x, choices, heap, call, self.spec)
            call = call.after(suspicion)
            y, suspicion = combine(results, received, choices, heap, call, self.spec)
            return rows, *received, vote, y, suspicion

        return jax.jit(exchange)

    def chain_program(self, rank: int, layers: int):
        """The compiled step of one rank: `(x, slots, weights, heap, call) -> (x, suspicion)`."""

        def step(x, slots, weights, heap, call):
            choices = Choices(slots, weights)
            for _ in range(layers):
                rows, received, suspicion, _ = dispatch(x, choices, heap, call, self.spec)
                here = received.slots
                scale = (here + (rank * self.spec.slots_per_rank + 1)) / 4
                results = jnp.where(here >= 0, scale, 0)[..., None] * rows[:, :, None]
                call = call.after(suspicion)
                x, suspicion = combine(results, received, choices, heap, call, self.spec)
                call = call.after(suspicion).next()
            return x, call.suspicion

        if (rank, layers) not in self._chains:
            self._chains[rank, layers] = jax.jit(step)
        return self._chains[rank, layers]


def naive_chain(work: Exchange, layers: int) -> np.ndarray:
    """What `LoopbackRanks.chain` computes, in float64."""
    owner = work.slots // work.slots_per_rank
    valid = (work.slots >= 0) & (work.active[owner] > 0)
    share = (np.where(valid, work.weights * (work.slots + 1.0) / 4, 0)).sum(axis=-1)
    return work.x * share[..., None] ** layers


@functools.cache
def some_ranks(
    ranks: int = 4, tokens: int = 8, choices: int = 3, hidden: int = 16, mode: str = "per_choice"
) -> LoopbackRanks:
    """Shared by tests, so that each program is compiled once; see `an_exchange` for the sizes."""
    return LoopbackRanks(WindowLayout(ranks, tokens, choices, hidden, mode), slots_per_rank=3)


def _gather(work: Exchange, seen: dict) -> Outcome:
    ranks, tokens, hidden = work.x.shape
    rows = np.zeros((ranks, ranks, tokens, hidden), np.float32)
    here = np.full((ranks, *work.slots.shape), -1, np.int32)
    sent_weights = np.zeros((ranks, *work.slots.shape), np.float32)
    vote, y = np.zeros(ranks, np.uint32), np.zeros_like(work.x)
    for rank, out in seen.items():
        rows[rank], here[rank], sent_weights[rank], vote[rank], y[rank], _ = out
    return Outcome(rows, here, sent_weights, vote, y, {r: out[-1] for r, out in seen.items()})


@contextlib.contextmanager
def _hosts_with(name: str, replacement):
    """Replaces `name` for both exchanges; the function may ask `_running.rank` who calls it."""

    def noting_rank(call):
        def noted(self, *arguments):
            *_, scalars, _ = arguments
            _running.rank = int(np.asarray(scalars)[0])
            return call(self, *arguments)

        return noted

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pallas_kernels.exchange.host, name, replacement))
        for kind in (HostDispatch, HostCombine):
            stack.enter_context(mock.patch.object(kind, "__call__", noting_rank(kind.__call__)))
        yield


@contextlib.contextmanager
def waits_that_know(dead: set):
    """Waits end at once for ranks in `dead`, and for no other: a test needs no real deadline.

    The real `wait_round` decides; only its deadline is replaced. Yields the log of the waits:
    (rank, ranks waited for, ranks missing or None where the wait was aborted).
    """
    log = []

    def wait(flags, wanted, ranks, abort, epoch, deadline_ns):
        missing, limit_ns = [], time.monotonic_ns() + JOIN_S * 10**9
        for rank in ranks:
            late = [rank]
            while late:
                # Read first: what a rank posted before it died must still be found.
                died, now_ns = rank in dead, time.monotonic_ns()
                assert now_ns < limit_ns, f"rank {rank} is alive and does not come"
                deadline_ns = 0 if died else now_ns + 5_000_000
                late, aborted = wait_round(flags, wanted, late, abort, epoch, deadline_ns)
                if aborted:
                    log.append((_running.rank, tuple(ranks), None))
                    return missing, True
                if late and died:
                    missing.append(rank)
                    break
        log.append((_running.rank, tuple(ranks), tuple(missing)))
        return missing, False

    with _hosts_with("wait_round", wait):
        yield log


@contextlib.contextmanager
def dying_at_post(victims: dict[int, int], cluster, dead: set):
    """Each victim dies before the n-th flag it would post, `victims = {rank: n}`, and joins `dead`.

    Its writes for peers without its flag are torn: NaN, as if it died while writing.
    """
    counts = dict.fromkeys(victims, 0)

    def guarded(flag, value):
        rank = _running.rank
        if rank in victims:
            counts[rank] += 1
            if counts[rank] > victims[rank]:
                _tear(cluster, rank, value)
                dead.add(rank)
                raise Killed(f"rank {rank} at post {victims[rank]}")
        post(flag, value)

    with _hosts_with("post", guarded):
        yield


def _tear(cluster, rank: int, current: int) -> None:
    half = parity(current)
    for window in cluster.windows:
        if window["sent"][half, rank] != current:
            window["rows"][half, rank] = np.nan
            window["weights"][half, rank] = np.nan
        if window["returned"][half, rank] != current:
            window["returns"][half, rank] = np.nan
