"""One rank of `bench_wide_sources`: rank 0 is timed bringing experts out of the bank of rank 1."""

import pathlib

from benchmarks import sources
from benchmarks.meeting import meeting_of
from benchmarks.processes import Out, config_of, worker
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.storage.random_checkpoint import RandomCheckpoint


def measure(directory: pathlib.Path, rank: int, job: dict) -> None:
    """All ranks have all experts in their first slots; rank 0 copies them from OWNER."""
    meeting, config = meeting_of(directory, rank, job), sources.sized(config_of(job))
    layout, drawn = sources.layout_of(config, job["ranks"]), RandomCheckpoint(config.model, 0)
    experts = drawn.read_experts(list(range(config.model.experts)))
    found = []

    def fill(heap) -> None:
        found.append(sources.Bringing(ExpertBank(layout, heap), heap, experts, drawn))

    meeting.open_heap("sources", layout.slab_bytes, fill)
    if rank == 0:
        out, (bringing,) = Out(directory / "found.0.jsonl"), found
        checked = bringing.checked(lambda e: Source(SourceKind.PEER, sources.OWNER, e))
        bringing.require_right(checked, SourceKind.PEER)
        plain = bringing.plain_slots(sources.OWNER)
        moved = bringing.moved_from_peer()
        for name, own in (("peer moved", moved), ("peer checked", checked)):
            rates = sources.time_both(own, plain, bringing.bytes, job["samples"])
            out.write(kind="source", name=name, rates=rates, shape=sources.shape_of(config))
    meeting.share("done")


if __name__ == "__main__":
    worker(measure)
