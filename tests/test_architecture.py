"""Checks of the repository as a whole: imports, docstrings, documents, folders."""

import ast
import graphlib
import importlib.util
import itertools
import pathlib
import re
import shutil
import subprocess
import sys

import grimp
import pytest

from benchmarks.harness import RESULTS, read
from benchmarks.table import render, render_headlines

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ("eep_jax", "pallas_kernels", "launch", "configs", "benchmarks")
TOP_LEVEL = {"eep_jax", "pallas_kernels", "launch", "configs", "tests", "benchmarks"}


def test_imports_point_down_only():
    program = shutil.which("lint-imports", path=str(pathlib.Path(sys.executable).parent))
    assert program, "lint-imports is part of the extra 'test'"
    found = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stdout


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError with the circle


def test_docstrings_of_modules_open_with_a_noun_not_with_a_question():
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    documented = {path: ast.get_docstring(ast.parse(path.read_text())) for path in paths}
    found = {str(path.relative_to(ROOT)) for path, text in documented.items() if asks(text)}
    assert not found, f"open them with a noun phrase and a verb: {sorted(found)}"


def asks(docstring: str | None) -> bool:
    words = r"(What|How|Who|Whom|Whose|Where|Which|Whether|When|Why)\b"
    return bool(re.match(words, docstring or ""))


@pytest.mark.parametrize("script", sorted(set(re.findall(r"bash (\S+\.sh)", README))))
def test_scripts_that_the_readme_names_exist_and_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=10)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_commands_that_the_readme_names_exist(module):
    assert importlib.util.find_spec(module) is not None


def test_the_readme_shows_the_newest_measurements():
    records, advice = read(sorted(RESULTS.glob("*.jsonl"))), "run python -m benchmarks.table"
    assert render_headlines(records, front=True) in README, advice
    of_benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert render_headlines(records) in of_benchmarks, advice
    assert render(records) in (RESULTS / "README.md").read_text(encoding="utf-8"), advice


def test_links_of_the_documents_lead_somewhere():
    inside = [(ROOT / name).rglob("*.md") for name in (*PACKAGES, "findings")]
    documents = [*ROOT.glob("*.md"), *itertools.chain.from_iterable(inside)]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_folder_of_python_is_one_of_the_fixed_six():
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    assert {path.split("/")[0] for path in listed.stdout.split()} <= TOP_LEVEL
