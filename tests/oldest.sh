#!/usr/bin/env bash
# Lowers and checks the kernels under the oldest JAX that pyproject.toml allows, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment test
oldest="$(sed -n 's/.*"jax>=\([0-9.]*\),.*/\1/p' pyproject.toml | head -1)"
place=".venv/jax-$oldest"
if [ ! -d "$place" ]; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$place.part" \
    "jax==$oldest" "jaxlib==$oldest"
  mv "$place.part" "$place"
fi
PYTHONPATH="$place" "$PYTHON" -c "import jax; assert jax.__version__ == '$oldest', jax.__version__"
PYTHONPATH="$place" exec "$PYTHON" -m pytest tests/pallas_kernels "$@"
