"""Ranks as processes, each on its own GPU where there are enough: killed in steps, and back again.

EEP_TEST_PLATFORM=gpu EEP_GPU_KILLS=100 python -m pytest tests/gpu/test_killed_processes.py

EEP_GPU_KILLS is how many ranks are killed (12), EEP_GPU_SPARES how many processes start meanwhile
(3); EEP_GPU_RANKS (4) and EEP_TEST_GPUS (0,1) say how many ranks there are, and on which GPUs.
Kernels of processes that share a GPU take turns of milliseconds, so deadlines are seconds.
"""

import os
import signal
import time

import numpy as np
import pytest

from tests.gpu.exchange_process import LAYERS, RANKS, RankProcess, a_step_work
from tests.support.loopback import naive_chain

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("EEP_GPU_KILLS", "12"))
SPARES = int(os.environ.get("EEP_GPU_SPARES", "3"))
ABORT_DEADLINE_MS = 60_000  # where an abort is to end the step
DEADLINE_MS = 3_000  # where the deadline is
SLACK_S = 15.0  # several turns of all processes, and a busy machine
# In each exchange results, y and the next x are rounded to bfloat16; nothing cancels.
CLOSE = {"rtol": LAYERS * 2.0**-7, "atol": 0}


class Spares:
    """Processes that start while others serve, in the order in which ranks will need them."""

    def __init__(self, wanted: list[int], directory):
        self._wanted, self._directory = list(wanted), directory
        self._starting: list[RankProcess] = []
        self._started = 0

    def fill(self) -> None:
        while self._wanted and len(self._starting) < SPARES:
            self._start(self._wanted.pop(0))

    def take(self, rank: int) -> RankProcess:
        if rank not in [spare.rank for spare in self._starting]:
            self._start(rank)
        spare = next(spare for spare in self._starting if spare.rank == rank)
        spare.await_ready()
        self._starting.remove(spare)
        self.fill()
        return spare

    def kill(self) -> None:
        for spare in self._starting:
            spare.kill()

    def _start(self, rank: int) -> None:
        self._started += 1
        self._starting.append(RankProcess(rank, self._directory, f"-{self._started}"))


class Cluster:
    """All ranks, and the parent that decides for them in the place of a supervisor."""

    def __init__(self, victims: list[int], directory):
        self.processes: dict[int, RankProcess] = {}
        self.spares = Spares(victims, directory)
        self.epoch, self.compiled = 1, 0
        try:
            for rank in range(RANKS):
                self.processes[rank] = RankProcess(rank, directory)
            for process in self.processes.values():
                process.await_ready()
            self.spares.fill()
            for rank in self.processes:
                self.introduce(rank)
            self.addresses = {r: p.ask("where") for r, p in self.processes.items()}
        except BaseException:
            self.kill()
            raise

    @property
    def members(self) -> list[int]:
        return sorted(self.processes)

    def introduce(self, rank: int) -> None:
        """All others and `rank` map each other."""
        new = self.processes[rank]
        for peer, process in self.processes.items():
            if peer != rank:
                process.ask("attach", rank=rank, handle=new.handle)
                new.ask("attach", rank=peer, handle=process.handle)

    def change(self) -> None:
        """A new epoch of those who are in: all have stopped; flags are cleared, then all go on."""
        self.epoch += 1
        for process in self.processes.values():
            process.ask("clear")

    def start_steps(
        self, seed: int, count: int = 1, deadline_ms: int = ABORT_DEADLINE_MS, members=None
    ) -> None:
        members = self.members if members is None else members
        active = np.isin(np.arange(RANKS), members).astype(np.int32)
        values = {"epoch": self.epoch, "active": active, "seed": seed, "count": count}
        for rank in members:
            self.processes[rank].tell("steps", deadline_ms=deadline_ms, **values)

    def check_steps(self, seed: int, count: int = 1, members=None) -> float:
        """Steps of all members, or of some, which must be right; returns the seconds of the last
        one."""
        members = self.members if members is None else members
        self.start_steps(seed, count, members=members)
        outcomes = {rank: self.processes[rank].answer() for rank in members}
        wanted = naive_chain(a_step_work(seed).among(members), LAYERS)
        for rank, outcome in outcomes.items():
            assert not outcome.suspicion, f"rank {rank} accuses {outcome.suspicion}"
            assert outcome.completed == count
            np.testing.assert_allclose(outcome.y, wanted[rank], **CLOSE, err_msg=f"rank {rank}")
            assert outcome.compilations == 0, f"rank {rank} compiled something"
        return max(outcome.seconds for outcome in outcomes.values())

    def check_survivors(self, outcomes: dict, seed: int, started: list[int]) -> None:
        """Of steps in which a rank died: what is not accused is right, and all is finite."""
        wanted = naive_chain(a_step_work(seed).among(started), LAYERS)
        for rank, outcome in outcomes.items():
            assert np.isfinite(outcome.y).all(), f"rank {rank} summed a stale row"
            assert outcome.compilations == 0
            if not outcome.suspicion:
                np.testing.assert_allclose(outcome.y, wanted[rank], **CLOSE)

    def end(self, rank: int) -> None:
        self.processes.pop(rank).kill()

    def abort(self) -> None:
        for process in self.processes.values():
            process.tell("abort", epoch=self.epoch + 1)

    def answers(self, deadline_s: float) -> dict:
        end = time.monotonic() + deadline_s
        left = lambda: max(0.1, end - time.monotonic())
        return {rank: process.answer(left()) for rank, process in self.processes.items()}

    def evict(self, rank: int) -> None:
        for process in self.processes.values():
            process.ask("detach", rank=rank)
        self.change()

    def restore_priority(self, rank: int) -> None:
        """A new process with new memory, at the addresses where peers had the old one."""
        self.processes[rank] = self.spares.take(rank)
        self.introduce(rank)
        self.change()
        for survivor, process in self.processes.items():
            if survivor != rank:
                assert process.ask("where") == self.addresses[survivor]
        self.addresses[rank] = self.processes[rank].ask("where")

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
        self.spares.kill()


@pytest.fixture(scope="module")
def plan(seed) -> list[int]:
    """Which rank is the next one to go; the last is for the rank that sleeps."""
    return np.random.default_rng(seed).integers(0, RANKS, KILLS + 1).tolist()


@pytest.fixture(scope="module")
def cluster(plan, tmp_path_factory):
    cluster = Cluster(plan, tmp_path_factory.mktemp("ranks"))
    yield cluster
    cluster.kill()


def test_processes_exchange_through_each_others_memory(cluster):
    for seed in range(3):
        cluster.check_steps(seed, count=2)


def test_any_of_them_exchange_while_the_others_stand_by(cluster, seed):
    """Uniform and skewed routings; what goes to a rank that is not in adds nothing."""
    random = np.random.default_rng(seed + 2)
    for number in range(2 * RANKS):
        members = np.flatnonzero(random.random(RANKS) < 0.6).tolist() or [number % RANKS]
        cluster.change()
        cluster.check_steps(number, count=2, members=members)
    cluster.change()
    cluster.check_steps(number, count=2)


def test_ranks_killed_anywhere_in_a_step_hang_nobody_and_return(cluster, plan, seed):
    random = np.random.default_rng(seed + 1)
    step_s = min(1.0, cluster.check_steps(0, count=3))
    accused = 0
    for trial, victim in enumerate(plan[:KILLS]):
        by_deadline, started = trial % 4 == 3, cluster.members
        deadline_ms = DEADLINE_MS if by_deadline else ABORT_DEADLINE_MS
        delay_s = float(random.uniform(0, 2 * step_s + 0.02))
        said = f"trial {trial}: rank {victim} after {1000 * delay_s:.1f} ms, {by_deadline=}"
        print(said, flush=True)

        # More steps than the victim lives to see, so that the others wait for it somewhere.
        cluster.start_steps(trial, count=200, deadline_ms=deadline_ms)
        time.sleep(delay_s)
        cluster.end(victim)
        if by_deadline:
            # One wait for the dead rank, and one for a survivor that noticed it a step later.
            outcomes = cluster.answers(2 * DEADLINE_MS / 1000 + SLACK_S)
            blamed = set().union(*(outcome.suspicion for outcome in outcomes.values()))
            # A survivor may be blamed too, by one that the victim had still told: they reach the
            # next exchange one deadline apart. Who is dead is for the detector to say.
            assert victim in blamed, said
            print(f"    blamed: {sorted(map(int, blamed))}", flush=True)
        else:
            cluster.abort()
            outcomes = cluster.answers(SLACK_S)
            for rank, outcome in outcomes.items():
                assert outcome.suspicion == [rank], f"{said}: {rank} blames {outcome.suspicion}"
        accused += sum(bool(outcome.suspicion) for outcome in outcomes.values())
        cluster.check_survivors(outcomes, trial, started)

        cluster.evict(victim)
        cluster.check_steps(trial, count=2)
        cluster.restore_priority(victim)
        cluster.check_steps(trial, count=2)
    assert accused == KILLS * (RANKS - 1), "all steps that lost a rank were discarded"


def test_late_writes_of_a_rank_that_slept_change_nothing_and_it_can_return(cluster, plan):
    victim = plan[KILLS]
    cluster.start_steps(1, count=200)
    sleeper = cluster.processes.pop(victim)
    try:
        sleeper.signal(signal.SIGSTOP)
        cluster.abort()
        for rank, outcome in cluster.answers(SLACK_S).items():
            assert outcome.suspicion == [rank]
        cluster.evict(victim)
        cluster.check_steps(2)
        sleeper.signal(signal.SIGCONT)
        # It still maps its peers' windows, and goes on in its old epoch until it is told.
        for seed in range(3, 8):
            cluster.check_steps(seed)
        sleeper.tell("abort", epoch=cluster.epoch)
        assert sleeper.answer(SLACK_S).suspicion == [victim], "it learns that it was evicted"
        for verb in ("poison", "clear"):
            sleeper.ask(verb)
        cluster.check_steps(9)
    finally:
        sleeper.kill()
    cluster.restore_priority(victim)
    cluster.check_steps(10, count=2)
