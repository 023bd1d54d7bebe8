"""Cost of an epoch change for the supervisor of hundreds of ranks: its own code, simulated ranks.

    python -m benchmarks.bench_control --ranks=512 --out=benchmarks/results/control.jsonl

The coordinator and the codec are those of the supervisor; ranks are simulated by the Status that
each would send. A rank dies, or one that was away is let in: the CPU time of one whole change is
counted, from the event to the Status by which the last rank says that it serves again. That holds
deciding, planning, encoding each message and decoding each answer; it leaves out the sockets.
The Prepare of all these ranks is encoded and decoded by itself, too: each rank decodes one.

A placement holds an expert with all its layers, so the number of layers changes only bytes.
"""

import collections
import time

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, cpu_device, percentile
from eep_jax.config import ClusterConfig
from eep_jax.coordination import coordinator
from eep_jax.coordination.protocol import Commit, Load, Mode, Prepare, Status
from eep_jax.coordination.state import (
    Arrived,
    CoordinatorState,
    Ended,
    RankRecord,
    Send,
    Tick,
)
from eep_jax.membership.view import Member, RankState, View
from eep_jax.placement.planner import initial_placement
from eep_jax.runtime.control import codec

AIM_MS = 100.0
BYTES_MAX = 64 << 20
SPARE = 1  # slots of a rank beyond what its experts need: where orphans go


def define() -> None:
    command.define()
    absl_flags.DEFINE_integer("ranks", 512, "Simulated ranks.", 2)
    absl_flags.DEFINE_integer("experts", 256, "Experts of the model.", 1)
    absl_flags.DEFINE_integer("layers", 61, "Layers of each expert.", 1)
    absl_flags.DEFINE_integer("redundancy", 2, "Replicas of each expert.", 1)
    absl_flags.DEFINE_integer("samples", 5, "Changes that are measured.", 1)


class Simulation:
    """A serving cluster without processes, and the CPU time of the supervisor's part."""

    def __init__(self, ranks: int, experts: int, redundancy: int):
        slots = -(-experts * redundancy // ranks) + SPARE
        config = ClusterConfig(
            ranks=ranks, slots_per_rank=slots, redundancy=redundancy, background_experts=0
        )
        placement = initial_placement(experts, ranks, slots, redundancy)
        self.now_ms, self.cpu_s, self._sequence = 1_000, 0.0, 0
        self._encode = codec.Encoder().encode
        self.bytes_sent = 0
        statuses = [self._status(r, Mode.SERVING, 1, 0, placement.slots[r]) for r in range(ranks)]
        self.state = CoordinatorState(
            config=config,
            view=View(epoch=1, members=(Member(RankState.ACTIVE, 1),) * ranks),
            placement=placement,
            records=tuple(
                RankRecord(incarnation=1, ended=False, heard_ms=self.now_ms, status=status)
                for status in statuses
            ),
            epoch_tried=1,
            advanced_ms=self.now_ms,
        )

    def kill(self, rank: int) -> float:
        """Ends a rank's process; returns the CPU ms until the others serve without it."""
        self.cpu_s = 0.0
        self._settle(self._feed(Ended(rank, self.state.records[rank].incarnation)))
        if rank in self.state.view.in_epoch or self.state.change is not None:
            raise RuntimeError(f"rank {rank} is still in, at {self.state.view.epoch=}")
        return self.cpu_s * 1e3

    def admit(self, rank: int) -> float:
        """A new process of a dead rank comes in; returns the CPU ms of all of it."""
        self.cpu_s = 0.0
        self._feed(Arrived(rank))
        incarnation = self.state.records[rank].incarnation
        empty = (-1,) * self.state.config.slots_per_rank
        offered = self._status(rank, Mode.OFFERED, 0, 0, empty, incarnation)
        self._settle(self._hear(offered))
        self._settle(self._feed(Tick()))
        if rank not in self.state.view.in_epoch or self.state.change is not None:
            raise RuntimeError(f"rank {rank} is still out, at {self.state.view.epoch=}")
        return self.cpu_s * 1e3

    def _settle(self, sends: list[Send]) -> None:
        """Answers every message as a rank would that carries it out at once."""
        while sends:
            answers = [status for send in sends if (status := self._answer(send)) is not None]
            sends = self._hear(*answers)

    def _answer(self, send: Send) -> Status | None:
        rank, message, record = send.rank, send.message, self.state.records[send.rank]
        if send.incarnation != record.incarnation or not record.is_current:
            return None
        incarnation, epoch = record.incarnation, self.state.view.epoch
        if isinstance(message, Load):
            return self._status(rank, Mode.OFFERED, 0, 0, message.slots, incarnation)
        if isinstance(message, Prepare):
            contents = message.placement.slots[rank]
            prepared = message.view.epoch
            return self._status(rank, Mode.READY, epoch, prepared, contents, incarnation)
        if isinstance(message, Commit):
            contents = self.state.placement.slots[rank]
            return self._status(rank, Mode.SERVING, epoch, epoch, contents, incarnation)
        return None

    def _status(self, rank, mode, epoch, prepared, contents, incarnation=1) -> Status:
        self._sequence += 1
        return Status(
            rank=rank,
            incarnation=incarnation,
            sequence=self._sequence,
            mode=mode,
            epoch=epoch,
            prepared=prepared,
            contents=tuple(contents),
            handle=f"posix_shm:eep-{rank}",
        )

    def _hear(self, *statuses: Status) -> list[Send]:
        """Takes the ranks' messages in turn. The clock is read once: reading it costs, too."""
        said = [codec.encode(status) for status in statuses]  # the ranks' work
        begin_s, sends = time.process_time(), []
        for data in said:
            status = codec.decode(data, {"Status": Status}, BYTES_MAX)
            sends += self._advance(status)
        self.cpu_s += time.process_time() - begin_s
        return sends

    def _feed(self, event) -> list[Send]:
        begin_s = time.process_time()
        sends = self._advance(event)
        self.cpu_s += time.process_time() - begin_s
        return sends

    def _advance(self, event) -> list[Send]:
        self.state, commands = coordinator.advance(self.state, event, self.now_ms)
        sends = [command for command in commands if isinstance(command, Send)]
        self.bytes_sent += sum(len(self._encode(send.message)) for send in sends)
        return sends


def prepare_ms(state: CoordinatorState) -> dict[str, float]:
    """CPU ms to encode and to decode one Prepare for the ranks of `state`."""
    ranks = state.view.ranks
    message = Prepare(
        epoch=state.view.epoch,
        view=state.view,
        placement=state.placement,
        moves=(),
        handles={rank: f"posix_shm:eep-{rank}" for rank in ranks},
        reason="rank 0 is out",
    )
    begin_s = time.process_time()
    data = codec.encode(message)
    encoded_s = time.process_time()
    found = codec.decode(data, {"Prepare": Prepare}, BYTES_MAX)
    decoded_s = time.process_time()
    if found != message:
        raise RuntimeError("the decoded Prepare differs from the encoded one")
    return {
        "prepare_encode": (encoded_s - begin_s) * 1e3,
        "prepare_decode": (decoded_s - encoded_s) * 1e3,
    }


def main() -> list[Record]:
    values = absl_flags.FLAGS
    simulation = Simulation(values.ranks, values.experts, values.redundancy)
    times: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(values.samples):
        rank = number * 7 % values.ranks
        times["repair"].append(simulation.kill(rank))
        times["admission"].append(simulation.admit(rank))
        for kind, ms in prepare_ms(simulation.state).items():
            times[kind].append(ms)
    shape = {"experts": values.experts, "layers": values.layers, "redundancy": values.redundancy}
    shape |= {"slots": simulation.state.config.slots_per_rank, "samples": values.samples}
    sheet = Sheet("control", cpu_device(), values.ranks, shape)
    for kind, ms in times.items():
        p50 = sheet.add(f"{kind}_cpu_ms p50", percentile(ms, 50), "ms").value
        most = sheet.add(f"{kind}_cpu_ms max", max(ms), "ms").value
        aim = ""
        if kind in ("repair", "admission"):
            aim = f"; at most {AIM_MS:.0f} ms: {command.verdict(most <= AIM_MS)}"
        print(f"{kind}: p50 {p50:.2f} ms, max {most:.2f} ms of CPU, {values.ranks} ranks{aim}")
    return sheet.records


if __name__ == "__main__":
    define()
    command.run(main)
