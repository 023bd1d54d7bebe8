"""Settings for all tests: JAX on one CPU thread, reproducible hypothesis, `--rewrite` and `--seed`."""

import os

# Before any test module loads JAX; the same as launch/environments/local.py sets for ranks.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "project",
    deadline=None,  # speed is for benchmarks
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption("--rewrite", action="store_true", help="Rewrite what text stories expect.")
    parser.addoption("--seed", type=int, default=20260510, help="Seed of randomised process tests.")


@pytest.fixture(scope="session")
def seed(request) -> int:
    """Printed with a failure, so that it can be given again with --seed."""
    return request.config.getoption("--seed")
