# Creates the virtual environment of this repository: source it, then call `make_environment [extra,...]`.
# Sets PYTHON to its interpreter. Needs any Python >= 3.12 with venv; nothing else.

_usable() { "$@" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
  local name version
  for name in python3.13 python3.12 python3.14 python3 python; do
    if command -v "$name" >/dev/null 2>&1 && _usable "$name"; then command -v "$name"; return; fi
  done
  if command -v pyenv >/dev/null 2>&1; then
    for version in $(pyenv versions --bare 2>/dev/null | grep -E '^3\.1[2-9]' | sort -rV); do
      name="$(pyenv prefix "$version" 2>/dev/null)/bin/python3"
      if _usable "$name"; then echo "$name"; return; fi
    done
  fi
  cat >&2 <<'TEXT'
No Python >= 3.12 with the venv module was found (looked for python3.13, python3.12, python3.14, python3,
python, and through `pyenv prefix`). One of these installs it:
  Debian 13, Ubuntu 24.04 or newer:   apt-get install python3 python3-venv
  any Linux or macOS with pyenv:      pyenv install 3.13
  with uv:                            uv python install 3.13, and put it on PATH
TEXT
  return 1
}

make_environment() {
  local extra="${1:-}" root stamp wanted found
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  PYTHON="$root/.venv/bin/python"
  wanted="$(cksum < "$root/pyproject.toml") $root"
  for stamp in "$root/.venv/installed-test" "$root/.venv/installed-$extra"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && _usable "$PYTHON"; then return 0; fi
  done
  found="$(find_python)" || return 1
  echo "making $root/.venv with $("$found" --version) ${extra:+and the extra '$extra'}" >&2
  if ! _usable "$PYTHON" || [ "$(cat "$root/.venv/made-at" 2>/dev/null)" != "$root" ]; then
    rm -rf "$root/.venv"
    "$found" -m venv "$root/.venv" || return 1
    echo "$root" > "$root/.venv/made-at"
  fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}" || return 1
  echo "$wanted" > "$root/.venv/installed-$extra"
}
