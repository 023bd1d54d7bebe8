"""Experts that died with their last replica come back from each source, and change no token."""

import collections
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from configs import tiny_cpu
from eep_jax.models.weights import expert_name
from eep_jax.relocation.shards import chunk_name
from eep_jax.runtime.history.change_costs import PAUSE_PHASES
from eep_jax.runtime.history.journal import replay
from launch.cluster import is_whole
from tests.eep_jax.storage.test_checkpoint import damage
from tests.support.processes import ClusterUnderTest, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

EXPERTS, RANKS = 16, 4
# One replica of each expert, and nobody comes back: a death makes orphans.
ONE_REPLICA = "cluster.redundancy=1"
STAY_DEAD = -1
A_QUARTER_EACH = f"cluster.backup_bytes={4 * (400 << 10)}"


def cluster_with(run_dir, *overrides):
    return ClusterUnderTest(run_dir, ONE_REPLICA, *overrides, respawn_delay_ms=STAY_DEAD)


def backed_up(copies: int):
    """Whether every expert is in the memory of so many ranks."""

    def wanted(status) -> bool:
        count = collections.Counter(e for rank in status["ranks"] for e in rank["backups"])
        return [count[e] for e in range(EXPERTS)] == [copies] * EXPERTS

    return wanted


def orphans(status, *ranks) -> set[int]:
    return {e for rank in ranks for e in status["experts"]["placement"][rank] if e >= 0}


def alone(status, dead) -> set[int]:
    """Experts whose replica and whose every backup die with these ranks."""
    survivors = set(range(RANKS)) - set(dead)
    return orphans(status, *dead) - {e for r in survivors for e in status["ranks"][r]["backups"]}


def repairs(status) -> list[dict]:
    return [e for e in status["events"] if e["kind"] == "repair" and e["change"] == "repair"]


def moved(status, since) -> dict[str, int]:
    """Experts written by the ranks of both, by source."""
    total = collections.Counter()
    for rank, before in zip(status["ranks"], since["ranks"], strict=True):
        if rank["state"] == "active":
            total.update(rank["experts_moved"])
            total.subtract(before["experts_moved"])
    return {kind: count for kind, count in total.items() if count}


def all_moved(since, count: int, *dead):
    """The ranks are out, and the survivors have reported at least so many experts written.

    More where a repair was given up for a second death, and its moves made again.
    """
    return lambda s: (
        all(is_out(rank)(s) for rank in dead) and sum(moved(s, since).values()) >= count
    )


@pytest.mark.parametrize("source", ["backup", "checkpoint"])
def test_orphans_come_from_the_one_source_that_is_allowed(tmp_path, source):
    with cluster_with(tmp_path, f"cluster.sources={source}") as cluster:
        before = cluster.wait(backed_up(RANKS), "backups of all experts")
        lost = orphans(before, 1)
        with cluster.load():
            cluster.signal(1)
            status = cluster.wait(all_moved(before, len(lost), 1), "the repair")
            # Under load: every rank takes a first good step.
            status = cluster.wait(repairs, "the record of the repair")
        assert set(moved(status, before)) == {source}
        record = repairs(status)[0]
        assert record["change"] == "repair" and record["reason"].startswith("rank 1 is ending")
        assert record["moves"] == {source: len(lost)} and record["silent_ranks"] == []
        assert record["bytes"][source] > 0
        assert record in replay(tmp_path / "journal.jsonl"), "it outlives the supervisor"
        seconds = record["seconds"]
        assert all(0 <= seconds[phase] < 5 for phase in PAUSE_PHASES)
        assert sum(seconds[phase] for phase in PAUSE_PHASES) == pytest.approx(seconds["total"])
        assert status["experts"]["missing"] == []


def test_local_replicas_alone_are_enough_where_one_lives(tmp_path):
    """No byte is read from anywhere: a change of tables."""
    with ClusterUnderTest(tmp_path, "cluster.sources=local", respawn_delay_ms=STAY_DEAD) as cluster:
        before = cluster.status()
        with cluster.load():
            cluster.signal(3)
            cluster.wait(is_out(3), "the eviction of rank 3")
            status = cluster.wait(repairs, "the record of the repair")
        assert repairs(status)[0]["moves"] == repairs(status)[0]["bytes"] == {}
        assert moved(cluster.status(), before) == {} and status["experts"]["missing"] == []


def test_peers_alone_supply_what_has_a_replica(tmp_path):
    """Nothing moves for resuming, all that is restored afterwards comes from banks."""
    peers = ("cluster.redundancy=2", "cluster.slots_per_rank=12", "cluster.sources=peer")
    with ClusterUnderTest(tmp_path, *peers, respawn_delay_ms=STAY_DEAD) as cluster:
        before = cluster.status()
        with cluster.load():
            cluster.signal(2)
            cluster.wait(is_out(2), "the eviction of rank 2")
            status = cluster.wait(
                lambda s: (
                    s["experts"]["replicas_min"] == 2 and s["state"] == "serving" and repairs(s)
                ),
                "two replicas of every expert",
            )
            status = cluster.wait(lambda s: moved(s, before), "the numbers of the ranks")
        assert repairs(status)[0]["moves"] == repairs(status)[0]["bytes"] == {}
        assert set(moved(status, before)) == {"peer"}
        log = cluster.cluster.log_path("supervisor").read_text()
        assert "Traceback" not in log


def test_the_chosen_source_dies_while_it_is_waited_for(tmp_path):
    """It is stopped first, so that a survivor is sure to wait for it, and then killed."""
    with cluster_with(tmp_path, A_QUARTER_EACH, "cluster.source_order=tier") as cluster:
        before = cluster.wait(backed_up(1), "one backup of each expert")
        kept = lambda a, b: orphans(before, a) & set(before["ranks"][b]["backups"])
        dead, chosen = max(
            itertools.permutations(range(RANKS), 2), key=lambda pair: len(kept(*pair))
        )
        assert kept(dead, chosen)
        lost = orphans(before, dead, chosen)
        with cluster.load():
            cluster.signal(chosen, signal.SIGSTOP)
            cluster.signal(dead)
            cluster.wait(lambda s: s["state"] == "changing", "the repair to begin")
            waits = lambda _: any(f"backup rank {chosen}" in text(cluster, r) for r in range(RANKS))
            cluster.wait(waits, "a survivor that gives the chosen source up")
            cluster.signal(chosen)
            status = cluster.wait(all_moved(before, len(lost), dead, chosen), "the repair")
        assert "checkpoint" in moved(status, before)
        assert status["experts"]["missing"] == []


def text(cluster, rank: int) -> str:
    return cluster.cluster.log_path(f"rank{rank}").read_text()


def test_damaged_and_slow_storage_costs_time_and_no_token(tmp_path):
    """A damaged chunk and damaged shards of one expert; then storage that answers nothing."""
    checkpoint = shutil.copytree(tiny_cpu.get_config().checkpoint, tmp_path / "checkpoint")
    order = ("cluster.sources=checkpoint,backup", "cluster.source_order=tier")
    options = (*order, "cluster.fetch_deadline_ms=1000", f"checkpoint={checkpoint}")
    run_dir = tmp_path / "run"
    with cluster_with(run_dir, *options) as cluster:
        before = cluster.wait(backed_up(RANKS), "backups of all experts")
        lost = orphans(before, 1)
        victim = min(lost)
        damage(checkpoint, expert_name(victim))
        assert flip_shards(cluster, victim, but=3) == 3
        with cluster.load():
            cluster.signal(1)
            status = cluster.wait(all_moved(before, len(lost), 1), "the repair")
        assert moved(status, before) == {"checkpoint": len(lost) - 1, "backup": 1}
        logs = "".join(text(cluster, rank) for rank in range(RANKS))
        assert f"expert {victim} from checkpoint failed" in logs
        assert f"expert {victim} from backup rank 3" in logs or "backup rank 3" in logs

        between = cluster.status()
        lost = orphans(between, 2)
        assert stall(checkpoint) > 0
        with cluster.load():
            cluster.signal(2)
            status = cluster.wait(all_moved(between, len(lost), 2), "the second repair")
        assert moved(status, between) == {"backup": len(lost)}
        assert status["experts"]["missing"] == []


def flip_shards(cluster, expert: int, but: int) -> int:
    """Flips a bit in every backup of an expert but that of one rank; returns how many."""
    flipped = 0
    for rank in range(RANKS):
        for store in pathlib.Path("/dev/shm").glob(f"eep-backup-*-{cluster.pid(rank)}-*"):
            if rank != but:
                with (store / "served" / str(expert) / chunk_name(4)).open("r+b") as file:
                    byte = file.read(1)
                    file.seek(0)
                    file.write(bytes([byte[0] ^ 1]))
                flipped += 1
    return flipped


def stall(checkpoint: pathlib.Path) -> int:
    """Whoever opens a file of weights waits for ever, as on storage that hangs."""
    files = [path for path in (checkpoint / "weights").rglob("d/*") if path.is_file()]
    for path in files:
        path.unlink()
        os.mkfifo(path)
    return len(files)


def test_a_first_start_that_cannot_succeed_ends_with_the_reason(tmp_path):
    """Long before the time that ranks have to come up is over."""
    checkpoint = shutil.copytree(tiny_cpu.get_config().checkpoint, tmp_path / "checkpoint")
    damage(checkpoint, expert_name(6))
    flags = ["--port=0", f"--override=checkpoint={checkpoint}", f"--run_dir={tmp_path / 'run'}"]
    flags.append("--override=cluster.formation_ms=1000000")
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    line = done.stdout.strip().splitlines()[-1]
    assert "failed: the cluster cannot start: experts [6] have no" in line and "e006" in line
    assert "Traceback" not in done.stdout + done.stderr


def test_a_damaged_checkpoint_ends_no_rank_and_is_tried_again_until_it_is_mended(tmp_path):
    """At the first start, and for an orphan. The answer names expert, file and both digests."""
    checkpoint = shutil.copytree(tiny_cpu.get_config().checkpoint, tmp_path / "checkpoint")
    options = (ONE_REPLICA, "cluster.backup_bytes=0", f"checkpoint={checkpoint}")
    names = rf"experts \[6\] have no .*e006 of {checkpoint} has digest \w+, the manifest says \w+"
    damage(checkpoint, expert_name(6))
    cluster = ClusterUnderTest(tmp_path / "run", *options, respawn_delay_ms=STAY_DEAD)
    blocked = lambda status: re.search(names, status["blocked"])
    with cluster.started():
        cluster.wait(blocked, "the reason why nothing is served", 90.0)
        pids = [cluster.pid(rank) for rank in range(RANKS)]
        damage(checkpoint, expert_name(6))  # what is flipped twice is mended
        before = cluster.wait(is_whole, "the start once it is mended")
        assert [rank["incarnation"] for rank in before["ranks"]] == [1] * RANKS

        victim = next(r for r in range(RANKS) if 6 in before["experts"]["placement"][r])
        damage(checkpoint, expert_name(6))
        cluster.signal(victim)
        status = cluster.wait(blocked, "the reason why it stopped")
        assert [r for r in range(RANKS) if status["ranks"][r]["state"] != "active"] == [victim]
        damage(checkpoint, expert_name(6))
        cluster.wait(is_out(victim), "the repair once it is mended")
        survivors = set(range(RANKS)) - {victim}
        assert [cluster.pid(r) for r in survivors] == [pids[r] for r in survivors]


def test_a_backup_that_dies_with_its_rank_is_replaced_by_the_next_source(tmp_path):
    with cluster_with(tmp_path, A_QUARTER_EACH, "cluster.source_order=tier") as cluster:
        before = cluster.wait(backed_up(1), "one backup of each expert")
        dead = max(itertools.combinations(range(RANKS), 2), key=lambda d: len(alone(before, d)))
        assert alone(before, dead), "every backup is on some survivor, whoever dies"
        lost = orphans(before, *dead)
        with cluster.load():
            for rank in dead:
                cluster.signal(rank)
            status = cluster.wait(all_moved(before, len(lost), *dead), "the repair")
        found = moved(status, before)
        assert set(found) == {"backup", "checkpoint"}
        assert found["checkpoint"] >= len(alone(before, dead))
        assert status["experts"]["missing"] == []
        measured = [set(r["source_bytes_per_s"]) for r in status["ranks"]]
        assert measured == [{"local", "peer", "backup", "checkpoint"}] * RANKS
