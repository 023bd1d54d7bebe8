#!/usr/bin/env bash
# Package: orbax-checkpoint 0.12.8 (JAX 0.12.0.1)
# Seen: A float32 array restored with an int8 target is converted without a warning, and 1000.0
#   becomes -24: values wrap modulo 256. `jnp.astype` of the same array saturates to 127, while a
#   shape that differs is refused.
# Expected: An error for another dtype as for another shape, or the conversion of `astype`.
# Instead: Restore with the stored dtype, then scale and convert yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile \
    jax==0.12.0.1 jaxlib==0.12.0.1 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import tempfile
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

values = jnp.array([1000.0, 300.0, -3.7])
path = tempfile.mkdtemp() + "/checkpoint"
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(path, {"w": values})
checkpointer.wait_until_finished()
target = lambda shape, dtype: {"w": jax.ShapeDtypeStruct(shape, dtype)}
restored = checkpointer.restore(path, target((3,), jnp.int8))["w"].tolist()
converted = values.astype(jnp.int8).tolist()
print(f"orbax {ocp.__version__}: restored as int8 {restored}, astype {converted}")
assert restored == [-24, 44, -3] and converted == [127, 127, -3]
try:
    checkpointer.restore(path, target((4,), jnp.float32))
except ValueError:
    print("another shape is refused")
else:
    raise AssertionError("another shape was accepted")
PY
