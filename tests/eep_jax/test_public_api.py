"""Promises of `import eep_jax`: it is free, has the public names, and their examples run."""

import doctest
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import eep_jax
from eep_jax.library.environment import cpu_environment

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE_S = 240.0  # a process loads JAX and compiles in seconds; a loaded machine may take long
NAMES = [name for name in eep_jax.__all__ if name != "__version__"]
ERRORS = [n for n in NAMES if n.endswith("Error") or n in ("RankEnded", "RelocationFailed")]
# Their examples are run in this order, in one process of its own, for it becomes a rank.
OF_A_RANK = ["join", "ElasticRank", "AdminClient"]
HERE = [name for name in NAMES if name not in (*ERRORS, *OF_A_RANK)]


def python(*arguments: str) -> str:
    environment = os.environ | cpu_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_example(name: str, known: dict) -> None:
    """Runs the example of a public name; what it defines is added to `known`."""
    found = doctest.DocTestFinder(recurse=False).find(getattr(eep_jax, name), name, globs=known)
    assert sum(len(test.examples) for test in found) > 0, f"{name} has no example"
    for test in found:
        runner = doctest.DocTestRunner()
        runner.run(test, clear_globs=False)
        assert runner.failures == 0, f"the example of {name} failed, see above"
        known |= test.globs


def test_importing_loads_nothing_else():
    found = "{m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'numpy', 'aiohttp'}"
    assert python("-c", f"import sys, eep_jax; print({found})") == "set()\n"
    uses = "eep_jax.start_supervisor, eep_jax.run_config, eep_jax.AdminClient"
    assert python("-c", f"import sys, eep_jax; {uses}; print('jax' in sys.modules)") == "False\n"


def test_names_are_listed_and_others_are_refused():
    assert set(NAMES) <= set(dir(eep_jax))
    assert all(getattr(eep_jax, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="'eep_jax' has no attribute 'ElasticMoF'"):
        _ = eep_jax.ElasticMoF


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_of_one_base(name):
    assert issubclass(getattr(eep_jax, name), eep_jax.EepError)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ERRORS)))
def test_parameters_and_results_are_documented(name):
    found = getattr(eep_jax, name)
    text = inspect.getdoc(found) + (inspect.getdoc(getattr(found, "__init__", found)) or "")
    made = found.__init__ if inspect.isclass(found) else found
    parameters = inspect.signature(made).parameters.values()
    listed = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    if name not in ("ElasticRank", "ExpertRouting"):  # made by others
        assert [p for p in listed if f"{p}:" not in text] == []
    if inspect.isfunction(found):
        assert "Returns:" in text
    assert "Example:" in text


@pytest.mark.parametrize("name", HERE)
def test_the_example_runs(name):
    run_example(name, {})


@pytest.mark.multiprocess
def test_the_examples_of_a_rank_run():
    known = "from tests.eep_jax.test_public_api import *; known = {}"
    python("-c", f"{known}; [run_example(name, known) for name in OF_A_RANK]")
