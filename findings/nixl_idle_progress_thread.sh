#!/usr/bin/env bash
# Package: nixl-cu12 1.5.1 (UCX over TCP, without CUDA)
# Seen: An idle agent with its progress thread, which is on by default, occupies a whole core.
#   With `enable_prog_thread=False` the same idle agent uses no processor time.
# Expected: A thread that sleeps until a transfer or a notification arrives.
# Instead: Create agents with `nixl_agent_config(enable_prog_thread=False)` and poll
#   `check_xfer_state` while a transfer runs. The package imports without CUDA if installed with
#   `--no-deps` beside NumPy.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --no-deps nixl-cu12==1.5.1 numpy==2.5.5
UCX_TLS=tcp "$work/venv/bin/python" - <<'PY'
import importlib.metadata
import time
from nixl_cu12._api import nixl_agent, nixl_agent_config

share = {}
for thread in (True, False):
    config = nixl_agent_config(enable_prog_thread=thread, backends=["UCX"])
    agent = nixl_agent(f"thread_{thread}", config)
    wall, processor = time.monotonic(), time.process_time()
    time.sleep(2)
    share[thread] = (time.process_time() - processor) / (time.monotonic() - wall)
    del agent
print(f"nixl-cu12 {importlib.metadata.version('nixl-cu12')}: cores used by an idle agent: "
      f"{share[True]:.2f} with the progress thread, {share[False]:.4f} without")
assert share[False] < 0.01 and share[True] > 20 * share[False]
PY
