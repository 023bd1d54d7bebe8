"""Recovery: journal records to the previous supervisor's state, and a state to a short journal."""

import dataclasses

import msgspec

from eep_jax.config import ClusterConfig, RunConfig
from eep_jax.coordination.coordinator import initial_state, restored_state
from eep_jax.coordination.state import CoordinatorState
from eep_jax.engine.request import Request
from eep_jax.errors import RunDirError
from eep_jax.membership.view import Member, RankState, View, empty_view
from eep_jax.placement.placement import Placement, empty_placement
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.processes.registry import OWN_HOST
from eep_jax.runtime.serving.dispatcher import accepted_facts, finished_facts
from eep_jax.runtime.serving.request_table import Entry

REPORT_KINDS = ("offered", "restarted", "fetch_failed")
EVENT_KINDS = ("commit", "dead", "prepare", "ended", "coverage_lost", "scale", "repair")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The state that the journal holds. Lists are by rank; `processes` has the newest of each rank.

    An issued incarnation without a process has ended, or never started.
    """

    is_first: bool  # there is no journal
    view: View
    placement: Placement
    epoch_tried: int
    issued: list[int]
    fenced: list[int]
    out: frozenset[int]  # ranks that the operator took out
    processes: list[tuple[str, HostProcess]]  # (host, process)
    entries: list[Entry]
    events: list[dict]

    @property
    def ended(self) -> list[tuple[int, int]]:
        """(rank, incarnation) of the newest processes that have ended."""
        there = {(process.rank, process.incarnation) for _, process in self.processes}
        newest = [(rank, number) for rank, number in enumerate(self.issued) if number]
        return [one for one in newest if one not in there]

    def coordinator_state(self, config: ClusterConfig, now_ms: int) -> CoordinatorState:
        if self.is_first:
            return initial_state(config, self.placement.experts)
        return restored_state(
            config,
            self.view,
            self.placement,
            self.epoch_tried,
            self.issued,
            now_ms,
            self.fenced,
            self.out,
        )


def read_back(records: list[dict], config: RunConfig) -> Restored:
    """The state after `records`, oldest first; without records that of a first start.

    Raises:
        RunDirError: A record does not fit `config`, or is of a kind or shape of another version.
    """
    reader = _Reader(config)
    for number, record in enumerate(records, 1):
        try:
            reader.read(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RunDirError(
                f"record {number} of the journal, {str(record)[:120]!r}, does not fit this program "
                f"or its configuration: {error!r}. Start with the version and the configuration "
                "that wrote it; or move the journal away to begin a new run, which forgets the "
                "requests in it"
            ) from error
    return reader.restored(is_first=not records)


class _Reader:
    """The state after the records read so far."""

    def __init__(self, config: RunConfig):
        model, cluster = config.model, config.cluster
        self._ranks, self._slots, self._experts = (
            cluster.ranks,
            cluster.slots_per_rank,
            model.experts,
        )
        self._view = empty_view(cluster.ranks)
        self._placement = empty_placement(model.experts, cluster.ranks, cluster.slots_per_rank)
        self._tried, self._out = 0, frozenset()
        self._issued, self._fenced = [0] * cluster.ranks, [0] * cluster.ranks
        self._processes: dict[tuple[int, int], tuple[str, HostProcess]] = {}
        self._entries: dict[str, Entry] = {}
        self._events: list[dict] = []

    def read(self, record: dict) -> None:
        match record["kind"]:
            case "commit":
                self._commit(record)
            case "scale":
                self._out = frozenset(self._rank(rank) for rank in record["out"])
            case "prepare" | "tried":
                self._tried = max(self._tried, record["epoch"])
            case "incarnation":
                self._issue(self._rank(record["rank"]), record["incarnation"])
            case "process":
                self._process(record)
            case "dead":
                rank = self._rank(record["rank"])
                self._fenced[rank] = max(self._fenced[rank], record["incarnation"])
            case "accepted":
                if "request" in record:  # else its texts are not kept, see serve.journal_texts
                    entry = _entry_of(record)
                    self._entries[entry.request.id] = entry
            case "finished":
                self._finished(record)
            case kind if kind not in (*EVENT_KINDS, *REPORT_KINDS):
                raise ValueError(f"unknown kind {kind!r}")
        if record["kind"] in EVENT_KINDS:
            self._events.append(record)

    def restored(self, is_first: bool) -> Restored:
        found = self._processes.items()
        return Restored(
            is_first=is_first,
            view=self._view,
            placement=self._placement,
            epoch_tried=self._tried,
            issued=self._issued,
            fenced=self._fenced,
            out=self._out,
            processes=[p for (rank, number), p in found if number == self._issued[rank]],
            entries=list(self._entries.values()),
            events=self._events,
        )

    def _finished(self, record: dict) -> None:
        entry = self._entries.get(record["id"])
        if entry is None:
            return
        if "tokens" not in record:  # the texts of this run are not kept any more
            del self._entries[record["id"]]
            return
        entry.produced, entry.finish = list(record["tokens"]), record["finish"]

    def _rank(self, rank: int) -> int:
        if not 0 <= rank < self._ranks:
            raise ValueError(f"rank {rank} is not in 0..{self._ranks - 1}")
        return rank

    def _issue(self, rank: int, incarnation: int) -> None:
        self._issued[rank] = max(self._issued[rank], incarnation)

    def _process(self, record: dict) -> None:
        rank, incarnation = self._rank(record["rank"]), record["incarnation"]
        self._issue(rank, incarnation)
        numbers = {"pid": record["pid"], "ticks": record["ticks"]}
        process = HostProcess(rank=rank, incarnation=incarnation, **numbers)
        self._processes[rank, incarnation] = (record.get("host", OWN_HOST), process)

    def _commit(self, commit: dict) -> None:
        slots = tuple(tuple(row) for row in commit["slots"])
        if [len(row) for row in slots] != [self._slots] * self._ranks:
            raise ValueError(
                f"it has {len(slots)} ranks of {sorted({len(row) for row in slots})} slots, "
                f"expected {self._ranks} of {self._slots}"
            )
        active = {self._rank(int(rank)) for rank in commit["members"]}  # JSON has strings for keys
        if len(commit["incarnations"]) != self._ranks:
            raise ValueError(f"it has {len(commit['incarnations'])} incarnations")
        members = tuple(
            Member(RankState.ACTIVE if rank in active else RankState.ABSENT, incarnation)
            for rank, incarnation in enumerate(commit["incarnations"])
        )
        self._view = View(epoch=commit["epoch"], members=members)
        self._placement = Placement(experts=self._experts, slots=slots)


def snapshot(
    state: CoordinatorState,
    commit: dict | None,
    processes: list[tuple[str, HostProcess]],
    entries,
    with_texts: bool = True,
) -> list[dict]:
    """Records that `read_back` turns into this state; `commit` is the last commit's record.

    Without texts there is nothing to say of requests: `read_back` could not continue them.
    """
    records = [{"kind": "tried", "epoch": state.epoch_tried}, *([commit] if commit else [])]
    if state.out:
        records.append({"kind": "scale", "out": sorted(state.out), "time": 0.0})
    for host, process in processes:
        records.append({"kind": "process", **process_facts(host, process)})
    for rank, record in enumerate(state.records):
        if record.incarnation:  # `processes` may lack it, and no incarnation is issued twice
            facts = {"rank": rank, "incarnation": record.incarnation}
            records.append({"kind": "incarnation", **facts})
        if record.fenced:
            facts = {"rank": rank, "incarnation": record.fenced, "time": 0.0}
            records.append({"kind": "dead", "reason": "before the journal was cut", **facts})
    for entry in entries if with_texts else ():
        records.append({"kind": "accepted", **accepted_facts(entry)})
        if entry.finish:
            records.append({"kind": "finished", **finished_facts(entry)})
    return records


def process_facts(host: str, process: HostProcess) -> dict:
    """Journal record of an admitted process."""
    return dataclasses.asdict(process) | ({} if host == OWN_HOST else {"host": host})


def _entry_of(record: dict) -> Entry:
    request = msgspec.convert(record["request"] | {"produced": ()}, Request)
    return Entry(request, key=record["key"], body=record["body"], created=record["created"])
