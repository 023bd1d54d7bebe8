#!/usr/bin/env bash
# Sets up the environment with the test extra, then lints and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment test
bin="$(dirname "$PYTHON")"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-cache
exec "$PYTHON" -m pytest "$@"
