"""A real campaign on a real Slurm cluster on this machine: several systems, several seeds, one report.

    HPC_CIFAR_DATA=data python benchmarks/campaign.py ann-1 ann-3 quickstart --seeds 3 --out build/campaign.html

Brings up a test cluster (root), submits the jobs as one campaign, waits, evaluates the best run and writes the report. The data
is prepared beforehand (``hpc-cifar prepare cifar10``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpc_cifar import files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

WIDTHS = (390, 1440)
NEXT = (
    """new Promise(done => { document.querySelector('.plot:not([data-drawn])')?.scrollIntoView(); setTimeout(done, 300); })"""
)
CLUSTER = ROOT / "slurm" / "testbed" / "cluster.py"
PROFILE = """\
executor: slurm
partition: mid
gpu_request: none
cpus_per_process: 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help="names in jobs/")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--limit", type=int, default=2, help="runs at once")
    parser.add_argument("--name", default="campaign", help="of the campaign")
    parser.add_argument("--out", type=Path, required=True, help="the report, HTML")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-") as kept:
        folder, out = Path(kept), options.out.absolute()
        out.parent.mkdir(exist_ok=True)
        (folder / "testbed.yaml").write_text(PROFILE)
        subprocess.run([sys.executable, str(CLUSTER), "up", "--dir", str(folder / "c")], check=True)
        try:
            environment = {**os.environ, "SLURM_CONF": str(folder / "c" / "slurm.conf"), "PYTHONPATH": str(ROOT)}
            environment.setdefault("HPC_CIFAR_RUNS", str(folder / "runs"))
            environment["HPC_CIFAR_DATA"] = str(files.data_root())

            def typed(*arguments: str) -> int:
                command = [sys.executable, "-m", "hpc_cifar", *arguments]
                return subprocess.run(command, env=environment, cwd=folder, check=False).returncode

            many = ["--seeds", str(options.seeds), "--array-limit", str(options.limit), "--campaign", options.name]
            failed = typed("submit", *options.jobs, "--cluster", "./testbed.yaml", *many, "--wait")
            typed("list", "--campaign", options.name)
            report = ("report", "--campaign", options.name)
            failed |= typed(*report, "--evaluate", "-o", str(out))
            for form in ("md", "json"):
                typed(*report, "--format", form, "-o", str(out.with_suffix(f".{form}")))
        finally:
            subprocess.run([sys.executable, str(CLUSTER), "down", "--dir", str(folder / "c")], check=False)
    look(out)
    return failed


def look(page: Path) -> None:
    """The whole page as pictures beside it, on a phone and on a desk, where there is a browser."""
    program = browser.find()
    if program is None:
        print("no browser here: no pictures", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="browser-") as profile:
        for width in WIDTHS:
            with browser.Browser(program, Path(profile)).open(page, width) as shown:
                shown.evaluate("[...document.querySelectorAll('.plot')].forEach(plot => plot.scrollIntoView())")
                left = "document.querySelectorAll('.plot:not([data-drawn])').length"
                deadline = time.monotonic() + 60
                while shown.evaluate(left) and time.monotonic() < deadline:
                    shown.evaluate(NEXT)
                shown.evaluate("window.scrollTo(0, 0)")
                shown.screenshot(page.with_name(f"{page.stem}-{width}.png"), whole=True)


if __name__ == "__main__":
    sys.exit(main())
