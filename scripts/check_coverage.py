"""Fail where too few branches were taken, or a module was never imported: check_coverage.py coverage.json PERCENT"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(report: str, least: str) -> int:
    found = json.loads(Path(report).read_text())
    totals = found["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    modules = {str(path) for path in Path("hpc_cifar").rglob("*.py") if path.stat().st_size}
    unseen = sorted(modules - set(found["files"]))
    print(f"coverage: {percent:.1f} % of {totals['num_branches']:,} branches, {float(least):g} % are wanted")
    if unseen:
        print(f"coverage: never imported: {', '.join(unseen)}")
    return int(percent < float(least) or bool(unseen))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
