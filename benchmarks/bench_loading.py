"""Rates at which a rank's weights come from storage to where it computes, beside plain reads.

    python -m benchmarks.bench_loading [--directory=DIR] [--out=benchmarks/results/loading.jsonl]

Without a directory one with random bfloat16 weights is written first, 1 GB. From it, and from what
launch.convert makes of it, a rank's experts are loaded into its bank and the dense weights into
JAX: read, turned where they are stored the other way round, compared with digests where there are
any. In turn with that the same bytes are read into memory and nothing else: by one thread, and by
as many as load. `cold`: the page cache dropped the files before; what is below the system
may remember them all the same. One expert and all dense weights are compared first.
"""

import concurrent.futures
import json
import os
import pathlib
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import flags as absl_flags
from absl import logging as absl_logging

from benchmarks import command
from benchmarks.harness import Record, Sheet, Unfit, cpu_device, percentile
from eep_jax.library.environment import cpu_environment
from eep_jax.runtime.rank.scratch_dir import scratch

BLOCK_BYTES = 4 << 20  # of plain reads
FIELDS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "vocab_size": 2048,
}
RANKS = 2  # rank 0 of so many loads its share: as of Qwen3-30B-A3B's, a fifth of it is dense


def define() -> None:
    command.define()
    absl_flags.DEFINE_string(
        "directory", None, "A Hugging Face directory. Without it random weights are written."
    )
    absl_flags.DEFINE_integer("samples", 9, "How often each is timed; the median counts.", 1)


def main() -> list[Record]:
    os.environ.update(cpu_environment())
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every piece
    options, sheet = absl_flags.FLAGS, Sheet("loading", cpu_device(), 1, {})
    with scratch(tempfile.gettempdir(), "bench") as temporary:
        root = pathlib.Path(options.directory) if options.directory else temporary / "hf"
        if not options.directory:
            write_random(root)
        converted = convert(root, temporary / "converted")
        for name, directory in (("safetensors", root), ("orbax", converted)):
            for dtype in ("bfloat16", "float32"):
                rank = Rank(directory, dtype)
                rank.check(root)
                for cold in (True, False):
                    measure(sheet, rank, name, options.samples, cold)
    return sheet.records


def convert(root: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    from eep_jax.storage.conversion import Conversion
    from eep_jax.storage.hugging_face import HuggingFaceCheckpoint

    for _ in Conversion(HuggingFaceCheckpoint(root), out).run():
        pass
    os.sync()
    return out


class Rank:
    """Rank 0 with a bank of `dtype`, and a directory of weights in bfloat16."""

    def __init__(self, root: pathlib.Path, dtype: str):
        import jax

        from eep_jax.config import EngineConfig
        from eep_jax.heap.loopback import LoopbackHeap
        from eep_jax.models.expert_bank import ExpertBank, slab_layout
        from eep_jax.models.weights import decoder_graph
        from eep_jax.relocation.executor import Executor
        from eep_jax.storage.checkpoint import Checkpoint
        from eep_jax.storage.hugging_face import HuggingFaceCheckpoint, is_hugging_face

        # As a run does: what has no dtype of its own is converted while it is read.
        make = HuggingFaceCheckpoint if is_hugging_face(root) else lambda path, _: Checkpoint(path)
        self.root, self.dtype, self.checkpoint = root, dtype, make(root, dtype)
        model = self.checkpoint.model
        self.experts = tuple(range(0, model.experts, RANKS))
        layout = slab_layout(model, EngineConfig(dtype=dtype), 1, len(self.experts))
        self.bank = ExpertBank(layout, LoopbackHeap(0, 1, layout.slab_bytes))
        self._executor = Executor(self.bank, self.checkpoint)
        self._dtypes = decoder_graph(model, jax.numpy.dtype(dtype))[1]
        self.ranges = self._ranges()
        self.nbytes = sum(end - start for _, start, end in self.ranges)
        self._buffer = np.zeros(self.nbytes, np.uint8)

    def load(self) -> list:
        """Loads all weights of a rank; returns the dense ones."""
        import jax

        from eep_jax.models.weights import put_dense

        for slot in range(len(self.experts)):
            self.bank.clear(slot)
        dense = put_dense(self.checkpoint.read_dense(), self._dtypes)
        self._executor.carry_out(self.experts, ())
        return jax.block_until_ready(dense)

    def read(self, threads: int) -> None:
        """The same bytes, a block at a time, into memory that was written before."""
        files = {path: os.open(path, os.O_RDONLY) for path, _, _ in self.ranges}
        blocks, at = [], 0
        for path, start, end in self.ranges:
            for first in range(start, end, BLOCK_BYTES):
                size = min(BLOCK_BYTES, end - first)
                blocks.append((files[path], self._buffer[at : at + size], first))
                at += size

        def one(block) -> None:
            number, into, first = block
            assert os.preadv(number, [into], first) == len(into)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, blocks))
        for number in files.values():
            os.close(number)

    def check(self, root: pathlib.Path) -> None:
        """Raises Unfit unless what is loaded is what the Hugging Face files say."""
        from eep_jax.storage.hugging_face import HuggingFaceCheckpoint

        wanted = HuggingFaceCheckpoint(root, self.dtype)
        dense = wanted.read_dense()
        for name, found in zip(self._dtypes, self.load(), strict=True):
            if np.asarray(found).tobytes() != dense[name].astype(self._dtypes[name]).tobytes():
                raise Unfit(f"{name} of {self.root} is not what the files say")
        last = wanted.read_experts([self.experts[-1]])[self.experts[-1]]
        if self.bank.read(len(self.experts) - 1).tobytes() != last.tobytes():
            raise Unfit(f"an expert of {self.root} is not what the files say")

    def _ranges(self) -> list[tuple[pathlib.Path, int, int]]:
        """(file, first byte, last byte + 1) of all that `load` reads."""
        checkpoint, found = self.checkpoint, []
        if hasattr(checkpoint, "places"):
            found = checkpoint.dense_spans()
            return sorted(found + [p for e in self.experts for p in checkpoint.spans(e)])
        skipped = {f"e{e:03d}" for e in range(checkpoint.model.experts)}
        skipped -= {f"e{e:03d}" for e in self.experts}
        for path in sorted((self.root / "weights").rglob("0*")):
            if path.is_file() and path.parent.name not in skipped:
                found.append((path, 0, path.stat().st_size))
        return found


def measure(sheet: Sheet, rank: Rank, source: str, samples: int, cold: bool) -> None:
    """Times all in turn; adds and prints the rates of loading."""
    from eep_jax.storage.digests import threads

    work = {"load": rank.load, "one": lambda: rank.read(1), "all": lambda: rank.read(threads())}
    taken = {name: [] for name in work}
    for _ in range(samples):
        for name, body in work.items():
            if cold:
                forget({path for path, _, _ in rank.ranges})
            started = time.perf_counter()
            body()
            taken[name].append(time.perf_counter() - started)
    rates = {name: rank.nbytes / percentile(found, 50) / 1e9 for name, found in taken.items()}
    model, state = rank.checkpoint.model, "cold" if cold else "cached"
    shape = {"source": source, "bank": rank.dtype, "cache": state, "bytes": rank.nbytes}
    shape |= {"hidden": model.hidden, "expert_hidden": model.expert_hidden, "samples": samples}
    shape |= {"layers": model.moe_layers, "experts": len(rank.experts)}
    print(
        f"loading   {source} into {rank.dtype} {state} {rank.nbytes / 1e6:.0f} MB   "
        f"{rates['load']:.2f} GB/s   read by one thread {rates['one']:.2f} GB/s, "
        f"{rates['load'] / rates['one']:.0%}   by {threads()} {rates['all']:.2f} GB/s, "
        f"{rates['load'] / rates['all']:.0%}   n={samples}",
        flush=True,
    )
    for against, readers in (("one", 1), ("all", threads())):
        beside = {"baseline": rates[against], "readers": readers}
        sheet.add("rate", rates["load"], "GB/s", **shape, **beside)


def forget(paths) -> None:
    """Tells the system to keep nothing of these files in memory."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def write_random(root: pathlib.Path) -> None:
    """A directory of FIELDS with a shard for each layer, as publishers cut them."""
    from safetensors.numpy import save_file

    from eep_jax.models.families import registry

    root.mkdir()
    (root / "config.json").write_text(json.dumps(FIELDS))
    model, family = registry.read_model(root), registry.family_of(FIELDS)
    shards = {"dense": list(family.dense(model).values())}
    for expert in range(model.experts):
        for part in family.expert(model, expert):
            shards.setdefault(f"layer{part.layer}", []).append(part.stored)
    random, where = np.random.default_rng(0), {}
    for name, tensors in shards.items():
        file = f"model-{name}.safetensors"
        draw = lambda shape: random.integers(0, 1 << 15, shape, np.uint16)
        values = {t.key: draw(t.shape).view(ml_dtypes.bfloat16) for t in tensors}
        save_file(values, root / file)
        where |= dict.fromkeys(values, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    os.sync()


if __name__ == "__main__":
    define()
    command.run(main)
