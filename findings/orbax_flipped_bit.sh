#!/usr/bin/env bash
# Package: orbax-checkpoint 0.12.8 with tensorstore 0.1.86
# Seen: One bit of a checkpoint's largest value file is flipped, at eight places in turn: every
#   restore succeeds and returns wrong numbers. No checksum covers the values.
# Expected: A checksum error.
# Instead: Store a digest of each array's bytes beside the checkpoint and compare it after every
#   restore.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile \
    jax==0.12.0.1 jaxlib==0.12.0.1 orbax-checkpoint==0.12.8 tensorstore==0.1.86
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import os
import pathlib
import tempfile
import numpy as np
import orbax.checkpoint as ocp

weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
folder = pathlib.Path(tempfile.mkdtemp())
checkpointer = ocp.StandardCheckpointer()
wrong = []
for place in range(1, 9):
    path = folder / str(place)
    checkpointer.save(path, {"w": weights})
    checkpointer.wait_until_finished()
    values = max((p for p in path.rglob("*") if p.is_file()), key=os.path.getsize)
    content = bytearray(values.read_bytes())
    content[len(content) * place // 10] ^= 1
    values.write_bytes(content)
    restored = np.asarray(checkpointer.restore(path)["w"])
    wrong.append(int((restored != weights).sum()))
print(f"orbax {ocp.__version__}: wrong numbers per flipped bit, without an error: {wrong}")
assert all(wrong)
PY
