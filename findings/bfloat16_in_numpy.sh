#!/usr/bin/env bash
# Package: ml_dtypes 0.6.0 with NumPy 2.5.5
# Seen: A bfloat16 array in NumPy is not a float16 with other bits. The sum of 5,000 ones is 256
#   and their mean 0.05, since sums run in bfloat16 one by one. `np.sort` leaves an array with a
#   NaN unsorted, `np.issubdtype(dtype, np.floating)` is False, and `dtype.str` is '<V2', from
#   which the type cannot be restored.
# Expected: float16's behaviour: a pairwise sum of 5,000, NaN sorted last.
# Instead: Convert to float32 before every reduction or sort; write `dtype.name` into formats,
#   never `dtype.str`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile ml_dtypes==0.6.0 numpy==2.5.5
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

seen = {}
for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
    ones, mixed = np.ones(5000, dtype), np.array([3, np.nan, 2, 5, 1, 4], dtype)
    seen[dtype.name] = {
        "sum": float(ones.sum()),
        "mean": round(float(ones.mean()), 2),
        "sort": [float(value) for value in np.sort(mixed)],
        "floating": bool(np.issubdtype(dtype, np.floating)),
        "str": dtype.str,
    }
    print(dtype.name, seen[dtype.name])
half, brain = seen["float16"], seen["bfloat16"]
assert half["sum"] == 5000 and half["sort"][:5] == [1, 2, 3, 4, 5]
assert brain["sum"] == 256 and brain["mean"] == 0.05 and brain["sort"][:2] != [1, 2]
assert not brain["floating"] and brain["str"] == "<V2"
PY
