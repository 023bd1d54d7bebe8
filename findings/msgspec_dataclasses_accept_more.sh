#!/usr/bin/env bash
# Package: msgspec 0.23.0
# Seen: Decoding into a dataclass ignores unknown fields, and a message may set a field declared
#   with `init=False`, because msgspec fills the instance without calling `__init__`. A tagged
#   Struct decoded by itself accepts a message without its tag.
# Expected: `forbid_unknown_fields` for dataclasses as for Struct, derived fields out of reach of
#   messages, and a missing tag refused as a wrong one is.
# Instead: Use `msgspec.Struct` with `forbid_unknown_fields=True` for messages, compute derived
#   values in `__post_init__`, and check the tag where a message stands alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in ${PYTHON:-python3.12 python3.13 python3}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
    python=
done
"${python:?needs Python 3.12 or newer: set PYTHON}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile msgspec==0.23.0
"$work/venv/bin/python" - <<'PY'
import dataclasses
import msgspec


@dataclasses.dataclass
class Lease:
    seconds: int = 1
    milliseconds: int = dataclasses.field(init=False, default=1000)


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    seconds: int = 1


class Tagged(msgspec.Struct, tag="lease"):
    seconds: int


def decode(text, kind):
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        return str(error)


lease = decode('{"seconds": 2, "milliseconds": 7, "secnods": 9}', Lease)
strict = decode('{"seconds": 2, "secnods": 9}', Strict)
untagged = decode('{"seconds": 2}', Tagged)
mistagged = decode('{"seconds": 2, "type": "vote"}', Tagged)
print(f"msgspec {msgspec.__version__}: {lease}; {strict}; {untagged}; {mistagged}")
assert dataclasses.astuple(lease) == (2, 7) and "secnods" in strict
assert untagged == Tagged(2) and "vote" in mistagged
PY
