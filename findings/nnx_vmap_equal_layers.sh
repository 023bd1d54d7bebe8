#!/usr/bin/env bash
# Package: flax 0.12.12 (NNX) with JAX 0.12.0.1
# Seen: Layers stacked by `nnx.vmap` over a constructor whose Rngs are broadcast (`in_axes=None,
#   axis_size=3`) all start with the same weights. Nothing raises.
# Expected: Different weights per layer, as a Python list of layers made from one Rngs has.
# Instead: Decorate the constructor with `nnx.split_rngs(splits=3)` and map the Rngs over axis 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import flax
from flax import nnx


def make(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


rngs = nnx.Rngs(0)
listed = [make(rngs) for _ in range(3)]
broadcast = nnx.vmap(make, in_axes=None, axis_size=3)(nnx.Rngs(0))
split = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=0))(nnx.Rngs(0))
equal = {
    "list": bool((listed[0].kernel[...] == listed[1].kernel[...]).all()),
    "vmap, broadcast": bool((broadcast.kernel[0] == broadcast.kernel[1]).all()),
    "vmap, split": bool((split.kernel[0] == split.kernel[1]).all()),
}
print(f"flax {flax.__version__}: layers 0 and 1 have equal weights: {equal}")
assert equal == {"list": False, "vmap, broadcast": True, "vmap, split": False}
PY
