#!/usr/bin/env bash
# Package: flax 0.12.12 (NNX) with JAX 0.12.0.1
# Seen: `nnx.update` puts an int8 array of shape (7, 9) into the kernel of a 3 x 4 linear layer
#   and adds an attribute for a name that the layer does not have. `nnx.merge` accepts wrong
#   shapes and dtypes as well. The error, if any, comes with the first call.
# Expected: An error that names the parameter, as `flax.linen` raises at `apply` for a wrong
#   shape.
# Instead: Compare names, shapes and dtypes of the two states before `update` or `merge`.
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
import jax
import jax.numpy as jnp
from flax import nnx

layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
wrong = nnx.Param(jnp.zeros((7, 9), jnp.int8))
nnx.update(layer, nnx.State({"kernel": wrong, "kernle": nnx.Param(jnp.zeros(3))}))
print(f"flax {flax.__version__}: kernel {layer.kernel.shape} {layer.kernel.dtype}, "
      f"new attribute {layer.kernle.shape}")
assert layer.kernel.shape == (7, 9) and layer.kernel.dtype == jnp.int8
assert layer.kernle.shape == (3,)
graphdef, state = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
merged = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros((5, 5), jnp.int8), state))
print(f"merge: kernel {merged.kernel.shape} {merged.kernel.dtype}")
assert merged.kernel.shape == (5, 5) and merged.kernel.dtype == jnp.int8
PY
