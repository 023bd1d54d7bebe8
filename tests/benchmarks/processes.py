"""Benchmarks as a user starts them: a process with a deadline, and all its children end with it."""

import os
import signal
import subprocess
import sys

from benchmarks.harness import ROOT


def run_module(module: str, *arguments: str, deadline_s: float) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module`; its stdout holds stderr, too. Raises TimeoutExpired."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
