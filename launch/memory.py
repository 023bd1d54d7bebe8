"""Prints the GPU memory that a rank of a configuration needs; allocates nothing.

python -m launch.memory --config=deepseek_v3_h200x32
python -m launch.memory --config=qwen3_30b_a3b_h100x4 --gpus_of_kind=h200x2
"""

import re

from absl import flags as absl_flags

from eep_jax.models.memory import describe
from launch import flags, program

GPUS_OF_KIND = absl_flags.DEFINE_string(
    "gpus_of_kind",
    None,
    "Kind and number of GPUs, such as h100x4. If not given, the end of the configuration's name.",
)


def main() -> int:
    config = flags.run_config()
    text = GPUS_OF_KIND.value or config.name.rpartition("_")[2]
    if not (found := re.fullmatch(r"(\w+?)x(\d+)", text)):
        raise flags.UsageError(
            f"--gpus_of_kind={text!r} must be a kind and a number, such as h100x4"
        )
    try:
        print(describe(config, found[1], int(found[2])))
    except ValueError as error:
        raise flags.UsageError(str(error)) from error
    return 0


cli = program.runner(main)

if __name__ == "__main__":
    cli()
