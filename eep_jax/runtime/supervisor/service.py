"""The service behind HTTP: completions, changes of membership, and reports of one supervisor."""

from collections.abc import Sequence

from eep_jax.coordination.scaling import ScaleRequest, ranks_out
from eep_jax.coordination.state import ScaleTo
from eep_jax.runtime.history.status import StatusReporter
from eep_jax.runtime.serving.contract import CompletionRequest, Stream
from eep_jax.runtime.serving.service import CompletionFrontend
from eep_jax.runtime.supervisor.driver import Driver


class ClusterService:
    """A serving.contract.CompletionService that passes each call to the part that answers it."""

    def __init__(self, frontend: CompletionFrontend, reporter: StatusReporter, driver: Driver):
        self._frontend, self._reporter, self._driver = frontend, reporter, driver

    def submit_all(self, requests: Sequence[CompletionRequest], key: str | None) -> list[Stream]:
        return self._frontend.submit_all(requests, key)

    @property
    def busy(self) -> bool:
        """Whether a client waits for the rest of an answer."""
        return self._frontend.reading > 0

    def drain(self, reason: str) -> None:
        """Takes no new requests, and is not healthy, from now on."""
        self._frontend.drain(reason)
        self._reporter.draining = True

    def end_streams(self, reason: str) -> None:
        """Ends all answers that are under way with an error."""
        self._frontend.end_all(reason)

    def apply(self, request: ScaleRequest) -> dict:
        self._driver.feed(ScaleTo(ranks_out(self._driver.state, request)))
        return self._reporter.scale()

    def health(self) -> tuple[bool, dict]:
        return self._reporter.health()

    def status(self) -> dict:
        return self._reporter.status()

    def metrics(self) -> bytes:
        return self._reporter.metrics()
