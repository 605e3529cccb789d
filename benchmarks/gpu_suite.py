"""All that waits for a GPU, in one command: tests, kernel, training step, data pipelines, and the published systems in full.

    python benchmarks/gpu_suite.py --out $OUT --parts tests,kernel,data
    python benchmarks/gpu_suite.py --out $OUT --parts systems --minutes 9

Each part is a process of its own with a log in OUT; what it measured is JSON there. A part that fails or takes too long does
not stop the others. The exit code is the number of parts that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def commands(out: Path) -> dict[str, list[str]]:
    """The parts, in the order of what they tell for their time."""
    here = [sys.executable, str(ROOT / "benchmarks")]
    graph = ["--set=training.graph=true", "--set=training.compile=true", "--suffix=graph"]
    return {
        "kernel": [here[0], f"{here[1]}/kernel.py", "--rounds", "30", "--json", str(out / "kernel-gpu.json")],
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "component", "-k", "gpu", "tests/data", "tests/train"],
        "data": [sys.executable, "-m", "hpc_cifar", "bench", "data", "--json", str(out / "data-gpu.json")],
        "step": [here[0], f"{here[1]}/step.py", "--steps", "100", "--json", str(out / "step-gpu.json")],
        "deep300": [here[0], f"{here[1]}/systems.py", "deep300", *graph, "--json", str(out / "deep300-gpu.json")],
        "restart": [here[0], f"{here[1]}/restart.py", "--gpus", "--processes=1", "--json", str(out / "restart-gpu.json")],
        "systems": [here[0], f"{here[1]}/systems.py", "--json", str(out / "systems-gpu.json")],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and figures; runs lie in OUT/runs")
    parser.add_argument("--parts", default="kernel,tests,step,deep300,data,restart,systems")
    parser.add_argument("--minutes", type=float, default=25, help="for each part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here", file=sys.stderr)
        return 2
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    known = commands(out)
    wanted = [part.strip() for part in options.parts.split(",")]
    if unknown := set(wanted) - set(known):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    environment = {**os.environ, "HPC_CIFAR_RUNS": os.environ.get("HPC_CIFAR_RUNS") or str(out / "runs")}
    failed = 0
    for part in wanted:
        began = time.perf_counter()
        with (out / f"{part}.log").open("w") as log:
            child = subprocess.Popen(
                known[part], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                word = f"exit code {child.wait(60 * options.minutes)}"
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # what it has started, too
                word = f"stopped after {options.minutes:g} minutes, exit code {child.wait()}"
            failed += child.returncode != 0
        lines = (out / f"{part}.log").read_text(errors="replace").splitlines()
        print(f"== {part}: {word}, {time.perf_counter() - began:.0f} s", *lines[-12:], sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
