"""Benchmarks as a user starts them: a process with a deadline, and all its children end with it."""

import json
import os
import signal
import subprocess
import sys

from benchmarks.harness import ROOT

# XLA compiles in two thirds of the time, for processes whose speed nobody looks at.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Starts each command line of argv[1] in a fork, with everything imported: [[status, output], ...].
FORKS = """
import importlib, json, os, runpy, sys, tempfile
lines = json.loads(sys.argv[1])
for module in {line[0] for line in lines}: importlib.import_module(module)
found = []
for module, *arguments in lines:
    with tempfile.TemporaryFile() as file:
        if (pid := os.fork()) == 0:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.argv = [module, *arguments]
            sys.modules.pop(module)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file.seek(0)
        found.append([status, file.read().decode()])
print(json.dumps(found))
"""


def assert_refused(cases: list[tuple[str, list[str], str]], deadline_s: float = 120.0) -> None:
    """Each command line (module, arguments) ends with status 2 and a sentence with these words."""
    lines = json.dumps([[module, *arguments] for module, arguments, _ in cases])
    done = _run(["-c", FORKS, lines], {}, deadline_s)
    assert done.returncode == 0, done.stdout
    answers = json.loads(done.stdout.splitlines()[-1])
    for (_, _, words), (status, output) in zip(cases, answers, strict=True):
        assert status == 2 and words in output, output


def run_module(
    module: str, *arguments: str, deadline_s: float, quick: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module`; its stdout holds stderr, too. Raises TimeoutExpired."""
    return _run(["-m", module, *arguments], QUICK if quick else {}, deadline_s)


def _run(
    arguments: list[str], more: dict[str, str], deadline_s: float
) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    return subprocess.CompletedProcess(process.args, process.returncode, output)
