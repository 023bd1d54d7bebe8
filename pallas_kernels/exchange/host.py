"""Base of both exchanges over a heap in host memory: views, partners, flags, bounded waits."""

import ctypes
import dataclasses
import time

import numpy as np
from jax.experimental.buffer_callback import Buffer

from pallas_kernels.exchange.call import ExchangeSpec
from pallas_kernels.exchange.signals import parity, post, wait_round
from pallas_kernels.window import WindowLayout

HostArray = Buffer | np.ndarray


class HostExchange:
    """One rank's end of an exchange; the compiled step calls a subclass back.

    Keeps only views of the heap between calls. `flag` is the region of the subclass' flags.
    """

    flag: str

    def __init__(self, spec: ExchangeSpec) -> None:
        self.spec = spec
        self._views = HeapViews(spec.layout)
        self._ranks = np.arange(spec.ranks)[:, None, None]

    def __reduce__(self) -> tuple:
        """Pickles without the views, which belong to this process's memory."""
        return type(self), (self.spec,)

    def begin(
        self, heap: HostArray, active: HostArray, scalars: HostArray, suspicion: np.ndarray
    ) -> "Turn":
        """This use of the windows. `suspicion` is the exchange's output, already filled."""
        rank, epoch, current, deadline_ms, vote = np.asarray(scalars).tolist()
        return Turn(
            rank=rank,
            windows=self._views.of(heap),
            round=current,
            epoch=epoch,
            deadline_ns=time.monotonic_ns() + deadline_ms * 1_000_000,
            vote=vote,
            peers=partners(np.asarray(active), suspicion),
        )

    def signal(self, turn: "Turn", peer: int) -> None:
        """Posts the round to a peer, after all of this rank's rows for it are written."""
        flags = turn.windows[peer][self.flag]
        post(flags[turn.half, turn.rank : turn.rank + 1], turn.round)

    def wait(self, turn: "Turn", suspicion: np.ndarray) -> list[int] | None:
        """Waits; returns the peers whose rows may now be read, or None for an aborted step.

        Marks ranks that did not come, or the abort in the own entry, in `suspicion`.
        """
        own = turn.windows[turn.rank]
        missing, aborted = wait_round(
            own[self.flag][turn.half],
            turn.round,
            turn.peers,
            own["abort"],
            turn.epoch,
            turn.deadline_ns,
        )
        suspicion[missing] = 1
        suspicion[turn.rank] = aborted
        return None if aborted else [p for p in turn.peers if p not in missing]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One use of the windows by one exchange."""

    rank: int
    windows: list[dict[str, np.ndarray]]
    round: int
    epoch: int
    deadline_ns: int
    vote: int
    peers: list[int]  # partners of the exchange, this rank included

    @property
    def half(self) -> int:
        return parity(self.round)


class HeapViews:
    """Window regions of all ranks, rebuilt only if the heap's address changes."""

    def __init__(self, layout: WindowLayout) -> None:
        self._layout = layout
        self._address, self._windows = None, None

    def of(self, heap: HostArray) -> list[dict[str, np.ndarray]]:
        memory = np.asarray(heap)
        address = memory.__array_interface__["data"][0]
        if address != self._address:
            # The heap is an input of the step, so numpy sees it as read-only; its pages are not.
            self._address, self._windows = address, self._layout.views(writable(memory))
        return self._windows


def writable(memory: np.ndarray) -> np.ndarray:
    """The same bytes without the read-only flag of a callback's inputs."""
    raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.ctypes.data)
    return np.frombuffer(raw, np.uint8).reshape(memory.shape)


def partners(active: np.ndarray, suspicion: np.ndarray) -> list[int]:
    """Ranks an exchange talks to: those of the epoch that did not time out in this step."""
    return np.flatnonzero((active > 0) & (suspicion == 0)).tolist()


def every_or(ranks: list[int], count: int) -> slice | list[int]:
    """Index of these of `count` ranks: a slice, which copies nothing, if it is all of them."""
    return slice(None) if len(ranks) == count else ranks
