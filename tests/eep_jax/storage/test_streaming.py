"""Promises of streaming: experts of Hugging Face files, block by block, straight into the bank."""

import itertools
import json
import threading
import tracemalloc
import types

import numpy as np
import pytest

from eep_jax.config import EngineConfig
from eep_jax.errors import RelocationFailed
from eep_jax.heap.loopback import open_all
from eep_jax.models.expert_bank import ExpertBank, SlotTarget, slab_layout
from eep_jax.models.families import registry
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.executor import Executor, FetchOptions
from eep_jax.storage.blocks import ComputedBlock
from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
from tests.support.parity import ROOT
from tests.support.safetensors import save

SLOTS = 3


class World:
    """Two banks over loopback heaps, and an executor that fills the first from a directory."""

    def __init__(self, root, dtype: str = "float32", **options):
        self.checkpoint = HuggingFaceCheckpoint(root, dtype)
        engine = EngineConfig(dtype=dtype)
        layout = slab_layout(self.checkpoint.model, engine, 2, SLOTS)
        self.bank, self.peer = (ExpertBank(layout, h) for h in open_all(2, layout.slab_bytes))
        self.executor = Executor(self.bank, self.checkpoint, options=FetchOptions(**options))

    def whole(self, expert: int) -> np.ndarray:
        return self.checkpoint.read_experts([expert])[expert]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_streamed_expert_equals_one_that_is_read_whole(name, dtype):
    """Covers padding (banks of bfloat16) and biases (experts of gpt-oss)."""
    world = World(ROOT / name, dtype)
    world.bank.write(1, 0, np.full(world.checkpoint.model.expert_shape, np.nan))
    assert world.executor.carry_out((7, 2, EMPTY), ()) == (7, 2, EMPTY)
    for slot, expert in ((0, 7), (1, 2)):
        np.testing.assert_array_equal(world.bank.read(slot), world.whole(expert))
    layout = world.bank.layout
    slot = layout.slot(1)
    stored = world.bank._heap.read(0, slot.offset, slot.bytes).view(slot.dtype)
    padded = stored.reshape(slot.shape)[:, :, layout.expert_shape[2] :]
    assert not padded.any(), "padding adds nothing, whatever was there"
    assert world.executor.moved == {"checkpoint": 2}
    assert world.executor.bytes_moved == {"checkpoint": 2 * world.bank.expert_bytes}


def test_a_peers_expert_is_compared_with_the_directory():
    world = World(ROOT / "olmoe")
    from_peer = lambda slot: (Source(SourceKind.PEER, 1, slot), Source(SourceKind.CHECKPOINT))
    damaged = world.whole(4)
    damaged[0, 1, 2, 3] += 1
    world.peer.write(0, 3, world.whole(3))
    world.peer.write(1, 4, damaged)
    moves = (Move(0, 0, 3, from_peer(0)), Move(0, 1, 4, from_peer(1)))
    world.executor.carry_out((3, 4, EMPTY), moves)
    assert world.executor.moved == {"peer": 1, "checkpoint": 1}
    np.testing.assert_array_equal(world.bank.read(1), world.whole(4))


def cut(world, after: int, then) -> None:
    """Cuts expert 5: `then(files, scratch)` computes the block that replaces number `after`."""
    job_of = world.checkpoint.expert_job

    def expert_job(expert, target, in_place):
        job = job_of(expert, target, in_place)
        blocks = job.blocks
        if isinstance(target, SlotTarget) and expert == 5:
            job.blocks = lambda: [*itertools.islice(blocks(), after), ComputedBlock(0, then)]
        return job

    world.checkpoint.expert_job = expert_job


def test_a_read_that_fails_halfway_leaves_no_expert_in_the_slot():
    world = World(ROOT / "olmoe")
    world.executor.carry_out((1, EMPTY, EMPTY), ())

    def fail(files, scratch):
        raise OSError("the disk is gone")

    cut(world, 4, fail)
    with pytest.raises(
        RelocationFailed, match=r"expert 5 for slot 0: checkpoint: the disk is gone"
    ):
        world.executor.carry_out((5, 1, EMPTY), ())
    assert world.bank.contents == (EMPTY, 1, EMPTY), "what came before and beside it stays"


FROM_TWO = (Source(SourceKind.CHECKPOINT), Source(SourceKind.PEER, 1, 0))


def test_an_expert_with_missing_parts_is_an_error():
    world = World(ROOT / "olmoe")
    whole = world.checkpoint._family
    less = types.SimpleNamespace(expert=lambda *of: list(whole.expert(*of))[:-1])
    world.checkpoint._family = less
    with pytest.raises(RelocationFailed, match=r"expert 5 has \d+ of \d+ parts"):
        world.executor.carry_out((5, EMPTY, EMPTY), ())
    assert world.bank.contents == (EMPTY,) * SLOTS


@pytest.mark.parametrize("sources", [FROM_TWO[:1], FROM_TWO], ids=["alone", "and a peer"])
def test_a_read_that_hangs_ends_with_the_deadline_and_writes_nothing_later(sources):
    hang, came = threading.Event(), threading.Event()
    world = World(ROOT / "olmoe", deadline_ms=200)
    world.peer.write(0, 5, world.whole(5))
    shape = world.checkpoint.model.expert_shape[2:]

    def wait(files, scratch):
        hang.wait(30)
        came.set()
        return np.zeros(shape, np.float32)

    cut(world, 5, wait)
    moves = (Move(0, 0, 5, sources),)
    if len(sources) == 1:
        with pytest.raises(RelocationFailed, match="took longer than 200 ms"):
            world.executor.carry_out((5, EMPTY, EMPTY), moves)
        with pytest.raises(RelocationFailed, match="may still come into slot 0"):
            world.executor.carry_out((5, EMPTY, EMPTY), moves)
        assert world.bank.contents == (EMPTY,) * SLOTS
    else:
        world.executor.carry_out((5, EMPTY, EMPTY), moves)
        assert world.executor.moved == {"peer": 1}
    with pytest.raises(RelocationFailed, match="an earlier read from it still hangs"):
        world.executor.carry_out((EMPTY, 6, EMPTY), ())
    before = world.bank.read(0)
    hang.set()
    assert came.wait(30)
    for run in world.executor._loader._runs:
        for thread in run.fetch.threads:  # `threading.enumerate` may omit them too early
            thread.join(30)
    np.testing.assert_array_equal(world.bank.read(0), before)
    assert world.executor.carry_out((EMPTY, EMPTY, 6), ()) == (EMPTY, EMPTY, 6), "it works again"


def test_no_more_than_a_few_matrices_are_in_memory_at_once(tmp_path):
    layers, wide = 16, 256
    sizes = {"hidden_size": 128, "moe_intermediate_size": wide, "num_hidden_layers": layers}
    values = json.loads((ROOT / "qwen3_moe" / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_local_experts": 2}))
    model = registry.read_model(tmp_path)
    family = registry.family_of(values)
    stored = [*family.dense(model).values()]
    stored += [part.stored for e in range(2) for part in family.expert(model, e)]
    save(tmp_path / "model.safetensors", {s.key: np.ones(s.shape, np.float32) for s in stored})
    world = World(tmp_path)
    tracemalloc.start()
    world.executor.carry_out((1, EMPTY, EMPTY), ())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    matrix = world.bank.expert_bytes // (3 * layers)
    assert peak < 6 * matrix, f"{peak} bytes at once, an expert has {world.bank.expert_bytes}"
