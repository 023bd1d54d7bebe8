#!/usr/bin/env bash
# Sets up the environment with the test extra, then lints and runs the tests. Arguments go to pytest.
# --quick first: only the tests of tests/quick.txt (two minutes), which need no other process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment test
bin="$(dirname "$PYTHON")"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/lint-imports" --no-cache
if [ "${1:-}" = "--quick" ]; then
  set -- @tests/quick.txt "${@:2}"
fi
exec "$PYTHON" -m pytest "$@"
