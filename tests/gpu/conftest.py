"""Tests of a real GPU: EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu"""

import importlib.util
import os
import pathlib
import sys
import types

import pytest

HERE = pathlib.Path(__file__).parent
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

if importlib.util.find_spec("beartype") is None:
    # A machine with a GPU may lack it; annotations are checked where the same code runs on CPU.
    sys.modules["beartype"] = types.ModuleType("beartype")
    sys.modules["beartype"].beartype = lambda function, *_, **__: function


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, not installed")


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


@pytest.fixture
def compilations():
    """The compile events since the test began, or since the test cleared the list."""
    import jax

    seen = []
    count = lambda event, duration, **_: seen.append(event) if event == COMPILE_EVENT else None
    jax.monitoring.register_event_duration_secs_listener(count)
    yield seen
    jax.monitoring.unregister_event_duration_listener(count)
