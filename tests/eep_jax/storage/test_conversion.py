"""Promises of conversion: equal to the bit, nothing written twice, resumable after any kill."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from eep_jax.config import ClusterConfig, EngineConfig, RunConfig
from eep_jax.errors import CheckpointError
from eep_jax.storage import conversion as module
from eep_jax.storage.checkpoint import MANIFEST, WEIGHTS, Checkpoint, restore
from eep_jax.storage.conversion import LOCK, RECORD, Conversion
from eep_jax.storage.digests import digest
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from eep_jax.storage.random_checkpoint import open_checkpoint
from tests.eep_jax.storage.test_checkpoint import damage
from tests.support.hf_directories import QWEN3, write_chat_model, write_directory
from tests.support.parity import NAMES, ROOT

REPOSITORY = pathlib.Path(__file__).parents[3]
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> pathlib.Path:
    return write_chat_model(tmp_path_factory.mktemp("hf") / "tiny-chat")


def convert(hf, out, dtype: str = "") -> list:
    return list(Conversion(HuggingFaceCheckpoint(hf, dtype), out).run())


def assert_same(out, hf, dtype: str = "") -> None:
    found, wanted = Checkpoint(out), HuggingFaceCheckpoint(hf, dtype)
    assert found.model == wanted.model and found.manifest["dtype"] == wanted.manifest["dtype"]
    dense = found.read_dense()
    assert set(dense) == set(wanted.read_dense())
    for name, array in wanted.read_dense().items():
        assert dense[name].dtype == array.dtype
        np.testing.assert_array_equal(dense[name], array)
    for expert in range(wanted.model.experts):
        (one,) = found.read_experts([expert]).values()
        np.testing.assert_array_equal(one, wanted.read_experts([expert])[expert])
        assert found.manifest["experts"][f"e{expert:03d}"] == digest(one)


def contents(root: pathlib.Path) -> dict[str, tuple]:
    """Identity of every file; a new file at the same path has another."""
    files = (p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize("family", NAMES)
def test_every_family_comes_back_bit_by_bit(tmp_path, family):
    convert(ROOT / family, tmp_path / "out")
    assert_same(tmp_path / "out", ROOT / family)


def test_serving_opens_it_with_its_tokenizer_and_template(hf, tmp_path):
    out = tmp_path / "new" / "out"
    steps = convert(hf, out)
    assert [s.done for s in steps] == list(range(1, steps[0].total + 1))
    assert all(s.fresh for s in steps)
    names = {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"}
    assert {p.name for p in out.iterdir()} == names | {MANIFEST, WEIGHTS}
    config = RunConfig(
        name="t",
        model=HuggingFaceCheckpoint(hf).model,
        cluster=ClusterConfig(ranks=1, slots_per_rank=8),
        engine=EngineConfig(),
        checkpoint=str(out),
    )
    assert isinstance(open_checkpoint(config), Checkpoint)


def test_an_expert_is_one_chunk(hf, tmp_path):
    convert(hf, tmp_path)
    files = [path for path in (tmp_path / WEIGHTS / "e003" / "e003").iterdir() if path.stem]
    chunk = tmp_path / WEIGHTS / "e003" / "e003" / "0.0.0.0"
    assert [path for path in files if not path.name.startswith(".")] == [chunk]
    (wanted,) = HuggingFaceCheckpoint(hf).read_experts([3]).values()
    assert chunk.read_bytes() == wanted.tobytes()


def test_orbax_restores_a_converted_checkpoint(hf, tmp_path):
    convert(hf, tmp_path)
    (expert,) = restore(tmp_path / WEIGHTS / "e003", ["e003"]).values()
    np.testing.assert_array_equal(expert, Checkpoint(tmp_path).read_experts([3])[3])
    dense = Checkpoint(tmp_path).read_dense()
    names = [name for name in dense if name.startswith("layers/1/")]
    for name, found in restore(tmp_path / WEIGHTS / "layers.1", names).items():
        assert found.dtype == dense[name].dtype
        np.testing.assert_array_equal(found, dense[name])


def test_experts_are_converted_to_the_dtype_that_was_asked_for(hf, tmp_path):
    convert(hf, tmp_path, "float32")
    assert_same(tmp_path, hf, "float32")
    assert Checkpoint(tmp_path).read_experts([0])[0].dtype == np.float32


def test_wherever_it_is_interrupted_it_goes_on_and_writes_nothing_twice(hf, tmp_path):
    total = Conversion(HuggingFaceCheckpoint(hf), tmp_path).total
    for stop in (0, 1, 4, 9, total):
        out = tmp_path / str(stop)
        run = Conversion(HuggingFaceCheckpoint(hf), out).run()
        for _ in range(stop):
            next(run)
        run.close()
        before = contents(out) if stop else {}
        again = convert(hf, out)
        assert sum(not step.fresh for step in again) == stop
        after = contents(out)
        kept = {n: facts for n, facts in before.items() if n.startswith(WEIGHTS)}
        assert kept.items() <= after.items()
        assert_same(out, hf)


def test_half_done_pieces_of_a_killed_process_are_removed(hf, tmp_path):
    run = Conversion(HuggingFaceCheckpoint(hf), tmp_path).run()
    for _ in range(3):
        next(run)
    run.close()
    for name in ("e001.orbax-checkpoint-tmp", "e002"):  # renamed, and not recorded
        (tmp_path / WEIGHTS / name).mkdir()
        (tmp_path / WEIGHTS / name / "half").write_text("x")
    with (tmp_path / RECORD).open("a") as record:
        record.write('{"piece": "e003", "dig')
    convert(hf, tmp_path)
    assert_same(tmp_path, hf)
    assert not (tmp_path / WEIGHTS / "e001.orbax-checkpoint-tmp").exists()


def test_after_kill_9_the_same_command_goes_on(hf, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.convert", f"--hf={hf}", f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        ends_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends_s and process.poll() is None:
            if (out / RECORD).exists() and (out / RECORD).read_text().count("\n") > 3:
                break
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert not (out / MANIFEST).exists(), "it was done before it could be killed"
    finished = [json.loads(line)["piece"] for line in (out / RECORD).read_text().splitlines()[1:]]
    before = contents(out)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} of 13 pieces from before" in done.stdout
    assert_same(out, hf)
    after = contents(out)
    for piece in finished:
        of_piece = {n: f for n, f in before.items() if n.startswith(f"{WEIGHTS}/{piece}/")}
        assert of_piece and of_piece.items() <= after.items()
    assert Conversion(HuggingFaceCheckpoint(hf), out).is_finished


class TestRefusals:
    def refusal(self, hf, out, dtype: str = "") -> str:
        with pytest.raises(CheckpointError) as caught:
            convert(hf, out, dtype)
        return str(caught.value)

    def test_a_directory_of_something_else(self, hf, tmp_path):
        (tmp_path / "thesis.tex").write_text("x")
        assert "thesis.tex" in self.refusal(hf, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_the_directory_it_reads_from(self, hf):
        assert "where the weights come from" in self.refusal(hf, hf)

    def test_a_file_in_the_way(self, hf, tmp_path):
        (tmp_path / "out").write_text("x")
        assert "cannot create" in self.refusal(hf, tmp_path / "out")

    def test_a_conversion_of_other_files_or_dtype(self, hf, tmp_path):
        run = Conversion(HuggingFaceCheckpoint(hf), tmp_path).run()
        next(run)
        run.close()
        assert "other files" in self.refusal(hf, tmp_path, "float32")
        other = write_directory(tmp_path / "other", QWEN3, seed=1)
        assert "other files" in self.refusal(other, tmp_path)

    def test_a_result_of_other_files(self, hf, tmp_path):
        convert(hf, tmp_path / "out")
        other = write_directory(tmp_path / "other", QWEN3, seed=1)
        with pytest.raises(CheckpointError, match="another source"):
            _ = Conversion(HuggingFaceCheckpoint(other), tmp_path / "out").is_finished

    def test_two_processes_at_once(self, hf, tmp_path):
        run = Conversion(HuggingFaceCheckpoint(hf), tmp_path).run()
        next(run)
        assert "another process" in self.refusal(hf, tmp_path)
        run.close()

    def test_too_little_space_is_found_before_anything_is_written(self, hf, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
        assert "still to be written; make room" in self.refusal(hf, tmp_path)
        assert not list((tmp_path / WEIGHTS).iterdir())

    def test_a_disk_that_fills_up_meanwhile(self, hf, tmp_path, monkeypatch):
        real, calls = module.save_plain, []

        def full(*arguments):
            calls.append(1)
            if len(calls) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(module, "save_plain", full)
        assert "is full while writing" in self.refusal(hf, tmp_path)
        monkeypatch.undo()
        assert sum(not step.fresh for step in convert(hf, tmp_path)) == 4
        assert_same(tmp_path, hf)

    def test_storage_that_changes_bytes(self, hf, tmp_path, monkeypatch):
        real = module.save_plain

        def change(directory, arrays):
            real(directory, arrays)
            for chunk in directory.rglob("0*"):
                chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")

        monkeypatch.setattr(module, "save_plain", change)
        assert "changes bytes" in self.refusal(hf, tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path):
        hf = write_directory(tmp_path / "hf")
        (hf / "model-00002-of-00002.safetensors").unlink()
        assert "model-00002-of-00002.safetensors" in self.refusal(hf, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_damage_that_comes_later_is_found_by_readers(self, hf, tmp_path):
        convert(hf, tmp_path)
        damage(tmp_path, "e005")
        checkpoint = Checkpoint(tmp_path)
        checkpoint.read_experts([4])
        with pytest.raises(CheckpointError, match="e005"):
            checkpoint.read_experts([5])


def test_nothing_but_the_lock_is_left_where_nothing_was_begun(hf, tmp_path):
    (tmp_path / LOCK).write_text("")  # of a process that was killed at once
    convert(hf, tmp_path)
    assert_same(tmp_path, hf)
