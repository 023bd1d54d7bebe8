"""Settings for all tests: JAX on one thread, reproducible hypothesis, `--rewrite`, `--seed`."""

import os

# Before any test module loads JAX.
if os.environ.get("EEP_TEST_PLATFORM") == "gpu":
    # Heaps and other processes of a test need the rest of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
else:
    # The same as launch/environments/local.py sets for ranks.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Several ranks in one process share XLA's pool, and each may sit in a callback that waits.
os.environ["NPROC"] = "16"

import resource
import tempfile

import hypothesis
import pytest

from tests.support import typecheck

typecheck.install()

from eep_jax.runtime.rank.scratch_dir import open_scratch  # noqa: E402  (checked, too)

hypothesis.settings.register_profile(
    "project",
    deadline=None,  # speed is for benchmarks
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


# Digests of what tests load from the repository are kept outside of it, and go with this process.
os.environ["EEP_DIGEST_DIR"] = str(open_scratch(tempfile.gettempdir(), "digests").path)

# Ranks of one process hold their slabs as files, and shells allow 1024 by default.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
FILES = 8192 if _hard == resource.RLIM_INFINITY else min(8192, _hard)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, FILES), _hard))


def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="Rewrite what text stories expect.")
    parser.addoption("--seed", type=int, default=20260510, help="Seed of randomised process tests.")


@pytest.fixture(scope="session")
def seed(request) -> int:
    """Printed with a failure, so that it can be given again with --seed."""
    return request.config.getoption("--seed")
