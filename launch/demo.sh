#!/usr/bin/env bash
# Sets up the environment, then shows a rank being killed under load and coming back.
# Writes timeline.png here. Further flags go to launch.local, such as --demo_out=DIR.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/launch/environment.sh"
make_environment plots
exec "$PYTHON" -m launch.local --config=tiny_cpu --demo "$@"
