"""The job scripts parse, explain each option, and report errors before they start anything."""

import os
import pathlib
import re
import subprocess

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def run(script: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | variables
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestEveryScript:
    def test_it_parses(self, script):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)

    def test_outside_of_a_job_it_says_how_to_submit_it(self, script):
        done = run(script, "DIR", "3")
        assert done.returncode == 2
        assert "submit this file with sbatch" in done.stderr

    def test_it_explains_every_option_of_sbatch(self, script):
        lines = script.read_text().splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert len(options) >= 6
        assert [lines[n] for n in options if not lines[n + 1].startswith("#          ^ ")] == []

    def test_it_names_no_machine_and_no_account(self, script):
        text = script.read_text()
        assert not re.search(r"--(account|partition|nodelist|reservation|qos)=[a-z]", text)
        assert not re.search(r"(?<![\w$}\"./])/(home|root|opt|scratch|data)\b", text)


def test_rejoining_wants_a_run_directory_and_ranks(tmp_path):
    for arguments in ((), (str(tmp_path),), (str(tmp_path), "3")):  # the last holds no token
        done = run(FOLDER / "rejoin.sbatch", *arguments, SLURM_JOB_ID="1")
        assert done.returncode == 2
        assert "usage: sbatch" in done.stderr
