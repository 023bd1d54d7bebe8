#!/usr/bin/env bash
# Package: jax 0.12.0.1 (CPU)
# Seen: Three ways to count compilations of one jitted function give three answers.
#   `_cache_size()` grows when a NumPy array follows a JAX array, though nothing is compiled. A
#   committed array of the same shape is compiled again without a new trace. A hit of the
#   persistent cache emits `backend_compile_duration` as a real compilation does.
# Expected: One cache entry, one trace and one compile event for each shape and dtype.
# Instead: To prove that nothing compiles, count `backend_compile_duration` events less
#   `cache_hits`, or call an AOT executable, which cannot recompile. Pass arguments of one kind:
#   all committed or all not.
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
import collections
import tempfile
import jax
import jax.numpy as jnp
import numpy as np

events, traces = collections.Counter(), 0
count = lambda name, *_, **__: events.update([name.rsplit("/", 1)[-1]])
jax.monitoring.register_event_duration_secs_listener(count)
jax.monitoring.register_event_listener(count)

def double(x):
    global traces
    traces += 1
    return x * 2
def call(function, argument):
    jax.block_until_ready(argument)
    before = events["backend_compile_duration"]
    function(argument)
    after = events["backend_compile_duration"]
    return {"entries": function._cache_size(), "traces": traces, "compiled": after - before}


jitted, x = jax.jit(double), np.ones(3, np.float32)
first = call(jitted, jnp.asarray(x))
numpy = call(jitted, x)
committed = call(jitted, jax.device_put(x, jax.devices()[0]))
print(f"jax {jax.__version__}\n  first {first}\n  NumPy {numpy}\n  committed {committed}")
assert first == {"entries": 1, "traces": 1, "compiled": 1}
assert numpy == {"entries": 2, "traces": 1, "compiled": 0}
assert committed == {"entries": 3, "traces": 1, "compiled": 1}
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
call(jax.jit(lambda x: x * 3), x)
jax.clear_caches()
again = call(jax.jit(lambda x: x * 3), x)
print(f"  from the persistent cache: {again['compiled']} event, {events['cache_hits']} hit")
assert again["compiled"] == events["cache_hits"] == 1
PY
