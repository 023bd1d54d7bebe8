"""Parts of `multi_gpu`: commands, limits and reports; with programs that cost nothing."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.harness import ROOT, Record
from benchmarks.processes import (
    Machine,
    WorkersFailed,
    environment_of,
    machine_of,
    run_directory,
    run_workers,
)
from benchmarks.serving.fault_plan import parse_plan
from benchmarks.wide import targets
from benchmarks.wide.parts import overrides_of, parts_of
from benchmarks.wide.plans import plans_of
from benchmarks.wide.running import Part, chosen, run_parts
from launch.errors import UsageError
from launch.flags import load_config, override
from tests.benchmarks.processes import run_module

DEADLINE_S = 60.0
EIGHT = Machine("gpu", 8, tuple("01234567"))
TWO, SHARED, CPU = Machine("gpu", 2, ("0", "1")), Machine("gpu", 2, ("0",)), Machine("cpu", 2)


class TestMachine:
    def test_ranks_that_share_a_gpu_are_told_in_every_record(self):
        assert (TWO.link, SHARED.link, CPU.link) == ("peer", "shared_gpu", "cpu")
        assert SHARED.device.endswith("shared by 2 ranks") and "shared" not in TWO.device
        assert TWO.device.startswith("2 x ") and SHARED.facts == {"gpus": 1, "link": "shared_gpu"}

    def test_a_rank_for_each_gpu_unless_told_otherwise(self):
        assert machine_of("gpu", None, ("3", "5")) == Machine("gpu", 2, ("3", "5"))
        assert machine_of("gpu", 1, ("3", "5")).gpus == ("3",)
        assert machine_of("cpu", None, None).ranks == 2

    def test_without_a_gpu_it_says_what_to_do(self):
        with pytest.raises(UsageError, match="--platform=cpu"):
            machine_of("gpu", 2, ())

    def test_no_worker_uses_multicast_and_each_sees_its_own_gpu(self, tmp_path):
        for rank in (0, 1):
            found = environment_of(TWO, rank, tmp_path, 0.5)
            assert found["CUDA_VISIBLE_DEVICES"] == str(rank)
            assert found["NCCL_NVLS_ENABLE"] == "0" and found["NVSHMEM_DISABLE_NVLS"] == "1"
            assert found["XLA_CLIENT_MEM_FRACTION"] == "0.5000"
        shared = environment_of(SHARED, 1, tmp_path, 0.5)
        assert shared["XLA_CLIENT_MEM_FRACTION"] == "0.2500"


class TestWorkers:
    def test_one_that_fails_ends_all_and_its_last_words_are_told(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "failing.py").write_text(
            "import sys, time\nif sys.argv[2] == '1':\n    sys.exit('out of luck')\ntime.sleep(999)"
        )
        with pytest.raises(WorkersFailed, match="rank 1 ended with 1:\nout of luck"):
            run_workers("failing", CPU, {}, tmp_path / "run", deadline_s=999)

    def test_those_that_are_late_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "late.py").write_text("import sys, time\ntime.sleep(60 * (sys.argv[2] == '0'))")
        with pytest.raises(WorkersFailed, match=r"ranks \[0\] were not done after 2 s"):
            run_workers("late", CPU, {}, tmp_path / "run", deadline_s=2.0)


class TestRunning:
    def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_runs(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "well.py").write_text("print('fine')")
        (tmp_path / "ill.py").write_text("raise SystemExit('broken, sadly')")
        (tmp_path / "stuck.py").write_text("import time; time.sleep(100)")
        parts = [Part("a", "ill", ("ill",), 30), Part("a", "stuck", ("stuck",), 1.0)]
        parts.append(Part("b", "well", ("well",), 30))
        told = []
        done = run_parts(parts, tmp_path / "out", 120, say=told.append)
        assert [d.status for d in done] == [
            "FAILED: status 1",
            "FAILED: not done after 1 s",
            "done",
        ]
        assert "broken, sadly" in told and (tmp_path / "out" / "well.log").read_text() == "fine\n"
        kept = json.loads((tmp_path / "out" / "parts.json").read_text())
        assert [entry["part"] for entry in kept] == ["ill", "stuck", "well"]

    def test_what_there_is_no_time_for_is_not_begun(self, tmp_path):
        (done,) = run_parts([Part("a", "x", ("nothing",), 30)], tmp_path, 5.0, say=lambda _: None)
        assert done.status.startswith("not run") and not done.ok

    def test_groups_are_chosen_by_name(self):
        parts = [Part("a", "x", (), 1), Part("b", "y", (), 1), Part("a", "z", (), 1)]
        assert [p.name for p in chosen(parts, ["a"])] == ["x", "z"]
        assert chosen(parts, None) == parts
        with pytest.raises(ValueError, match=r"\['c'\] are not among \['a', 'b'\]"):
            chosen(parts, ["c"])


class TestParts:
    @pytest.mark.parametrize("machine", [TWO, EIGHT, SHARED, CPU], ids=lambda m: m.device)
    def test_all_modules_exist_and_no_two_parts_write_one_file(self, machine, tmp_path):
        parts = parts_of(machine, tmp_path, small=machine.link != "peer")
        outs = [word for part in parts for word in part.arguments if word.startswith("--out=")]
        assert len(set(outs)) == len(outs) and len({p.name for p in parts}) == len(parts)
        for part in parts:
            if part.arguments[0] != "pytest":
                assert importlib.util.find_spec(part.arguments[0])
            configs = [w.partition("=")[2] for w in part.arguments if w.startswith("--config=")]
            overrides = [w.partition("=")[2] for w in part.arguments if w.startswith("--override")]
            for config in configs:
                override(load_config(config), *overrides)

    def test_two_calls_of_two_gpus_cover_all_of_it(self, tmp_path):
        groups = {part.group for part in parts_of(TWO, tmp_path, small=False)}
        assert groups == {"correct", "exchange", "decode", "recovery", "scaling", "whole"}
        assert "chained" in {part.group for part in parts_of(EIGHT, tmp_path, small=False)}

    @pytest.mark.parametrize("ranks", [4, 5, 8])
    def test_plans_kill_one_a_quarter_and_half_and_a_chain_and_all_return(self, ranks):
        plans = {name: parse_plan(text, ranks) for name, text in plans_of(ranks).items()}
        most = {name: sum(len(p.killed) for p in plan) for name, plan in plans.items()}
        assert (
            most[f"kill_1_of_{ranks}"] == 1 and most[f"kill_{ranks // 2}_of_{ranks}"] == ranks // 2
        )
        for plan in plans.values():
            assert plan[-1].present == tuple(range(ranks)) and plan[-1].back
        sizes = [len(p.present) for p in plans["chain"]]
        assert sizes == (
            [8, 8, 7, 6, 4, 8] if ranks == 8 else [ranks, ranks, ranks - 1, ranks - 2, ranks]
        )

    @pytest.mark.parametrize(("config", "ranks"), [("small_moe_h100x1", 8), ("tiny_cpu", 4)])
    def test_half_of_the_ranks_have_slots_for_all_experts(self, config, ranks):
        texts = [word.partition("=")[2] for word in overrides_of(config, ranks)]
        found = override(load_config(config), *texts)
        assert ranks // 2 * found.cluster.slots_per_rank >= found.model.experts


def a_record(bench, metric, value, ratio=None, bound=None, **shape) -> Record:
    shape = {"link": "peer"} | shape
    fields = {"unit": "", "device": "2 x NVIDIA H200", "ranks": 2, "commit": "", "time": "t"}
    return Record(
        bench=bench, metric=metric, value=value, ratio=ratio, bound=bound, shape=shape, **fields
    )


AT_128 = {"tokens": 128, "hidden": 7168, "dtype": "bfloat16"}


class TestTargets:
    def lines(self, *records, ranks=2):
        return {line.what: line for line in targets.summary(records, ranks)}

    def test_nothing_measured_is_said_of_every_line(self):
        assert {line.verdict for line in self.lines().values()} == {"not measured"}

    def test_times_are_reached_or_missed(self):
        fast = a_record("wide_dispatch", "time p50", 11.0, bound=9.0, **AT_128)
        slow = a_record("wide_collective", "time p50", 34.9, collective="all_to_all", **AT_128)
        ragged = a_record(
            "wide_collective", "time p50", 100.0, collective="ragged_all_to_all", **AT_128
        )
        lines = self.lines(fast, slow, ragged)
        assert lines["dispatch 128 x 7168 bfloat16"].verdict == "reached"
        assert lines["dispatch / all_to_all"].verdict == "reached"
        assert lines["dispatch / ragged_all_to_all"].verdict == "MISSED"
        home = a_record("wide_combine", "time p50", 16.0, bound=10.0, combine="per_rank", **AT_128)
        lines = self.lines(home)
        assert lines["combine 128 x 7168 per_rank"].verdict == "MISSED"
        assert lines["combine 128 x 7168 per_rank, 1.3 x bound + 5"].verdict == "reached"

    def test_the_worst_batch_counts_for_membership_and_each_for_decoding(self):
        member = [
            a_record("wide_decode", "membership p50", 1.0, ratio=r, tokens=b)
            for b, r in ((1, 1.002), (64, 1.02))
        ]
        shape = {"system": "live", "against": "ring", "model": "m", "layers": 4}
        rates = [
            a_record("wide_decode", "tokens_per_s", 9.0, ratio=r, tokens=b, **shape)
            for b, r in ((1, 1.4), (64, 0.9))
        ]
        lines = self.lines(*member, *rates)
        assert lines["membership"].value == "1.020" and lines["membership"].verdict == "MISSED"
        assert lines["decode / ring, m L=4 B=1"].verdict == "reached"
        assert lines["decode / ring, m L=4 B=64"].verdict == "MISSED"

    def test_a_kill_with_replicas_is_not_one_with_orphans(self):
        full = a_record(
            "faults", "pause_s elastic", 0.08, ratio=0.004, redundancy=2, against="restart"
        )
        orphans = a_record("faults", "pause_s elastic", 1.5, redundancy=1)
        lines = self.lines(full, orphans)
        assert lines["kill: pause"].verdict == "reached"
        assert lines["kill: pause / restart"].value == "1/250"
        assert lines["orphans from backup: pause"].value == "1.500 s"

    def test_the_longest_pause_of_a_plan_counts_and_orphans_may_take_longer(self):
        plans = {"[[0,1,2,3],[0,-1,-2,3],[0,3]]": (0.1, 1.5), "[[0,1],[0,-1],[0]]": (0.3,)}
        pauses = [
            a_record("serve", "pause_s", value, fault_plan=plan)
            for plan, values in plans.items()
            for value in values
        ]
        lines = self.lines(*pauses, ranks=4)
        both, one = lines["4->2: longest pause"], lines["2->1: longest pause"]
        assert (both.value, both.verdict) == ("1.500 s", "reached") and one.verdict == "MISSED"

    def test_ranks_that_share_a_gpu_reach_nothing(self):
        shared = a_record("wide_dispatch", "time p50", 1.0, **AT_128, **{"link": "shared_gpu"})
        assert self.lines(shared)["dispatch 128 x 7168 bfloat16"].verdict == "no verdict"

    def test_scaling_is_the_rate_of_a_rank_to_that_of_one_alone(self):
        shape = {"system": "live", "tokens": 64, "model": "m", "layers": 4}
        alone = a_record("wide_decode", "tokens_per_s", 1000.0, gpus=1, **shape)
        both = a_record("wide_decode", "tokens_per_s", 1800.0, gpus=2, **shape)
        other = a_record("wide_decode", "tokens_per_s", 1.0, gpus=2, **shape | {"model": "larger"})
        assert (
            self.lines(alone, both, other)["scaling from 1 to 2, 64 sequences each"].value
            == "0.900"
        )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--platform=cpu"], "--out=DIR must name a directory"),
        (["--platform=cpu", "--out=x", "--parts=magic"], "['magic'] are not among ['exchange'"),
        (["--gpus=-1", "--out=x"], "no NVIDIA GPU was found"),
    ],
)
@pytest.mark.timeout(60)
def test_what_cannot_be_run_is_refused(arguments, told):
    done = run_module("benchmarks.multi_gpu", *arguments, deadline_s=50)
    assert done.returncode == 2 and told in done.stdout, done.stdout


def test_a_directory_of_an_earlier_run_is_emptied_and_no_other(tmp_path):
    old = tmp_path / "old"
    (old / "meeting").mkdir(parents=True)
    (old / "job.json").write_text("{}")
    with run_directory(str(old)) as found:
        assert found.path == old and not any(old.iterdir())
    assert old.exists()
    (old / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds files that are of no run"):
        run_directory(str(old)).__enter__()


def test_a_temporary_directory_stays_for_its_logs_alone_and_goes_with_a_killed_process(tmp_path):
    """Like those of launch: they are swept when their process is gone."""
    program = (
        "import os, sys, tempfile\n"
        "from benchmarks.processes import WorkersFailed, run_directory\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "with run_directory(): pass\n"
        "try:\n"
        "    with run_directory() as kept: raise WorkersFailed('no result')\n"
        "except WorkersFailed: print(kept.path)\n"
        "with run_directory(): os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ends_s = time.monotonic() + DEADLINE_S
    while len(list(tmp_path.iterdir())) > 1 and time.monotonic() < ends_s:
        time.sleep(0.02)
    assert [str(path) for path in tmp_path.iterdir()] == [done.stdout.strip()]
