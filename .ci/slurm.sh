#!/usr/bin/env bash
# Installs SLURM for tests/slurm where that is possible; else those tests skip, and this says why.
set -u
missing="" wait=(timeout --kill-after=10 300)
for program in slurmctld slurmd munged sbatch; do
  command -v "$program" > /dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then
  echo "SLURM is installed: tests/slurm runs"
elif [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/slurm skips: without$missing, and installing them needs root and apt-get"
elif export DEBIAN_FRONTEND=noninteractive
  ! { "${wait[@]}" apt-get update -qq &&
    "${wait[@]}" apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2; } > /tmp/eep-apt.log 2>&1; then
  echo "tests/slurm skips: slurm-wlm and munge cannot be installed: $(tail -n 1 /tmp/eep-apt.log)"
else
  echo "SLURM was installed: tests/slurm runs"
fi
