"""Counter of XLA compilations, from the monitoring events of JAX."""

import threading

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHED_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts the compilations of this process, or only those inside `with counter:`.

    `total`: compilations requested; `cached`: those served from XLA's persistent cache.
    """

    def __init__(self, only_inside: bool = False):
        """With `only_inside`, a thread is counted while it is in a `with` block of this counter."""
        self.total = self.cached = 0
        self._counts_all, self._thread = not only_inside, threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def __enter__(self) -> "CompileCounter":
        self._thread.inside = True
        return self

    def __exit__(self, *_) -> None:
        self._thread.inside = False

    @property
    def _counts(self) -> bool:
        return self._counts_all or getattr(self._thread, "inside", False)

    def _on_duration(self, event: str, duration: float, **_) -> None:
        self.total += event == COMPILE_EVENT and self._counts

    def _on_event(self, event: str, **_) -> None:
        self.cached += event == CACHED_EVENT and self._counts
