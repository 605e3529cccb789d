#!/usr/bin/env bash
# Known vulnerabilities of what the lock files name, by pip-audit. Exit code 1 if there are any; where its sources cannot be
# reached, or do not know the packages, it says that nothing was audited.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .venv/bin/uv)
report=$(mktemp)
trap 'rm -f "$report" "$report.log"' EXIT
for lock in requirements.lock requirements-all.lock requirements-dev.lock requirements-build.lock; do
  : >"$report"
  "$uv" tool run --quiet --from "pip-audit==2.10.1" pip-audit --disable-pip --require-hashes --timeout 15 \
    --progress-spinner off --format json --output "$report" --requirement "$lock" >"$report.log" 2>&1 || true
  .venv/bin/python - "$report" "$report.log" "$lock" <<'PYTHON'
import json
import sys
from pathlib import Path

report, log, lock = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
try:
    packages = json.loads(report.read_text())["dependencies"]
except (ValueError, KeyError):
    words = log.read_text().strip().splitlines() or ["no answer"]
    print(f"audit: {lock} was not audited: {words[-1][:200]}")
    sys.exit(0)
known = [package for package in packages if "vulns" in package]
for package in known:
    for found in package["vulns"]:
        fixed = ", ".join(found.get("fix_versions") or []) or "no version"
        print(f"audit: {lock}: {package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
if len(known) < len(packages):
    print(f"audit: {lock}: {len(packages) - len(known)} of {len(packages)} packages are unknown to the index, and were not audited")
if known:
    print(f"audit: {lock}: {len(known)} packages audited")
sys.exit(any(package["vulns"] for package in known))
PYTHON
done
