"""Assembly of the request path: table, dispatcher to the ranks, frontend of the clients."""

import dataclasses
from collections.abc import Callable, Iterable

from eep_jax.config import RunConfig
from eep_jax.coordination.state import CoordinatorState
from eep_jax.membership.view import RankState
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.serving.dispatcher import RequestDispatcher, ids_only
from eep_jax.runtime.serving.request_table import Entry, RequestTable
from eep_jax.runtime.serving.service import CompletionFrontend


@dataclasses.dataclass(frozen=True)
class Serving:
    """The assembled parts. `assign` gives waiting requests to the ranks that can take them."""

    table: RequestTable
    dispatcher: RequestDispatcher
    frontend: CompletionFrontend
    assign: Callable[[], None]


def assemble_serving(
    config: RunConfig,
    channels: Channels,
    record: Callable[[str, dict], object],
    state: Callable[[], CoordinatorState],
    entries: Iterable[Entry] = (),
    awaited: Iterable[int] = (),
) -> Serving:
    """Wires the request path of one supervisor.

    Args:
      config: the run.
      channels: the connections of the ranks.
      record: appends a line to the journal.
      state: returns the current state of the coordinator.
      entries: requests from before a restart.
      awaited: members from before a restart; see RequestDispatcher.
    """
    serve = config.serve
    table = RequestTable(serve.queue_max, serve.finished_max, config.engine.batch_rows * 2)
    table.restore(entries)

    def assign() -> None:
        dispatcher.assign(ranks_taking_requests(state()))

    def accepted(entry: Entry) -> None:
        dispatcher.accepted(entry)
        assign()

    frontend = CompletionFrontend(
        table,
        config.model.end_tokens,
        unavailable=lambda: why_unavailable(state()),
        accepted=accepted,
        cancelled=lambda entry: dispatcher.cancelled(entry),
    )
    if not serve.journal_texts:
        record = lambda kind, facts, write=record: write(kind, ids_only(kind, facts))
    dispatcher = RequestDispatcher(table, channels, record, frontend.changed, awaited)
    return Serving(table, dispatcher, frontend, assign)


def ranks_taking_requests(state: CoordinatorState) -> list[int]:
    """Members that stay: neither dead nor leaving; none while the cluster is blocked."""
    if state.blocked:
        return []
    active = state.view.with_state(RankState.ACTIVE)
    return [r for r in active if state.records[r].is_current and r not in state.out]


def why_unavailable(state: CoordinatorState) -> str:
    """Why no request can be accepted now, or ''."""
    if state.blocked:
        return f"no expert coverage: {state.blocked}"
    if state.view.epoch == 0:
        return "the cluster is starting: not all ranks are ready yet"
    return ""
