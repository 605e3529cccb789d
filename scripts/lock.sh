#!/usr/bin/env bash
# Regenerate the four lock files from pyproject.toml. Pins stay as they are unless UPGRADE=1.
#   requirements-dev.lock    everything: the package, ffcv, DALI, TensorBoard, test tools
#   requirements-all.lock    the package, ffcv, DALI and TensorBoard: what the container holds; the same versions
#   requirements.lock        what the package needs to run; the same versions, all of them wheels
#   requirements-build.lock  what builds the package itself and ffcv
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || true)
[ -n "$uv" ] || uv=.venv/bin/uv
[ -x "$uv" ] || { echo "lock: uv is missing; run 'make test' once (it brings uv) or install uv" >&2; exit 1; }

compile() { # OUTPUT ARGUMENT...
  local output=$1
  shift
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
    --no-annotate ${UPGRADE:+--upgrade} --output-file "$output" "$@"
  if grep -nE '://|^-' "$output" >&2; then
    echo "lock: $output must not name a registry" >&2
    exit 1
  fi
  echo "$output: $(grep -c '==' "$output") packages"
}

compile requirements-dev.lock pyproject.toml --extra ffcv --extra dali --extra tensorboard --extra dev --group build
compile requirements-all.lock pyproject.toml --extra ffcv --extra dali --extra tensorboard --constraint requirements-dev.lock
compile requirements.lock pyproject.toml --only-binary :all: --constraint requirements-dev.lock
compile requirements-build.lock --group build --only-binary :all: --constraint requirements-dev.lock
