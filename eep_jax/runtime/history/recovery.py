"""Recovery: journal records to the previous supervisor's state, and a state to a short journal."""

import dataclasses

from eep_jax.config import ClusterConfig, RunConfig
from eep_jax.coordination.coordinator import initial_state, restored_state
from eep_jax.coordination.state import CoordinatorState
from eep_jax.engine.request import Request
from eep_jax.membership.view import Member, RankState, View, empty_view
from eep_jax.placement.placement import Placement, empty_placement
from eep_jax.runtime.control.messages import HostProcess
from eep_jax.runtime.processes.registry import OWN_HOST
from eep_jax.runtime.serving.dispatcher import accepted_facts, finished_facts
from eep_jax.runtime.serving.request_table import Entry

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
    """The state after `records`, oldest first; without records that of a first start."""
    model, cluster = config.model, config.cluster
    view = empty_view(cluster.ranks)
    placement = empty_placement(model.experts, cluster.ranks, cluster.slots_per_rank)
    tried, issued, fenced = 0, [0] * cluster.ranks, [0] * cluster.ranks
    processes, entries, out = {}, {}, frozenset()
    for record in records:
        match record["kind"]:
            case "commit":
                view, placement = _view_of(record), _placement_of(record, model.experts)
            case "scale":
                out = frozenset(record["out"])
            case "prepare" | "tried":
                tried = max(tried, record["epoch"])
            case "incarnation":
                issued[record["rank"]] = max(issued[record["rank"]], record["incarnation"])
            case "process":
                rank, incarnation = record["rank"], record["incarnation"]
                issued[rank] = max(issued[rank], incarnation)
                process = HostProcess(
                    rank=rank,
                    incarnation=incarnation,
                    pid=record["pid"],
                    ticks=record["ticks"],
                )
                processes[rank, incarnation] = (record.get("host", OWN_HOST), process)
            case "dead":
                rank = record["rank"]
                fenced[rank] = max(fenced[rank], record["incarnation"])
            case "accepted":
                entry = _entry_of(record)
                entries[entry.request.id] = entry
            case "finished" if record["id"] in entries:
                entry = entries[record["id"]]
                entry.produced, entry.finish = list(record["tokens"]), record["finish"]
    return Restored(
        is_first=not records,
        view=view,
        placement=placement,
        epoch_tried=tried,
        issued=issued,
        fenced=fenced,
        out=out,
        processes=[p for key, p in processes.items() if key[1] == issued[key[0]]],
        entries=list(entries.values()),
        events=[r for r in records if r["kind"] in EVENT_KINDS],
    )


def snapshot(
    state: CoordinatorState,
    commit: dict | None,
    processes: list[tuple[str, HostProcess]],
    entries,
) -> list[dict]:
    """Records that `read_back` turns into this state; `commit` is the last commit's record."""
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
    for entry in entries:
        records.append({"kind": "accepted", **accepted_facts(entry)})
        if entry.finish:
            records.append({"kind": "finished", **finished_facts(entry)})
    return records


def process_facts(host: str, process: HostProcess) -> dict:
    """Journal record of an admitted process."""
    return dataclasses.asdict(process) | ({} if host == OWN_HOST else {"host": host})


def _view_of(commit: dict) -> View:
    """The View of a commit record, whose ranks JSON turned into strings."""
    active = {int(rank) for rank in commit["members"]}
    members = tuple(
        Member(RankState.ACTIVE if rank in active else RankState.ABSENT, incarnation)
        for rank, incarnation in enumerate(commit["incarnations"])
    )
    return View(epoch=commit["epoch"], members=members)


def _placement_of(commit: dict, experts: int) -> Placement:
    return Placement(experts=experts, slots=tuple(tuple(row) for row in commit["slots"]))


def _entry_of(record: dict) -> Entry:
    facts = record["request"]
    request = Request(**facts | {"prompt": tuple(facts["prompt"]), "produced": ()})
    return Entry(request, key=record["key"], body=record["body"], created=record["created"])
