"""``make test`` and ``make test-full``: pytest in sessions that do not disturb each other, one after the other.

The test clusters, on this machine's version of Slurm and on others (slurm/testbed/roots.py); the other tests, spread over the
processors; what measures times, with the machine for itself. A table at the end says how long each took. With --full every
version runs all tests of Slurm, and the table becomes docs/results/test-full.json: a row for each session that passed, and the
names of those that are missing. With --only the named sessions alone run and take the place of their rows there: each row says
at which commit it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "slurm" / "testbed"))

import roots  # noqa: E402

# where versions differ: what preemption, time limits, arrays, cancels and checks of nodes do, and what Slurm says
CELLS = ("preemption", "limits", "truth", "arrays", "preflight", "versions")
CLUSTERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")  # their jobs wait for much else than a processor
ALWAYS = "24.11"  # must be had where the test cluster can run
RESULTS = ROOT / "build" / "tests"


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of pytest; ``components`` is what of HPC_CIFAR_REQUIRE it can exercise."""

    name: str
    arguments: tuple[str, ...]
    components: frozenset[str]
    version: str | None = None  # of Slurm, in its root

    def run(self, required: set[str], missing: str) -> dict[str, object]:
        """Its exit code, minutes, and number of tests by outcome."""
        report = RESULTS / f"{self.name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        os.environ |= {
            "HPC_CIFAR_REQUIRE": ",".join(sorted(required & self.components)),
            "HPC_CIFAR_NOT_EXERCISED": missing,
        }
        command = [str(ROOT / ".venv/bin/python"), "-m", "pytest", *self.arguments, f"--junitxml={report}"]
        began = time.monotonic()
        if self.version is None:
            code = subprocess.run(command, check=False, cwd=ROOT).returncode
        else:
            code = roots.within(roots.Root(self.version), command)
        outcome = {"exit code": code, "minutes": round((time.monotonic() - began) / 60, 1)}
        return outcome | (counts(report) if report.exists() else {})


def counts(report: Path) -> dict[str, int]:
    [suite] = xml.parse(report).getroot().iter("testsuite")
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"passed": found["tests"] - found["failures"] - found["errors"] - found["skipped"], **found}


def sessions(full: bool, versions: list[str]) -> list[Session]:
    """In the order in which they run; ``versions`` are those of which there is a root."""
    here = frozenset({"slurm", "accounting", "modules", f"slurm-{roots.host_version()}"})
    made = [Session(f"slurm {roots.host_version() or 'here'}", ("tests/slurm", "-m", "not alone", *CLUSTERS), here)]
    files = ("tests/slurm",) if full else tuple(f"tests/slurm/test_{name}.py" for name in CELLS)
    for version in versions:
        there = frozenset({"slurm", f"slurm-{version}"} | ({"accounting"} if full else set()))
        made.append(Session(f"slurm {version}", (*files, "-m", "not alone", *CLUSTERS), there, version))
        if full:
            alone = ("tests/slurm", "-m", "alone")
            made.append(Session(f"slurm {version} alone", alone, frozenset({"slurm"}), version))
    workers = min(8, len(os.sched_getaffinity(0)))  # one a processor: each imports torch
    others = ("ffcv", "dali", "wandb", "browser", "gpu", "archive", "users", "root")
    spread = ("--ignore", "tests/slurm", "-m", "not alone", "-n", str(workers), "--dist", "worksteal")
    made.append(Session("others", spread, frozenset(others)))
    made.append(Session("alone", ("-m", "alone"), frozenset({"slurm", "browser"})))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all tests of Slurm on every version")
    parser.add_argument("--only", action="append", metavar="SESSION", help="this session alone; may be repeated")
    options = parser.parse_args()
    full = options.full
    required = set(os.environ.get("HPC_CIFAR_REQUIRE", "").replace(",", " ").split())
    missing = {}
    for version in roots.SUITES:
        if version == roots.host_version():
            continue
        try:
            roots.Root(version).make()
        except roots.CannotBeHad as error:
            missing[version] = str(error).replace("\n", " ")
    versions = [version for version in roots.SUITES if version not in (*missing, roots.host_version())]
    RESULTS.mkdir(parents=True, exist_ok=True)
    told = "\n".join(f"slurm-{version}={why}" for version, why in missing.items())
    chosen, at = sessions(full, versions), commit()
    if unknown := set(options.only or ()) - {each.name for each in chosen}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: the sessions are {', '.join(each.name for each in chosen)}")
    table = {each.name: each.run(required, told) for each in chosen if options.only is None or each.name in options.only}

    print(f"\n{'session':20} minutes  passed  failed  skipped")
    for name, row in table.items():
        failed = [int(str(row.get(key, 0))) for key in ("failures", "errors")]
        word = "" if row["exit code"] == 0 else f"  FAILED with exit code {row['exit code']}"
        print(f"{name:20} {row['minutes']:7}  {row.get('passed', 0):6}  {sum(failed):6}  {row.get('skipped', 0):7}{word}")
    bad = any(row["exit code"] != 0 for row in table.values())
    for version, why in missing.items():
        here = os.geteuid() == 0 and shutil.which("apt-get") is not None
        needed = f"slurm-{version}" in required or (version == ALWAYS and here)
        print(f"slurm {version:14} {'FAILED, it must be had' if needed else 'not exercised'}: {why}")
        bad = bad or needed
    if full:
        rows = {name: {**row, "commit": at} for name, row in table.items()}
        write(chosen, rows, versions, [f"slurm {version}" for version in missing], keep=options.only is not None)
    return int(bad)


def write(
    chosen: list[Session], table: dict[str, dict[str, object]], versions: list[str], without: list[str], *, keep: bool
) -> None:
    """Sessions that passed become rows of docs/results/test-full.json; ``keep``: those of sessions that did not run stay."""
    path = ROOT / "docs" / "results" / "test-full.json"
    before = json.loads(path.read_text())["sessions"] if keep and path.exists() else {}
    good = {name: row for name, row in table.items() if row["exit code"] == 0}
    rows = {name: row for name, row in (before | good).items() if name in good or name not in table}
    found = {
        "cores": len(os.sched_getaffinity(0)),
        "slurm": slurms(versions),
        "missing": [name for name in (*(each.name for each in chosen), *without) if name not in rows],
        "sessions": {each.name: rows[each.name] for each in chosen if each.name in rows},
    }
    path.write_text(json.dumps(found, indent=2) + "\n")


def commit() -> str:
    """What was tested; "" outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def slurms(versions: list[str]) -> dict[str, str]:
    """The exact packages, by version."""
    return {version: roots.Root(version).stamp()["slurmctld"] for version in versions}


if __name__ == "__main__":
    sys.exit(main())
