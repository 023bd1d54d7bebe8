"""A process that comes back loads the steps of an earlier one, or says why it does not."""

import os

import jax
import numpy as np
import pytest

from eep_jax.engine import executables
from eep_jax.engine.engine import Engine
from eep_jax.engine.executables import MAGIC, ExecutableStore, step_facts
from eep_jax.engine.step import StepKind, empty_batch
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.models.expert_bank import slab_layout
from tests.support.models import a_run, some_weights

NAMES = ["rank0-decode", "rank0-mixed"]


def an_engine(directory) -> Engine:
    """A process of rank 0, with all experts."""
    config = a_run()
    dense, experts = some_weights(config.model)
    layout = slab_layout(config.model, config.engine, 1, config.model.experts)
    heap = LoopbackHeap(0, 1, layout.slab_bytes)
    store = ExecutableStore(directory, step_facts(config, 0))
    engine = Engine(config, 0, heap, layout, dense, store)
    for expert in range(config.model.experts):
        engine.bank.write(expert, expert, experts[expert])
    return engine


def logits_of(engine: Engine):
    batch = empty_batch(engine.config, StepKind.MIXED)
    batch.tokens[:3], batch.positions[:3] = (5, 3, 1), (0, 1, 2)
    batch.last_rows[0], batch.temperature[0], batch.seeds[0] = 2, 0.8, (4, 2)
    result = engine._run(StepKind.MIXED, batch, StepKind.IDLE)
    return jax.device_get((result.tokens, result.cache.keys, result.cache.values, result.chosen))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The directory that a first process left behind, and what its step computes."""
    directory = tmp_path_factory.mktemp("run") / "executables"
    engine = an_engine(directory)
    warm = engine.warm_up()
    assert sorted(warm.origins) == NAMES and warm.compilations >= 2
    return directory, logits_of(engine)


def copied(kept, tmp_path):
    directory = tmp_path / "executables"
    directory.mkdir(mode=0o700)
    for path in kept[0].iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_a_second_process_compiles_nothing_and_computes_the_same_bits(kept):
    engine = an_engine(kept[0])
    warm = engine.warm_up()
    assert warm.origins == dict.fromkeys(NAMES, "loaded")
    assert warm.compilations == 0
    jax.tree.map(np.testing.assert_array_equal, logits_of(engine), kept[1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "digest"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "digest"),
        (lambda data: b"", "another format"),
        (lambda data: MAGIC + b"[]\n", "head is damaged"),
        (lambda data: MAGIC + b"{}\n" + data, "made for XLA_FLAGS None"),
        (lambda data: data.replace(b'"rank": "0"', b'"rank": "1"'), "made for rank 1, this is 0"),
    ],
)
def test_a_file_that_is_not_right_is_compiled_anew_and_replaced(kept, tmp_path, damage, reason):
    directory = copied(kept, tmp_path)
    path = directory / "rank0-decode.step"
    path.write_bytes(damage(path.read_bytes()))
    warm = an_engine(directory).warm_up()
    assert warm.origins["rank0-mixed"] == "loaded"
    assert warm.origins["rank0-decode"].startswith("compiled: ")
    assert reason in warm.origins["rank0-decode"]
    assert an_engine(directory).warm_up().compilations == 0


@pytest.mark.parametrize("fact", sorted(step_facts(a_run(), 0)))
def test_an_executable_made_under_other_facts_is_not_used(kept, fact):
    facts = step_facts(an_engine(None).config, 0)
    store = ExecutableStore(kept[0], facts | {fact: "another"})
    with pytest.raises(executables.UnusableFile, match=f"made for {fact} .*, this is another"):
        store._load("rank0-decode", (), ())


def test_what_others_may_write_to_is_not_loaded(kept, tmp_path):
    directory = copied(kept, tmp_path)
    os.chmod(directory, 0o770)
    warm = an_engine(directory).warm_up()
    assert all("writable by no other" in origin for origin in warm.origins.values())


def test_the_digest_of_the_source_changes_with_any_file(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "step.py").write_text("one = 1")
    monkeypatch.setattr(executables.eep_jax, "__path__", [str(package)])
    before = executables.source_digest.__wrapped__()
    (package / "step.py").write_text("one = 2")
    assert executables.source_digest.__wrapped__() != before
