"""Converts a Hugging Face directory into a checkpoint whose experts can be read one by one.

    python -m launch.convert --hf=Qwen3-30B-A3B --out=/weights/qwen3-30b [--dtype=bfloat16]

It may be killed at any time: the same command continues where it stopped. Every piece is read back
and compared. Tokenizer, chat template and config.json are copied too, so

    python -m launch.local --config=qwen3_30b_a3b_h100x4 --checkpoint=/weights/qwen3-30b

serves it.

    python -m launch.convert --verify --hf=Qwen3-30B-A3B         # or --out=/weights/qwen3-30b

reads every weight and compares it with its digest: of the manifest, of the first load, and of the
Hugging Face Hub where the download left it. Status 1 if one differs.
"""

import logging
import os
import pathlib
import time

from absl import flags

from eep_jax.config import DTYPES
from launch import program
from launch.console import progress, say
from launch.errors import UsageError

HF = flags.DEFINE_string("hf", None, "Directory with config.json and safetensors files.")
OUT = flags.DEFINE_string(
    "out", None, "Directory of the checkpoint: new, empty, or of an interrupted conversion."
)
VERIFY = flags.DEFINE_boolean(
    "verify", False, "Converts nothing: compares all weights of --hf, or of --out, with digests."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", *DTYPES], "Dtype of the experts; empty: as stored, bfloat16 if quantized."
)


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU may be serving meanwhile
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs several lines per piece
    if VERIFY.value:
        return _verify()
    if HF.value is None or OUT.value is None:
        raise UsageError("give both --hf and --out, or --verify and one of them")
    from eep_jax.storage.conversion import Conversion
    from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
    from eep_jax.storage.learned_digests import LearnedDigests

    started_s = time.monotonic()
    learned = LearnedDigests(pathlib.Path(HF.value))
    source = HuggingFaceCheckpoint(HF.value, DTYPE.value, learned)
    conversion = Conversion(source, OUT.value)
    if conversion.is_finished:
        say(f"{conversion.root} is complete already")
        return 0
    say(
        f"{source.model.name}: {source.model.parameters / 1e9:.3g} G parameters, "
        f"{source.model.experts} experts, as {source.manifest['dtype']}"
    )
    kept = 0
    with progress("pieces", conversion.total) as show:
        for step in conversion.run():
            kept += not step.fresh
            show(step.done)
    size = sum(p.stat().st_size for p in pathlib.Path(conversion.root).rglob("*") if p.is_file())
    say(
        f"wrote {conversion.root}: {size / 2**30:.3g} GiB in {time.monotonic() - started_s:.1f} s"
        + (f", {kept} of {conversion.total} pieces from before" if kept else ""),
        "bold green",
    )
    return 0


def _verify() -> int:
    if (HF.value is None) == (OUT.value is None):
        raise UsageError("--verify needs one directory, --hf=DIR or --out=DIR")
    from eep_jax.storage.checkpoint import Checkpoint
    from eep_jax.storage.hugging_face import HuggingFaceCheckpoint
    from eep_jax.storage.learned_digests import LearnedDigests
    from eep_jax.storage.verify import verify

    if HF.value is None:
        store, known = Checkpoint(OUT.value), "with its manifest"
    else:
        learned = LearnedDigests(pathlib.Path(HF.value))
        store = HuggingFaceCheckpoint(HF.value, DTYPE.value, learned)
        known = f"with {learned.path}, or kept there"
    done, wrong = 0, 0
    for found in verify(store):
        done += 1
        if found.problem:
            wrong += 1
            say(found.problem, "red")
    if wrong:
        say(f"{wrong} of {done} weights and files of {store.root} are damaged", "bold red")
        return 1
    say(f"{done} weights and files of {store.root} were compared {known}", "bold green")
    return 0


cli = program.runner(main)

if __name__ == "__main__":
    cli()
