"""Real processes without a serving engine: README's program as written, and a rank that returns.

python -m tests.multiprocess.test_library DIR RANK     # one rank of the second test
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from eep_jax.library.environment import cpu_environment

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

ROOT = pathlib.Path(__file__).parents[2]
RANKS, VICTIM, CALLS = 3, 1, 30
DEADLINE_S = 300.0  # a process loads JAX and compiles in seconds; a loaded machine may take long
STOP = "stop"


def leave_file(rank: int) -> str:
    return f"leave{rank}"


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    return kept | cpu_environment() | {"PYTHONPATH": str(ROOT)}


def readme_program() -> str:
    """The whole program of the library's README, and of the first one, if it is still there."""
    readmes = (ROOT / "eep_jax" / "library" / "README.md", ROOT / "README.md")
    blocks = [b for r in readmes for b in re.findall(r"```python\n(.*?)```", r.read_text(), re.S)]
    (program,) = {block for block in blocks if "join(" in block}
    return program


def test_the_program_of_the_readme_runs_as_written(tmp_path):
    program = tmp_path / "example.py"
    program.write_text(readme_program())
    assert len(program.read_text().splitlines()) < 80
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = sorted(re.findall(r"rank (\d): the same bits (\d+) times, compiled 0 more", done.stdout))
    assert [rank for rank, _ in said] == ["0", "2"], done.stdout
    assert all(int(count) >= 20 for _, count in said)


class Run:
    """A supervisor and rank processes of this file; what each rank last said of itself."""

    def __init__(self, run_dir: pathlib.Path):
        from eep_jax.library.config import run_config
        from eep_jax.library.supervise import start_supervisor
        from tests.eep_jax.library.factories import LAYERS, TOKENS, a_moe

        # One replica of each expert: a death makes orphans, which come from the given arrays.
        config = run_config(
            a_moe(), layers=LAYERS, ranks=RANKS, slots_per_rank=8, tokens_max=TOKENS
        )
        self.run_dir, self.ranks = run_dir, {}
        self.supervisor = start_supervisor(run_dir, config)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.supervisor.terminate()
        for process in [self.supervisor, *self.ranks.values()]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def start(self, rank: int) -> None:
        (self.run_dir / f"rank{rank}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.multiprocess.test_library", str(self.run_dir)]
        with (self.run_dir / f"rank{rank}.log").open("ab") as log:
            self.ranks[rank] = subprocess.Popen(
                [*command, str(rank)], cwd=ROOT, env=environment(), stdout=log, stderr=log
            )

    def said(self, rank: int) -> dict:
        try:
            return json.loads((self.run_dir / f"rank{rank}.json").read_text())
        except (OSError, ValueError):
            return {"calls": 0, "active": []}

    def wait_for(self, active: list[int]) -> None:
        """Until each of these ranks made CALLS more calls with just them as members."""
        begin, deadline = {}, time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            said = {rank: self.said(rank) for rank in active}
            for rank, facts in said.items():
                if facts["active"] == active:
                    begin.setdefault(rank, facts["calls"])
            if all(r in begin and said[r]["calls"] >= begin[r] + CALLS for r in active):
                return
            for rank in active:
                assert self.ranks[rank].poll() is None, self.log(rank)
            time.sleep(0.05)
        raise AssertionError("\n".join(self.log(rank) for rank in active))

    def log(self, rank: int) -> str:
        return f"rank {rank}:\n" + (self.run_dir / f"rank{rank}.log").read_text()[-3000:]


def test_ranks_die_leave_and_return_and_every_call_has_the_same_bits(tmp_path):
    with Run(tmp_path) as run:
        for rank in range(RANKS):
            run.start(rank)
        run.wait_for([0, 1, 2])
        run.ranks[VICTIM].kill()
        run.ranks[VICTIM].wait(30)
        run.wait_for([0, 2])
        run.start(VICTIM)
        run.wait_for([0, 1, 2])
        discarded = {rank: run.said(rank)["discarded"] for rank in (0, VICTIM)}
        (tmp_path / leave_file(2)).touch()
        assert run.ranks[2].wait(DEADLINE_S) == 0, run.log(2)
        assert run.said(2)["drained"]
        run.wait_for([0, VICTIM])
        # It was let go between two steps, with all it had brought to others before.
        assert {rank: run.said(rank)["discarded"] for rank in (0, VICTIM)} == discarded
        (tmp_path / leave_file(2)).unlink()
        run.start(2)
        run.wait_for([0, 1, 2])
        (tmp_path / STOP).touch()
        for rank, process in run.ranks.items():
            assert process.wait(DEADLINE_S) == 0, run.log(rank)
        for rank in range(RANKS):
            said = run.said(rank)
            assert said["left"] and said["compilations"] == said["dropped"] == 0
        # Whoever left last had nobody to leave its experts to.
        assert not all(run.said(rank)["drained"] for rank in range(RANKS))
        log = (tmp_path / "supervisor.log").read_text()
        assert "'change': 'repair'" in log and "Traceback" not in log


def one_rank(run_dir: pathlib.Path, rank: int) -> None:
    from flax import nnx

    from eep_jax.library.elastic_moe import expert_arrays, without_experts
    from eep_jax.library.rank import RankEnded, join
    from tests.eep_jax.library.factories import a_model, some_rows

    model, x = a_model(), some_rows(rank)
    graph, weights = nnx.split(without_experts(model))

    def step(routing, weights, x):
        return nnx.merge(graph, weights)(x, routing)

    me = join(run_dir, rank, step, (weights, x), expert_arrays(model), timeout_s=DEADLINE_S)
    first, calls = np.asarray(me.run(weights, x)), 0
    np.testing.assert_allclose(first, model(x)[0], rtol=1e-5, atol=1e-5)

    def say(**more) -> None:
        facts = {"calls": calls, "active": me.active, "epoch": me.epoch, **more}
        facts["discarded"] = me.discarded
        fresh = run_dir / f"rank{rank}.new"
        fresh.write_text(json.dumps(facts | {"dropped": me.dropped}))
        fresh.replace(run_dir / f"rank{rank}.json")

    while not (run_dir / STOP).exists() and not (run_dir / leave_file(rank)).exists():
        assert np.array_equal(me.run(weights, x), first), f"call {calls} has other bits"
        calls += 1
        say()
    drained = me.leave()
    try:
        me.run(weights, x)
    except RankEnded:
        say(left=True, drained=drained, compilations=me.compilations)


if __name__ == "__main__":
    one_rank(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
