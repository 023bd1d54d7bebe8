#!/usr/bin/env bash
# Package: tensorstore 0.1.86 (zarr3 driver)
# Seen: A chunk whose file is missing reads as zeros without an error.
#   `fill_missing_data_reads=False` makes such a read fail, but then a correctly written array of
#   zeros fails as well: chunks that equal the fill value are not stored.
# Expected: An error for a lost file, at least with `fill_missing_data_reads=False`, and no error
#   for zeros.
# Instead: Write with `store_data_equal_to_fill_value=True` and read with
#   `fill_missing_data_reads=False`; the two settings are of use only together.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile tensorstore==0.1.86 numpy==2.5.5
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import pathlib
import tempfile
import numpy as np
import tensorstore as ts


def read(values, *, lose_chunk=False, **settings):
    folder = pathlib.Path(tempfile.mkdtemp())
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, **settings}
    chunks = ts.ChunkLayout(chunk_shape=[2])
    store = ts.open(spec, create=True, dtype=ts.float32, shape=[4], chunk_layout=chunks)
    store.result().write(np.array(values, np.float32)).result()
    if lose_chunk:
        (folder / "c" / "1").unlink()
    try:
        return ts.open(spec).result().read().result().tolist()
    except ValueError as error:
        return "error" if "is missing" in str(error) else str(error)


strict = {"fill_missing_data_reads": False}
stored = {"store_data_equal_to_fill_value": True}
lost = read([1, 2, 3, 4], lose_chunk=True)
lost_strict = read([1, 2, 3, 4], lose_chunk=True, **strict)
zeros_strict = read([0, 0, 0, 0], **strict)
both = read([0, 0, 0, 0], **strict, **stored)
print(f"tensorstore {importlib.metadata.version('tensorstore')}: lost chunk {lost}; "
      f"strict: lost chunk {lost_strict}, zeros {zeros_strict}; both settings: zeros {both}")
assert lost == [1, 2, 0, 0] and lost_strict == zeros_strict == "error" and both == [0, 0, 0, 0]
PY
