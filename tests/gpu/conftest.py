"""Tests of a real GPU: EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu"""

import os
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    wanted = os.environ.get("EEP_TEST_PLATFORM") == "gpu"
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; there set EEP_TEST_PLATFORM=gpu")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not wanted:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def jax_computes_on_a_gpu():
    import jax

    assert jax.default_backend() == "gpu", (
        f"EEP_TEST_PLATFORM=gpu, but JAX computes on {jax.default_backend()}: "
        "pip install eep-jax[cuda13] on a machine with an NVIDIA GPU"
    )
