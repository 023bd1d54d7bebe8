"""Processes on this machine: their environment variables."""

import os


def cpu_rank_environment() -> dict[str, str]:
    """Variables a CPU rank needs before it loads JAX.

    One computing thread per rank: ranks share the cores, and a rank's sums must not depend on how
    many threads it was given.
    """
    single = "--xla_cpu_multi_thread_eigen=false"
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags if single in flags else f"{flags} {single}".strip(),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
