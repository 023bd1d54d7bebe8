"""Promises of the checkpoint: only the named experts are read, and damage is detected."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tensorstore as ts

from eep_jax.errors import CheckpointError
from eep_jax.models.weights import expert_name
from eep_jax.storage.checkpoint import (
    MANIFEST,
    WEIGHTS,
    Checkpoint,
    save_checkpoint,
)
from eep_jax.storage.digests import digest
from tests.support.models import a_model, rounded_weights


def chunks_of(root, name: str) -> list[pathlib.Path]:
    """The files with the bytes of one weight."""
    return [path for path in (root / WEIGHTS).rglob("0*") if path.parent.name.endswith(name)]


def damage(root, *names: str) -> None:
    """Changes a byte in the middle of each of these weights."""
    for name in names:
        chunks = chunks_of(root, name) or in_older_chunks(root, name)
        assert chunks, f"{name} has no chunks in {root}"
        for chunk in chunks:
            data = bytearray(chunk.read_bytes())
            data[len(data) // 2] ^= 1
            chunk.write_bytes(data)


def in_older_chunks(root, name: str) -> list:
    """`chunks_of` for a checkpoint whose chunks are in Orbax's key-value store."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root / WEIGHTS}/"}).result()
    keys = [key for key in store.list().result() if name.encode() in key and b"zarr" not in key]

    class Chunk:
        def __init__(self, key):
            self.read_bytes = lambda: store.read(key).result().value
            self.write_bytes = lambda data: store.write(key, bytes(data)).result()

    return [Chunk(key) for key in keys]


def test_experts_and_dense_weights_come_back_as_they_were_saved(checkpoint_dir):
    checkpoint, model = Checkpoint(checkpoint_dir), a_model()
    dense, experts = rounded_weights(model)
    checkpoint.require_model(model)
    assert checkpoint.manifest["facts"] == {"steps": 3}
    for name, weights in checkpoint.read_dense().items():
        assert weights.dtype == dense[name].dtype
        np.testing.assert_array_equal(weights, dense[name])
    found = checkpoint.read_experts([5, 0])
    assert set(found) == {0, 5}
    for expert, weights in found.items():
        np.testing.assert_array_equal(weights, experts[expert])


def test_only_the_named_experts_are_read(checkpoint_dir):
    damage(checkpoint_dir, *[f"e{e:03d}" for e in range(8) if e not in (2, 6)])
    found = Checkpoint(checkpoint_dir).read_experts([6, 2])
    np.testing.assert_array_equal(found[6], rounded_weights(a_model())[1][6])
    for expert in (0, 7):
        with pytest.raises(CheckpointError, match=f"e00{expert}"):
            Checkpoint(checkpoint_dir).read_experts([expert])


def bytes_read() -> int:
    """Bytes that this process has read from files since it started."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_reading_one_expert_reads_its_bytes_and_little_more(tmp_path):
    model = dataclasses.replace(a_model(), hidden=256, expert_hidden=512)
    random = np.random.default_rng(0)
    experts = {
        expert_name(e): random.integers(-(2**31), 2**31, model.expert_shape, dtype=np.int32)
        for e in range(model.experts)
    }
    dense = {"final_norm/scale": np.ones(8, np.float32)}
    save_checkpoint(tmp_path / "large", model, dense, experts, facts={})
    checkpoint = Checkpoint(tmp_path / "large")
    checkpoint.read_experts([0])  # imports and first opens do not count for an expert
    before = bytes_read()
    found = checkpoint.read_experts([3])[3]
    read = bytes_read() - before
    assert found.nbytes > 1 << 20
    assert read < found.nbytes + (128 << 10), f"{read} bytes for an expert of {found.nbytes}"


def test_reading_no_experts_touches_nothing(checkpoint_dir):
    checkpoint = Checkpoint(checkpoint_dir)
    checkpoint.root = checkpoint_dir / "gone"
    assert checkpoint.read_experts([]) == {}


def test_bytes_of_another_expert_do_not_pass_for_this_one(checkpoint_dir):
    for mine, other in zip(*(chunks_of(checkpoint_dir, e) for e in ("e001", "e002")), strict=True):
        mine.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(checkpoint_dir).read_experts([1])
    expected = Checkpoint(checkpoint_dir).manifest["experts"]["e001"]
    assert "experts weight e001" in str(raised.value) and expected in str(raised.value)


def test_a_dense_weight_with_another_digest_is_named(checkpoint_dir):
    manifest = json.loads((checkpoint_dir / MANIFEST).read_text())
    manifest["dense"]["final_norm/scale"] = "0" * 32
    (checkpoint_dir / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="dense weight final_norm/scale"):
        Checkpoint(checkpoint_dir).read_dense()


def test_experts_that_do_not_exist_are_named(checkpoint_dir):
    with pytest.raises(CheckpointError, match=r"no experts \[8, -1\]"):
        Checkpoint(checkpoint_dir).read_experts([3, 8, -1])


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"model": {"name": "x"}}'])
def test_a_directory_without_a_right_manifest_is_no_checkpoint(checkpoint_dir, manifest):
    path = checkpoint_dir / MANIFEST
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(CheckpointError, match=f"{checkpoint_dir} is not a checkpoint"):
        Checkpoint(checkpoint_dir)


def test_weights_that_are_gone_are_an_error_of_the_checkpoint(checkpoint_dir):
    (checkpoint_dir / WEIGHTS).rename(checkpoint_dir / "elsewhere")
    with pytest.raises(CheckpointError, match=r"cannot read \['e003'\]"):
        Checkpoint(checkpoint_dir).read_experts([3])


def test_another_model_is_refused_with_both_sizes(checkpoint_dir):
    wanted = dataclasses.replace(a_model(), hidden=64)
    with pytest.raises(CheckpointError, match="'hidden': '32 instead of 64'"):
        Checkpoint(checkpoint_dir).require_model(wanted)


def test_a_digest_names_bytes_not_values_or_strides():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(array) == digest(np.asfortranarray(array)) == digest(array.copy())
    others = [array.astype(np.float64), array.T, -array, array + 1]
    assert len({digest(a) for a in (array, *others)}) == 5
    assert digest(np.float32([0.0])) != digest(np.float32([-0.0]))
