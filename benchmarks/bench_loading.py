"""How fast a rank's experts come from a Hugging Face directory into its bank, beside plain reads.

    python -m benchmarks.bench_loading [--directory=DIR] [--out=benchmarks/results/loading.jsonl]

Without a directory one with random bfloat16 weights is written first, 0.9 GB. In turn are timed:
reading the bytes of the rank's experts once, tensor by tensor into memory, and loading them:
read, turned, and written into the slab. `cold`: the system was told to forget the files before;
what is below the system may remember them all the same. One expert is compared bit by bit first.
"""

import json
import os
import pathlib
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging

from benchmarks.harness import Record, append, compared, cpu_device, percentile
from launch import flags
from launch.environments.local import cpu_rank_environment

FIELDS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 64,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "vocab_size": 256,
}
RANKS = 4  # rank 0 of so many loads its share


def define_flags() -> None:
    absl_flags.DEFINE_string("directory", None, "A Hugging Face directory; none: random weights.")
    absl_flags.DEFINE_integer("samples", 7, "How often each is timed; the median counts.", 1)
    absl_flags.DEFINE_string("out", None, "File of records to append to; none: only the figures.")


def main() -> int:
    os.environ.update(cpu_rank_environment())
    absl_logging.set_verbosity(absl_logging.WARNING)
    options = absl_flags.FLAGS
    with tempfile.TemporaryDirectory(prefix="eep-bench-") as scratch:
        root = pathlib.Path(options.directory or scratch)
        if not options.directory:
            write_random(root)
        records = [r for cold in (True, False) for r in measure(root, options.samples, cold)]
    if options.out:
        append(pathlib.Path(options.out), records)
    return 0


def measure(root: pathlib.Path, samples: int, cold: bool) -> list[Record]:
    """Times both in turn; prints and returns the record of loading."""
    from eep_jax.config import EngineConfig
    from eep_jax.heap.loopback import LoopbackHeap
    from eep_jax.models.expert_bank import ExpertBank, slab_layout
    from eep_jax.relocation.executor import Executor
    from eep_jax.relocation.hugging_face import HuggingFaceCheckpoint

    checkpoint = HuggingFaceCheckpoint(root, "bfloat16")
    experts = tuple(range(0, checkpoint.model.experts, RANKS))
    layout = slab_layout(checkpoint.model, EngineConfig(dtype="bfloat16"), 1, len(experts))
    bank = ExpertBank(layout, LoopbackHeap(0, 1, layout.slab_bytes))
    ranges = sorted(place for expert in experts for place in checkpoint.places(expert))
    nbytes = sum(end - start for _, start, end in ranges)
    buffer = np.zeros(nbytes, np.uint8)
    executor, plain_s, own_s = Executor(bank, checkpoint), [], []

    def load() -> None:
        for slot in range(len(experts)):
            bank.clear(slot)
        executor.carry_out(experts, ())

    def read() -> None:
        files = {path: os.open(path, os.O_RDONLY) for path, _, _ in ranges}
        at = 0
        for path, start, end in ranges:
            assert os.preadv(files[path], [buffer[at : at + end - start]], start) == end - start
            at += end - start
        for number in files.values():
            os.close(number)

    load()  # the slab's pages exist from here on
    wanted = checkpoint.read_experts([experts[-1]])[experts[-1]]
    if bank.read(len(experts) - 1).tobytes() != wanted.tobytes():
        raise AssertionError("what was loaded is not what the files say")
    for _ in range(samples):
        for work, taken in ((read, plain_s), (load, own_s)):
            if cold:
                forget({path for path, _, _ in ranges})
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    own, plain = (nbytes / percentile(taken, 50) / 1e9 for taken in (own_s, plain_s))
    state = "cold" if cold else "cached"
    print(
        f"loading   {state} {nbytes / 1e6:.0f} MB   {own:.2f} GB/s   read once {plain:.2f} GB/s   "
        f"{own / plain:.0%}   n={samples}"
    )
    model = checkpoint.model
    shape = {"hidden": model.hidden, "expert_hidden": model.expert_hidden, "samples": samples}
    shape |= {"layers": model.moe_layers, "experts": len(experts), "cache": state}
    return [
        Record(
            bench="loading",
            metric="rate",
            value=own,
            unit="GB/s",
            device=cpu_device(),
            ranks=1,
            shape=shape,
            **compared(plain, own),
        )
    ]


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
    define_flags()
    app.run(flags.main_with_usage(main))
