#!/usr/bin/env bash
# Package: jax 0.12.0.1 (CPU)
# Seen: `jax.dlpack.from_dlpack(array, copy=True)` and `jax.device_put(array, may_alias=False)`
#   share the memory of a NumPy array that is aligned to 64 bytes: writing to it changes the JAX
#   array. The documentation of both says that a copy is made.
# Expected: A copy. Most NumPy arrays are not so aligned and are copied, so a test seldom shows
#   the difference.
# Instead: Use `jnp.array(array)`, which copies.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

memory = np.zeros(4096, np.uint8)
start = -memory.ctypes.data % 64
aligned = memory[start : start + 1024].view(np.float32)
ways = {
    "from_dlpack(copy=True)": lambda: jax.dlpack.from_dlpack(aligned, copy=True),
    "device_put(may_alias=False)": lambda: jax.device_put(aligned, may_alias=False),
    "jnp.array": lambda: jnp.array(aligned),
}
seen = {}
for name, make in ways.items():
    aligned[:] = 0
    made = jax.block_until_ready(make())
    aligned[0] = 7
    seen[name] = "shares" if made[0] == 7 else "copies"
print(f"jax {jax.__version__}: {seen}")
assert list(seen.values()) == ["shares", "shares", "copies"]
PY
