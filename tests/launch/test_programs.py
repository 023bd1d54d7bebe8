"""Promises of every program: --help shows all flags, --version, and errors of usage in one line."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import eep_jax
from launch.errors import UsageError
from launch.program import require_extra

ROOT = pathlib.Path(__file__).parents[2]
CONFIG_FLAGS = {"config", "override", "checkpoint", "run_dir", "gpus", "supervisor", "mirror_host"}


def entry_points(folder: str) -> list[str]:
    """Modules of programs with flags; workers that a benchmark starts have none."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if re.search(r'\nif __name__ == "__main__":(\n .*)*(\.run|cli)\(', path.read_text()):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
    return found


def flags_of(module: str) -> set[str]:
    """Flags that the module defines itself, and those of every run if it reads a configuration."""
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    own = {
        call.args[0].value
        for call in calls
        if getattr(call.func, "attr", "").startswith("DEFINE_")
        and isinstance(call.args[0], ast.Constant)
    }
    takes_a_config = "flags.run_config()" in path.read_text()
    return own | (CONFIG_FLAGS if takes_a_config else set())


def run(module: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    [
        *entry_points("launch"),
        *(pytest.param(m, marks=pytest.mark.slow) for m in entry_points("benchmarks")),
    ],
)
def test_help_shows_every_flag_with_its_meaning(module):
    shown = run(module, "--help")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    usages = [line.strip() for line in lines if line.startswith("  --")]
    names = {usage.removeprefix("--").removeprefix("[no]").partition("=")[0] for usage in usages}
    assert flags_of(module) <= names
    assert all(lines[lines.index(f"  {usage}") + 1].startswith(" " * 6) for usage in usages)
    assert "--help" in lines[-1] and "--version" in lines[-1]


@pytest.mark.parametrize("module", entry_points("launch"))
def test_version_and_what_is_no_flag(module):
    shown = run(module, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"eep-jax {eep_jax.__version__}\n")
    refused = run(module, "--gizmo=1")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "'gizmo'; --help lists all flags" in refused.stderr


def test_help_names_defaults_limits_and_what_is_required():
    text = run("launch.local", "--help").stdout
    assert "(default: tiny_cpu)" in text and "integer in the range [0, 65535]" in text
    assert "--environment=local|slurm" in text and "--[no]demo" in text
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[0] == "Flags:" and "Several hosts:" in titles
    assert "(required)" in run("launch.train_tiny", "--help").stdout
    assert "error: missing --text, --out;" in run("launch.train_tiny").stderr


@pytest.mark.parametrize("module", ["launch.local", "launch.supervise", "launch.node"])
def test_a_run_directory_that_cannot_be_written_is_one_line(module, monkeypatch):
    """Also for root: nobody can make a file in /proc/sys."""
    monkeypatch.setenv("EEP_TOKEN", "a token that is long enough")
    more = ["--ranks=0"] if module == "launch.node" else ["--port=0"]
    refused = run(module, "--run_dir=/proc/sys", *more)
    said = (refused.stdout + refused.stderr).strip()
    assert refused.returncode != 0 and "Traceback" not in said
    assert "/proc/sys" in said.splitlines()[-1]


def test_a_missing_extra_is_named():
    with pytest.raises(UsageError, match=r"plots needs no-such-thing.*pip install 'eep-jax\[x\]'"):
        require_extra("no-such-thing", "x", "plots")
    require_extra("absl-py", "x", "plots")


class TestConfigFiles:
    """--config with names and paths, from another folder, beside a user's own `configs`."""

    GOOD = (ROOT / "configs" / "tiny_cpu.py").read_text().replace('"tiny_cpu"', '"mine"')

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not ours')")
        (tmp_path / "mine.py").write_text(self.GOOD)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        return tmp_path

    def memory(self, folder, config: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launch.memory", f"--config={config}"]
        command.append("--gpus_of_kind=h100x4")
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)

    def test_paths_and_names_work_beside_another_folder_of_that_name(self, folder):
        for config in ("./mine.py", str(folder / "mine.py"), "tiny_gpu", "qwen3_30b_a3b_h100x4"):
            shown = self.memory(folder, config)
            assert shown.returncode == 0 and "KV cache" in shown.stdout, shown.stderr
