#!/usr/bin/env bash
# `make unit` on every supported Python, each in a copy of this checkout with an environment of its own, in build/unit/.
# PYTHONS="python3.12 /path/to/python3.13": which; TORCH=2.11: with that release of torch instead of the lock's.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra pythons <<<"${PYTHONS:-python3.11 python3.12 python3.13}"
failed=()
for python in "${pythons[@]}"; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  copy=build/unit/$version${TORCH:+-torch-$TORCH}
  echo "== Python $version${TORCH:+, torch $TORCH}: $copy"
  mkdir -p "$copy"
  # the environment stays from one time to the next, the files do not
  find "$copy" -mindepth 1 -maxdepth 1 -not -name .venv -exec rm -rf {} +
  git ls-files --cached --others --exclude-standard | while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
    tar -cf - -T - | tar -xf - -C "$copy"
  if [ -n "${TORCH:-}" ]; then
    make -C "$copy" env-dev PYTHON="$(command -v "$python")"
    "$copy/.venv/bin/uv" pip install --quiet --no-config --python "$copy/.venv" "torch==$TORCH.*" torchvision
  fi
  make -C "$copy" unit PYTHON="$(command -v "$python")" || failed+=("$version")
done
[ ${#failed[@]} = 0 ] || { echo "unit: failed on Python ${failed[*]}" >&2; exit 1; }
