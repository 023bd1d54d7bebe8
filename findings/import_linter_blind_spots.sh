#!/usr/bin/env bash
# Package: import-linter 2.17
# Seen: A `forbidden` contract is kept although importing the checked package loads the forbidden
#   one. Imports inside outside libraries are not followed (here ml_dtypes loads numpy),
#   `include_external_packages` notwithstanding. A folder without `__init__.py` can be imported,
#   yet import-linter does not read it.
# Expected: Both reported, since indirect imports count unless allowed.
# Instead: Add a test that imports the package in a new process and looks into `sys.modules`, and
#   one that each folder of sources has an `__init__.py`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile import-linter==2.17 ml_dtypes==0.6.0 numpy==2.5.5
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile

CONTRACT = """[importlinter]
root_package = shop
include_external_packages = True
[importlinter:contract:no-numpy]
name = No numpy
type = forbidden
source_modules = shop
forbidden_modules = numpy
"""
LOADS = [sys.executable, "-c", "import sys, shop.main; sys.exit('numpy' in sys.modules)"]


def check(files):
    root = pathlib.Path(tempfile.mkdtemp())
    for name, content in {".importlinter": CONTRACT, "shop/__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    options = {"cwd": root, "env": {**os.environ, "PYTHONPATH": str(root)}, "capture_output": True}
    lint = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    kept = subprocess.run(lint, **options).returncode == 0
    return {"kept": kept, "loads": subprocess.run(LOADS, **options).returncode == 1}


room = {"shop/main.py": "import shop.room.a", "shop/room/a.py": "import numpy"}
seen = {
    "by a library": check({"shop/main.py": "import ml_dtypes"}),
    "in a folder without __init__": check(room),
    "in a folder with __init__": check({**room, "shop/room/__init__.py": ""}),
}
print("import-linter", importlib.metadata.version("import-linter"), seen)
assert [found["kept"] for found in seen.values()] == [True, True, False]
assert all(found["loads"] for found in seen.values())
PY
