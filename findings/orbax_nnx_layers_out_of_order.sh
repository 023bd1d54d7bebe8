#!/usr/bin/env bash
# Package: orbax-checkpoint 0.12.8 and flax 0.12.12 (JAX 0.12.0.1)
# Seen: A model with a list of 12 layers is saved and restored without a target. The restored
#   layer numbers are text, in text order: 0, 1, 10, 11, 2, ... `nnx.merge(graphdef, restored)`
#   assigns leaves by position, so layer 2 receives the weights of layer 10. Nothing raises, and
#   up to 10 layers all is well.
# Expected: Integer keys, or a KeyError of `nnx.merge` for the key '2' instead of 2.
# Instead: Restore with a target (`restore(path, state)`), or apply the restored dictionary by
#   `nnx.replace_by_pure_dict`, which matches names; both are checked below.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile \
    jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import tempfile
import flax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx


class Model(nnx.Module):
    def __init__(self):
        linear = lambda: nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.layers = nnx.List([linear() for _ in range(12)])
        for number, layer in enumerate(self.layers):
            layer.kernel[...] = jnp.full((2, 2), float(number))


def numbers(model):
    return [int(layer.kernel[0, 0]) for layer in model.layers]


graphdef, state = nnx.split(Model())
path = tempfile.mkdtemp() + "/checkpoint"
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(path, nnx.to_pure_dict(state))
checkpointer.wait_until_finished()
restored = checkpointer.restore(path)
merged = numbers(nnx.merge(graphdef, restored))
print(f"orbax {ocp.__version__}, flax {flax.__version__}: layers hold weights of {merged}")
assert merged == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
by_target = nnx.merge(graphdef, checkpointer.restore(path, nnx.to_pure_dict(state)))
nnx.replace_by_pure_dict(state, restored)
by_name = nnx.merge(graphdef, state)
assert numbers(by_target) == numbers(by_name) == list(range(12))
PY
