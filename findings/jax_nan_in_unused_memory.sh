#!/usr/bin/env bash
# Package: jax 0.12.0.1 (CPU)
# Seen: What is excluded still counts. `lax.ragged_dot` returns NaN for every row if the weights
#   of a group of size 0 hold NaN. `jax.nn.dot_product_attention` returns NaN if a value behind
#   `key_value_seq_lengths` is NaN, and a row whose mask is False everywhere gets the mean of all
#   values instead of 0 or NaN.
# Expected: Results independent of weights of empty groups and of values behind the length.
# Instead: Zero the slots of idle experts and new pages of a key-value cache, and overwrite the
#   outputs of rows that are masked as a whole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

weights = jnp.ones((3, 8, 8)).at[1].set(jnp.nan)
rows = jax.lax.ragged_dot(jnp.ones((4, 8)), weights, jnp.array([2, 0, 2], jnp.int32))
print(f"jax {jax.__version__}: ragged_dot with an idle group of NaN: {rows[:, 0]}")
assert jnp.isnan(rows).all()

query, key = jnp.ones((1, 1, 1, 8)), jnp.ones((1, 4, 1, 8))
value = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], (1, 4, 1, 8))
attend = jax.nn.dot_product_attention
length = jnp.array([2], jnp.int32)
clean = attend(query, key, value, key_value_seq_lengths=length)[0, 0, 0, 0]
stale = value.at[0, 3].set(jnp.nan)
reached = attend(query, key, stale, key_value_seq_lengths=length)[0, 0, 0, 0]
masked = attend(query, key, value, mask=jnp.zeros((1, 1, 1, 4), bool))[0, 0, 0, 0]
print(f"attention over 2 of 4 keys: {clean}, with NaN at the fourth: {reached}")
print(f"attention over none of the values 0, 1, 2, 3: {masked}")
assert clean == 0.5 and jnp.isnan(reached) and masked == 1.5
PY
