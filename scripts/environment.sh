#!/usr/bin/env bash
# Make .venv hold exactly what a lock file says, and this checkout: environment.sh base|dev
# Fast when nothing changed: a stamp in .venv keeps the digest of what it was made from.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:?base or dev}
venv=.venv
say() { echo "environment: $*" >&2; }
fail() { say "$*"; exit 1; }

# -- which Python ------------------------------------------------------------------------------------------------------
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
supported() { case $(version_of "$1") in 3.11 | 3.12 | 3.13) true ;; *) false ;; esac }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is Python '$(version_of "$PYTHON")'; 3.11, 3.12 or 3.13 is needed"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11, 3.12 or 3.13 is needed; python3 is '$(version_of python3)'." \
    "Install one, or name it: make $want PYTHON=/path/to/python3.12"
}

# -- what ffcv, the only package that is compiled, needs -----------------------------------------------------------------
can_build_ffcv() { command -v g++ && pkg-config --exists opencv4 libturbojpeg; } >/dev/null 2>&1

case $want in
  base) lock=requirements.lock ;;
  dev) lock=requirements-dev.lock ;;
  *) fail "'$want' is neither base nor dev" ;;
esac

digest_of() { # LOCK VARIANT
  { cat "$1" requirements-build.lock pyproject.toml; echo "$2 $PWD $("$venv/bin/python" -V 2>&1)"; } | sha256sum | cut -c1-64
}
stamped() { # NAME DIGEST
  [ "$(cat "$venv/.made-from-$1" 2>/dev/null)" = "$2" ]
}

exec 9<"$lock"
flock 9 # two makes at once: the second waits and finds the work done

if [ -e "$venv" ] && ! supported "$venv/bin/python"; then
  say "$venv is broken or of an unsupported Python: making it anew"
  rm -rf "$venv"
elif [ -e "$venv" ] && [ -n "${PYTHON:-}" ] && [ "$(version_of "$venv/bin/python")" != "$(version_of "$PYTHON")" ]; then
  find_python >/dev/null
  say "$venv has Python $(version_of "$venv/bin/python"), PYTHON=$PYTHON has $(version_of "$PYTHON"): making it anew"
  rm -rf "$venv"
fi

variant=whole
if [ "$want" = dev ] && ! can_build_ffcv; then variant=without-ffcv; fi
if [ -e "$venv" ]; then
  if stamped "$want" "$(digest_of "$lock" "$variant")"; then exit 0; fi
  if [ "$want" = base ]; then # the environment of the tests holds everything that the base one does
    for kind in whole without-ffcv; do
      if stamped dev "$(digest_of requirements-dev.lock $kind)"; then exit 0; fi
    done
  fi
fi

python=$(find_python)
uv=$(command -v uv || true)
if [ ! -e "$venv" ]; then
  say "creating $venv with Python $(version_of "$python")"
  if [ -n "$uv" ]; then
    "$uv" venv --quiet --no-project --python "$python" "$venv"
  else
    "$python" -m venv "$venv" || {
      rm -rf "$venv"
      fail "'$python -m venv' failed: install Python's venv module (Debian: apt-get install python3-venv) or uv"
    }
  fi
fi
rm -f "$venv"/.made-from-*

# uv does in a minute or two what takes pip ten: where it is missing, it is fetched, with the hash that the lock file has of it.
# It knows nothing of pip's own configuration, so that pip does it where uv finds no index.
fetched= told=
if [ -z "$uv" ]; then
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
  pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
  only_uv=$(mktemp)
  awk '/^[^ ]/ {keep = /^uv==/} keep' requirements-dev.lock >"$only_uv"
  if pip_install --require-hashes --only-binary :all: --upgrade --target "$venv/.uv" -r "$only_uv" >/dev/null 2>&1; then
    uv=$venv/.uv/bin/uv fetched=yes
  fi
  rm -f "$only_uv"
fi
install() { # by uv; by pip if there is none, or if the one that was fetched cannot
  if [ -n "$uv" ]; then
    "$uv" pip install --quiet --no-config --python "$venv/bin/python" --no-deps "$@" && return
    [ -n "$fetched" ] || fail "uv could not install it"
    uv= fetched=
  fi
  [ -n "$told" ] || say "pip does it, which takes some minutes"
  told=yes
  pip_install "$@"
}

say "installing $lock"
install --require-hashes --only-binary :all: -r requirements-build.lock
if [ "$want" = base ]; then
  install --require-hashes --only-binary :all: -r "$lock"
else
  if [ "$variant" = without-ffcv ]; then
    say "ffcv is left out: it needs g++, pkg-config, libopencv-dev and libturbojpeg0-dev to be built"
    wanted=$(mktemp)
    trap 'rm -f "$wanted"' EXIT
    awk '/^[^ ]/ {keep = !/^ffcv==/} keep' "$lock" >"$wanted"
  else
    wanted=$lock
  fi
  LDFLAGS=-Wl,--as-needed install --require-hashes --no-build-isolation -r "$wanted"
fi
install --no-build-isolation --no-index --editable .

if [ -n "$uv" ]; then
  # once here, as pip does it: where bytecode is not kept (PYTHONDONTWRITEBYTECODE, a read-only disk) every start would
  # compile torch's sources again, for some five seconds
  "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true # some packages hold templates, not Python
fi

digest_of "$lock" "$variant" >"$venv/.made-from-$want"
say "ready"
