"""A bit that flips in a directory without digests is found at the next load, wherever it is."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from eep_jax.config import DTYPES
from eep_jax.errors import CheckpointError
from eep_jax.models.weights import expert_name
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from eep_jax.storage.learned_digests import FILE, VARIABLE, LearnedDigests
from eep_jax.storage.verify import hub_sha256, sha256_of, verify

PARITY = pathlib.Path(__file__).parents[1] / "models" / "parity"
ROOT = pathlib.Path(__file__).parents[3]
FAMILIES = ("qwen3_moe", "deepseek_v2_lite", "gpt_oss", "olmoe")


@pytest.fixture(params=FAMILIES)
def root(request, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    return shutil.copytree(PARITY / request.param, tmp_path / "hf")


@pytest.fixture
def one(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    return shutil.copytree(PARITY / FAMILIES[0], tmp_path / "hf")


def opened(root: pathlib.Path, dtype: str = "") -> HuggingFaceCheckpoint:
    return HuggingFaceCheckpoint(root, dtype, LearnedDigests(root))


def read_all(store: HuggingFaceCheckpoint) -> None:
    store.read_experts(list(range(store.model.experts)))
    dict(store.read_dense())


def flip(span: tuple[pathlib.Path, int, int], part: float = 0.5) -> None:
    path, start, end = span
    at = start + int((end - start - 1) * part)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_every_byte_of_an_expert_is_covered_in_every_form_of_storage(root):
    store = opened(root)
    read_all(store)
    names = json.loads((root / FILE).read_text())
    assert set(names) == {
        *map(expert_name, range(store.model.experts)),
        *store.read_dense(),
    }
    read_all(opened(root))
    for span in store.spans(1):
        for part in (0.0, 0.5, 1.0):
            flip(span, part)
            again = opened(root)
            with pytest.raises(CheckpointError, match=rf"{expert_name(1)} of .*{span[0].name}.*"):
                again.read_experts([1])
            again.read_experts([0])
            flip(span, part)
    for span in store.dense_spans()[:4]:
        flip(span)
        with pytest.raises(CheckpointError, match=r"had xxh3-4m:\w+ when it was first loaded"):
            dict(opened(root).read_dense())
        flip(span)
    read_all(opened(root))


def test_the_digest_is_that_of_the_files_whatever_dtype_is_served(one):
    read_all(opened(one, DTYPES[0]))
    before = (one / FILE).read_bytes()
    read_all(opened(one, DTYPES[1]))
    assert (one / FILE).read_bytes() == before


def test_where_nothing_can_be_written_the_cache_has_them(one, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    read_all(opened(one))
    assert not (one / FILE).exists()
    (kept,) = (tmp_path / "cache" / "eep-jax" / "digests").glob("*.json")
    flip(opened(one).spans(0)[0])
    with pytest.raises(CheckpointError, match=str(kept)):
        opened(one).read_experts([0])


def test_other_users_of_the_weights_can_compare_them_too(one):
    before = os.umask(0o077)  # of a rank
    try:
        opened(one).read_experts([0])
    finally:
        os.umask(before)
    assert (one / FILE).stat().st_mode & 0o777 == 0o644


def test_a_variable_names_another_directory(one, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    read_all(opened(one))
    assert list((tmp_path / "elsewhere").glob("*.json")) and not (one / FILE).exists()


def test_a_disk_that_takes_no_digests_still_serves_and_says_so(one, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    learned = LearnedDigests(one)
    HuggingFaceCheckpoint(one, "", learned).read_experts([0])
    assert "No space left" in learned.problem and "are not kept" in caplog.text
    assert list(one.glob(f"{FILE}*")) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_file_that_is_no_digest_file_is_named_with_the_way_out(one, text):
    (one / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{FILE} .*remove it"):
        LearnedDigests(one)


LEARN = """
import pathlib, sys
from eep_jax.storage.learned_digests import LearnedDigests
learned, begin = LearnedDigests(pathlib.Path(sys.argv[1])), int(sys.argv[2])
for number in range(begin, begin + 25):
    learned.compare(f"weight {number}", f"digest {number}", [])
"""


def test_processes_that_learn_at_the_same_time_keep_each_others(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    command = [sys.executable, "-c", LEARN, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(n * 20)], cwd=ROOT) for n in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    known = json.loads((tmp_path / FILE).read_text())
    assert known == {f"weight {n}": f"digest {n}" for n in range(85)}


def test_of_two_processes_that_disagree_the_second_is_wrong(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    first, second = LearnedDigests(tmp_path), LearnedDigests(tmp_path)
    assert not first.compare("a", "digest 1", [])
    with pytest.raises(CheckpointError, match=r"a of .* has digest digest 2, it had digest 1"):
        second.compare("a", "digest 2", [tmp_path / "file"])


def test_verify_reads_everything_and_names_what_differs(one):
    assert {found.problem for found in verify(opened(one))} == {""}
    store = opened(one)
    flip(store.spans(2)[0])
    wrong = [found for found in verify(store) if found.problem]
    assert expert_name(2) in [found.name for found in wrong]
    assert all("when it was first loaded" in found.problem for found in wrong)


def test_verify_compares_files_with_what_the_hub_says(one):
    (path,) = one.glob("*.safetensors")
    assert hub_sha256(path) == ""
    metadata = one / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"commit\n{sha256_of(path)}\n1.0\n")
    assert path.name in [found.name for found in verify(opened(one))]
    blob = one / sha256_of(path)
    metadata.unlink()
    path.rename(blob)
    path.symlink_to(blob)
    assert {found.problem for found in verify(opened(one))} == {""}
    (one / FILE).unlink()  # damaged before the first load
    flip((blob, 0, os.path.getsize(blob)), 0.9)
    (wrong,) = [found for found in verify(opened(one)) if found.problem]
    assert wrong.name == path.name and "the Hub's is" in wrong.problem


def test_without_learned_digests_nothing_is_written(one):
    store = HuggingFaceCheckpoint(one)
    assert isinstance(store.read_experts([0])[0], np.ndarray)
    assert not (one / FILE).exists()


def test_the_command_ends_with_status_1_and_the_name_of_what_is_damaged(one):
    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launch.convert", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    done = run("--verify", f"--hf={one}")
    assert done.returncode == 0 and "were compared with" in done.stdout
    flip(opened(one).spans(2)[0])
    done = run("--verify", f"--hf={one}")
    assert done.returncode == 1 and expert_name(2) in done.stdout and "are damaged" in done.stdout
    done = run("--verify")
    assert done.returncode == 2 and "--verify needs one directory" in done.stderr
