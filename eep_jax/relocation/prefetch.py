"""Brings experts while steps go on: what takes long happens in a thread, the rest between two.

What is in this host's memory and can be checked in its slot, of a bank or an own backup, is brought
there between two steps (`placing.py`). Else a slot is copied out between two steps; storage and
networks are read in a thread, as every digest is computed in one. So a step waits for one copy of
an expert at a time, and no longer.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source
from eep_jax.relocation.executor import Executor, name_of
from eep_jax.relocation.patience import DeadlineRunner

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Read:
    """One source's answer, on its way; `weights` stays None where it failed."""

    source: Source
    started_s: float
    weights: np.ndarray | None = None
    seconds: float = 0.0
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class Prefetch:
    """One expert at a time. Belongs to the engine's thread, and starts others for short work."""

    def __init__(
        self, executor: Executor, fetch_deadline_ms: int, on_done: Callable[[], None] = lambda: None
    ):
        """`on_done` is called in a thread once `advance` can go on."""
        self._executor, self._on_done = executor, on_done
        # It beats for nobody: the engine's loop goes on, and says so itself.
        self._patience = DeadlineRunner(fetch_deadline_ms)
        self._move: Move | None = None
        self._sources: list[Source] = []
        self._read: _Read | None = None
        self._failures: list[str] = []

    @property
    def failure(self) -> str:
        """Why the last expert that failed did: every source that was tried."""
        return "; ".join(self._failures) or "the plan names no source; see cluster.sources"

    def advance(self, move: Move) -> bool | None:
        """Goes on with `move`; None while it is under way, else whether its slot now holds it."""
        if self._move != move:  # an earlier one was given up; what it read is forgotten
            self._move, self._sources, self._read = move, list(move.sources), None
            self._failures = []
        if self._read is not None:
            if not self._read.done.is_set():
                return None
            read, self._read = self._read, None
            if read.weights is not None:
                self._move = None
                self._executor.keep(move, read.source, read.weights, read.seconds)
                return True
        while self._sources:
            source = self._sources.pop(0)
            try:
                if self._executor.place(move, source):
                    self._move = None
                    return True
            except Exception as error:  # any failure of a source means the next source
                self._failed(move.expert, source, error)
                continue
            self._begin(move.expert, source)
            return None
        self._move = None
        return False

    def _failed(self, expert: int, source: Source, error: Exception) -> None:
        self._failures.append(f"expert {expert} from {name_of(source)}: {error}")
        _log.warning("expert %d from %s failed: %s", expert, name_of(source), error)

    def _begin(self, expert: int, source: Source) -> None:
        read = self._read = _Read(source, time.monotonic())
        copied = None
        if self._executor.is_in_memory(source):
            try:
                copied = self._executor.fetch(expert, source)
            except Exception as error:  # any failure of a source means the next source
                self._failed(expert, source, error)
                read.done.set()
                return
            read.seconds = time.monotonic() - read.started_s
        body = lambda: self._finish(read, expert, copied)
        threading.Thread(target=body, name=f"prefetch {expert}", daemon=True).start()

    def _finish(self, read: _Read, expert: int, copied: np.ndarray | None) -> None:
        source = read.source
        try:
            if copied is None:
                key = (source.kind.value, source.rank)
                copied = self._patience.run(key, lambda: self._executor.fetch(expert, source))
                read.seconds = time.monotonic() - read.started_s
            self._executor.verify(expert, copied, source)
            read.weights = copied
        except Exception as error:
            self._failed(expert, source, error)
        read.done.set()
        self._on_done()
