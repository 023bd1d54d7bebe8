#!/usr/bin/env bash
# Package: safetensors 0.8.0 with NumPy 2.5.5
# Seen: `safetensors.numpy.save` writes the memory of a transposed array under the transposed
#   shape: the loaded array has the right shape and its values in another order. Nothing raises.
#   The `safetensors.flax` module writes the same view correctly.
# Expected: A contiguous copy, as release 0.7 made, or an error for an array that is not
#   C-contiguous.
# Instead: Pass `np.ascontiguousarray(array)` to every save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile safetensors==0.8.0 numpy==2.5.5
"$work/venv/bin/python" - <<'PY'
import numpy as np
import safetensors
import safetensors.numpy

weights = np.arange(6, dtype=np.float32).reshape(2, 3)
loaded = safetensors.numpy.load(safetensors.numpy.save({"w": weights.T}))["w"]
print(f"safetensors {safetensors.__version__}: saved {weights.T.tolist()}")
print(f"loaded {loaded.tolist()}")
assert loaded.shape == (3, 2) and not (loaded == weights.T).all()
assert (loaded.ravel() == weights.ravel()).all()
copied = safetensors.numpy.save({"w": np.ascontiguousarray(weights.T)})
assert (safetensors.numpy.load(copied)["w"] == weights.T).all()
PY
