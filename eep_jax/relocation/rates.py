"""Speeds that this process measured of each kind of source."""

import collections
import statistics
import threading

from eep_jax.placement.sources import SourceKind

SAMPLES_MAX = 9


class Rates:
    """The last fetches by kind of source. Thread-safe."""

    def __init__(self):
        self._samples = collections.defaultdict(lambda: collections.deque(maxlen=SAMPLES_MAX))
        self._lock = threading.Lock()

    def note(self, kind: SourceKind, nbytes: int, seconds: float) -> None:
        with self._lock:
            self._samples[kind].append(nbytes / max(seconds, 1e-9))

    def known(self, kind: SourceKind) -> bool:
        return kind in self._samples

    def medians(self) -> dict[str, float]:
        """Bytes per second, by the kind's name; kinds that never supplied an expert are absent."""
        with self._lock:
            return {k.value: statistics.median(found) for k, found in self._samples.items()}
