#!/usr/bin/env bash
# Package: transformers 5.23.0
# Seen: A config.json that holds `rope_scaling` (the old key) beside `rope_parameters` (the new
#   one) is read by the old key, and the new one is dropped with its theta: 5,000,000 becomes the
#   default of 10,000, without a warning. Each key alone, and an old `rope_theta` beside
#   `rope_scaling`, are read correctly.
# Expected: The new key wins, or the two are merged, or an error.
# Instead: Refuse a config.json that holds both keys, or merge them before loading.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import json
import pathlib
import tempfile
import transformers


def theta(**keys):
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **keys}))
    return transformers.AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
old = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                        "original_max_position_embeddings": 32768}}
seen = {
    "rope_parameters": theta(**new),
    "rope_scaling and rope_theta": theta(**old, rope_theta=5e6),
    "rope_scaling and rope_parameters": theta(**old, **new),
}
print(f"transformers {transformers.__version__}: theta from {seen}")
assert list(seen.values()) == [5e6, 5e6, 10_000]
PY
