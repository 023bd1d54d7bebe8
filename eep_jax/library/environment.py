"""Environment variables of a rank's process. No JAX."""

import os


def cpu_environment() -> dict[str, str]:
    """Variables that a CPU rank needs before it loads JAX.

    One computing thread per rank: ranks share the cores, and sums must not depend on the number of
    threads.

    Returns:
        Values by name; `XLA_FLAGS` keeps the flags that are set already.

    Example:
        >>> import os
        >>> from eep_jax import cpu_environment
        >>> environment = os.environ | cpu_environment()  # for subprocess.Popen(env=...)
        >>> environment["JAX_PLATFORMS"], environment["OMP_NUM_THREADS"]
        ('cpu', '1')
    """
    single = "--xla_cpu_multi_thread_eigen=false"
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags if single in flags else f"{flags} {single}".strip(),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # An executable that XLA:CPU loaded from its cache lacks functions when it is serialised
        # again, and would fail in the next process. Steps have a store of their own.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
