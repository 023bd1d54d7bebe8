"""Promises of a library's run: sizes that cannot be are refused; its files say what was written."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from eep_jax.errors import CheckpointError, RunDirError
from eep_jax.library.config import MoEConfig, run_config
from eep_jax.library.in_memory_experts import open_experts
from eep_jax.library.rank import join
from eep_jax.library.supervise import read_run, start_supervisor, write_run
from eep_jax.placement.sources import SourceKind
from eep_jax.runtime.supervisor.run_files import open_run
from eep_jax.storage.checkpoint import save_checkpoint
from eep_jax.storage.digests import digest
from tests.eep_jax.library.factories import a_model, a_moe, expert_arrays

ROOT = pathlib.Path(__file__).parents[3]
RUN = {"layers": 2, "ranks": 2, "slots_per_rank": 8, "tokens_max": 20}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": 0}, "MoEConfig.hidden=0 must be positive"),
        ({"expert_hidden": -1}, "MoEConfig.expert_hidden=-1"),
        ({"experts_per_token": 9}, r"experts_per_token=9 must be between 1 and self.experts=8; .*"),
        ({"router_groups": 3}, "experts=8 must be a multiple"),
        ({"router_groups": 8}, "experts_per_token=2 must fit into"),
        ({"activation": "relu"}, "activation='relu' must be one of"),
        ({"router": "best"}, r"router='best' must be one of \('softmax_topk', 'sigmoid_topk', "),
    ],
)
def test_wrong_sizes_of_a_layer_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_moe(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 0}, "layers=0 must be positive"),
        ({"tokens_max": 0}, "tokens_max=0 must be positive"),
        ({"slots_per_rank": 3}, "2 ranks x 3 slots = 6 slots, but 8 experts .* raise"),
        ({"redundancy": 3}, "redundancy=3 replicas need as many ranks"),
        ({"platform": "tpu"}, r"platform='tpu' must be one of \('cpu', 'gpu'\)"),
        ({"combine": "sum"}, "combine='sum' must be one of"),
    ],
)
def test_wrong_sizes_of_a_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(a_moe(), **RUN | changes)


@pytest.mark.parametrize("tokens, room", [(1, 16), (16, 16), (17, 24), (64, 64)])
def test_the_window_has_room_for_all_rows_of_a_step(tokens, room):
    config = run_config(a_moe(), **RUN | {"tokens_max": tokens})
    assert config.engine.tokens_max == room


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_run_is_read_as_it_was_written(tmp_path, platform):
    config = run_config(a_moe(), **RUN, platform=platform, sources=("peer", "checkpoint"))
    root = write_run(tmp_path / "run", config)
    found, token = read_run(root)
    assert found == config and len(token) >= 16
    assert (root / "token").stat().st_mode & 0o077 == 0, "the token is the owner's alone"
    write_run(root, config)
    assert read_run(root)[1] == token, "a second writer keeps it"


def test_a_supervisor_that_cannot_start_there_replaces_no_configuration(tmp_path):
    config = run_config(a_moe(), **RUN)
    root = write_run(tmp_path / "run", config)
    files, before = open_run(root, config), (root / "run.json").read_bytes()
    other = run_config(a_moe(), **RUN | {"ranks": 4})
    with pytest.raises(RunDirError, match=f"in use by the supervisor with pid {os.getpid()}"):
        start_supervisor(root, other)
    files.close()
    with pytest.raises(RunDirError, match=r"cluster\.ranks was 2, is 4"):
        start_supervisor(root, other)
    assert (root / "run.json").read_bytes() == before


def no_step(*arguments):
    raise AssertionError("no step runs before the arguments of `join` are checked")


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"'{tmp_path}' is not a run directory.*run.json"):
        join(tmp_path, 0, no_step, (), {})
    write_run(tmp_path, run_config(a_moe(), **RUN))
    with pytest.raises(ValueError, match=r"rank=2 must be in 0\.\.1"):
        join(tmp_path, 2, no_step, (), {})


def test_a_rank_on_another_platform_is_refused(tmp_path):
    write_run(tmp_path, run_config(a_moe(), **RUN, platform="gpu"))
    with pytest.raises(ValueError, match="platform 'gpu', JAX computes on 'cpu'; set JAX_PLATF"):
        join(tmp_path, 0, no_step, (), {})


def test_given_experts_read_as_a_checkpoint_does():
    model, arrays = run_config(a_moe(), **RUN).model, expert_arrays(a_model())
    narrow = open_experts(arrays, model, np.dtype(ml_dtypes.bfloat16))
    assert narrow.manifest["dtype"] == "bfloat16"
    found = narrow.read_experts([3])
    np.testing.assert_array_equal(found[3], arrays["e003"].astype(ml_dtypes.bfloat16))
    assert narrow.manifest["experts"]["e003"] == digest(found[3])
    with pytest.raises(CheckpointError, match=r"no experts \[8\]"):
        narrow.read_experts([8])


def test_experts_of_other_sizes_are_named():
    model, arrays = run_config(a_moe(), **RUN).model, expert_arrays(a_model())
    wrong = arrays | {"e001": arrays["e001"][:1]}
    wrong["more"] = wrong.pop("e007")
    with pytest.raises(CheckpointError) as error:
        open_experts(wrong, model, np.dtype(np.float32))
    for part in ("'e001': (1, 3, 12, 16)", "'e007': 'missing'", "'more'", "(2, 3, 12, 16)"):
        assert part in str(error.value)


def test_experts_may_come_from_a_checkpoint_of_the_same_sizes(tmp_path):
    model, arrays = run_config(a_moe(), **RUN).model, expert_arrays(a_model())
    dense = {"none": np.zeros(1, np.float32)}
    save_checkpoint(tmp_path / "c", model, dense, arrays, {})
    found = open_experts(tmp_path / "c", model, np.dtype(np.float32)).read_experts([5])
    np.testing.assert_array_equal(found[5], arrays["e005"])
    other = dataclasses.replace(model, experts=4)
    with pytest.raises(CheckpointError, match=r"holds 8 experts .* configured for 4 of"):
        open_experts(tmp_path / "c", other, np.dtype(np.float32))


def test_the_supervisor_of_a_library_loads_no_jax():
    code = "import sys, eep_jax.library.supervise; sys.exit('jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 0


def test_the_supervisor_says_what_directory_it_needs(tmp_path):
    command = [sys.executable, "-m", "eep_jax.library.supervise"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments, text in (([], "usage"), ([str(tmp_path)], "is not a run directory")):
        done = subprocess.run(
            command + arguments, cwd=ROOT, env=environment, capture_output=True, timeout=60
        )
        assert done.returncode == 2 and text in done.stderr.decode()


def test_sources_of_a_run_are_those_there_are():
    assert {kind.value for kind in SourceKind} >= set(run_config(a_moe(), **RUN).cluster.sources)
    assert MoEConfig(hidden=1, expert_hidden=1, experts=1, experts_per_token=1).router
