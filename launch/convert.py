"""Converts a Hugging Face directory into a checkpoint whose experts can be read one by one.

    python -m launch.convert --hf=Qwen3-30B-A3B --out=/weights/qwen3-30b [--dtype=bfloat16]

It may be killed at any time: the same command continues where it stopped. Every piece is read back
and compared. Tokenizer, chat template and config.json are copied too, so

    python -m launch.local --config=qwen3_30b_a3b_h100x4 --checkpoint=/weights/qwen3-30b

serves it.
"""

import logging
import os
import pathlib
import time

from absl import flags

from eep_jax.config import DTYPES
from launch import program
from launch.console import progress, say

HF = flags.DEFINE_string(
    "hf", None, "Directory with config.json and safetensors files.", required=True
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "Directory of the checkpoint: new, empty, or of an interrupted conversion.",
    required=True,
)
DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", *DTYPES], "Dtype of the experts; empty: as stored, bfloat16 if quantized."
)


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU may be serving meanwhile
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs several lines per piece
    from eep_jax.storage.conversion import Conversion
    from eep_jax.storage.hugging_face import HuggingFaceCheckpoint

    started_s = time.monotonic()
    source = HuggingFaceCheckpoint(HF.value, DTYPE.value)
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


cli = program.runner(main)

if __name__ == "__main__":
    cli()
