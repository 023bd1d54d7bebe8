#!/usr/bin/env bash
# Package: jaxtyping 0.3.11 with beartype 0.23.1 (JAX 0.12.0.1)
# Seen: `list[Float[Array, "T D"]]` never finds arrays of different shapes: beartype examines one
#   random item a call, and a single item cannot contradict itself. Of a dict it examines the
#   first value alone. 100 calls with unequal shapes all pass.
# Expected: The dimensions T and D bound over all items, as they are over all parameters.
# Instead: Annotate the container as `PyTree[Float[Array, "T D"]]`: jaxtyping itself then checks
#   every leaf.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile \
    jax==0.12.0.1 jaxlib==0.12.0.1 jaxtyping==0.3.11 beartype==0.23.1
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import importlib.metadata
import jax.numpy as jnp
from beartype import beartype
from jax import Array
from jaxtyping import Float, PyTree, TypeCheckError, jaxtyped


@jaxtyped(typechecker=beartype)
def of_list(arrays: list[Float[Array, "T D"]]): ...


@jaxtyped(typechecker=beartype)
def of_dict(arrays: dict[str, Float[Array, "T D"]]): ...


@jaxtyped(typechecker=beartype)
def of_pytree(arrays: PyTree[Float[Array, "T D"]]): ...


def refused(function, arrays):
    try:
        function(arrays)
    except TypeCheckError:
        return True
    return False


unequal = [jnp.ones((2, 3)), jnp.ones((5, 7))]
named = dict(zip("ab", unequal))
calls = ((of_list, unequal), (of_dict, named), (of_pytree, unequal), (of_pytree, named))
counts = [sum(refused(*call) for _ in range(100)) for call in calls]
print(f"jaxtyping {importlib.metadata.version('jaxtyping')}: refused of 100 calls: "
      f"list, dict, PyTree of a list, PyTree of a dict {counts}")
assert counts == [0, 0, 100, 100]
PY
