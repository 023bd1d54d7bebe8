"""A process loads the steps that another one kept, of any rank, or says why it does not."""

import concurrent.futures
import fcntl
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from eep_jax.engine import executables
from eep_jax.engine.engine import Engine
from eep_jax.engine.executables import MAGIC, ExecutableStore, step_facts
from eep_jax.engine.step import empty_batch
from eep_jax.engine.votes import IDLE
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.models.expert_bank import slab_layout
from tests.support.models import a_run, some_weights

RANKS = 2
NAMES = ["read", "rows-4", "rows-8", "table", "words-4", "words-8"]
JOIN_S = 60


def an_engine(directory, rank: int = 0) -> Engine:
    """A process of a rank, with all experts."""
    config = a_run(RANKS)
    dense, experts = some_weights(config.model)
    layout = slab_layout(config.model, config.engine, RANKS, config.model.experts)
    heap = LoopbackHeap(rank, RANKS, layout.slab_bytes)
    store = ExecutableStore(directory, step_facts(config))
    engine = Engine(config, rank, heap, layout, dense, store)
    for expert in range(config.model.experts):
        engine.bank.write(expert, expert, experts[expert])
    return engine


def logits_of(engine: Engine):
    batch = empty_batch(engine.config, engine.config.engine.tokens_max)
    batch.tokens[:3], batch.positions[:3] = (5, 3, 1), (0, 1, 2)
    batch.last_rows[0], batch.temperature[0], batch.seeds[0] = 2, 0.8, (4, 2)
    found = engine._packed.read(engine._start(batch, IDLE, first=True))
    return jax.device_get((found.tokens, engine._packed.cache, found.chosen))


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


def file_of(directory: pathlib.Path, name: str, suffix: str = "step") -> pathlib.Path:
    [path] = directory.glob(f"{name}-*.{suffix}")
    return path


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_process_of_any_rank_compiles_nothing_and_computes_the_same_bits(kept, rank):
    engine = an_engine(kept[0], rank)
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
        (lambda data: data.replace(b'"cluster": "2 ', b'"cluster": "3 '), "made for cluster 3"),
    ],
)
def test_a_file_that_is_not_right_is_compiled_anew_and_replaced(kept, tmp_path, damage, reason):
    directory = copied(kept, tmp_path)
    path = file_of(directory, "rows-4")
    path.write_bytes(damage(path.read_bytes()))
    warm = an_engine(directory).warm_up()
    assert warm.origins["rows-8"] == "loaded"
    assert warm.origins["rows-4"].startswith("compiled: ")
    assert reason in warm.origins["rows-4"]
    assert an_engine(directory).warm_up().compilations == 0


@pytest.mark.parametrize("fact", sorted(step_facts(a_run())))
def test_an_executable_made_under_other_facts_is_not_used(kept, tmp_path, fact):
    directory = copied(kept, tmp_path)
    path = file_of(directory, "rows-4")
    facts = step_facts(an_engine(None).config) | {fact: "another"}
    path.rename(directory / f"rows-4-{facts['platform']}.step")
    store = ExecutableStore(directory, facts)
    with pytest.raises(executables.UnusableFile, match=f"made for {fact} .*, this is another"):
        store._load("rows-4", (), ())


def test_hosts_of_another_kind_keep_their_own_files_in_the_same_directory(kept):
    store = ExecutableStore(kept[0], step_facts(a_run(RANKS)) | {"platform": "another"})
    with pytest.raises(executables.UnusableFile, match="no executable was kept"):
        store._load("rows-4", (), ())


def test_a_rank_waits_for_the_one_that_compiles_and_loads_what_it_kept(kept, tmp_path):
    directory = copied(kept, tmp_path)
    kept_file = file_of(directory, "rows-4")
    ready = kept_file.rename(tmp_path / "ready")
    lock = file_of(directory, "compiling", "lock")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, lock.open("ab") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        warm = pool.submit(an_engine(directory, rank=1).warm_up)
        with pytest.raises(TimeoutError):
            warm.result(0.5)
        shutil.move(ready, kept_file)  # and the other goes on to compile the next step
        assert warm.result(JOIN_S).origins == dict.fromkeys(NAMES, "loaded")


def test_a_rank_compiles_what_one_that_ended_left_locked_but_not_compiled(kept, tmp_path):
    directory = copied(kept, tmp_path)
    file_of(directory, "rows-4").unlink()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with file_of(directory, "compiling", "lock").open("ab") as another:
            fcntl.flock(another, fcntl.LOCK_EX)
            warm = pool.submit(an_engine(directory).warm_up)
            with pytest.raises(TimeoutError):
                warm.result(0.5)
        assert warm.result(JOIN_S).origins["rows-4"] == "compiled: no executable was kept"
    assert an_engine(directory, rank=1).warm_up().compilations == 0


def test_a_rank_does_not_wait_for_ever_for_one_that_hangs(kept, tmp_path, monkeypatch):
    directory = copied(kept, tmp_path)
    file_of(directory, "rows-4").unlink()
    monkeypatch.setattr(executables, "TURN_S", 0.2)
    with file_of(directory, "compiling", "lock").open("ab") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        warm = an_engine(directory).warm_up()
    assert warm.origins["rows-4"].startswith("compiled: ")


def test_what_others_may_write_to_is_not_loaded(kept, tmp_path):
    directory = copied(kept, tmp_path)
    os.chmod(directory, 0o770)
    warm = an_engine(directory).warm_up()
    assert all("not group- or world-writable" in origin for origin in warm.origins.values())


def test_the_digest_of_the_source_changes_with_any_file(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "step.py").write_text("one = 1")
    monkeypatch.setattr(executables.eep_jax, "__path__", [str(package)])
    before = executables.source_digest.__wrapped__()
    (package / "step.py").write_text("one = 2")
    assert executables.source_digest.__wrapped__() != before
