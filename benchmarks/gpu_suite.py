"""All that waits for a GPU, in slices of at most eight minutes, the most valuable first.

    python benchmarks/gpu_suite.py --out OUT                        every slice that is not done yet
    python benchmarks/gpu_suite.py --out OUT --budget 9             as many as fit into nine minutes
    python benchmarks/gpu_suite.py --out OUT --parts tests,kernel
    python benchmarks/gpu_suite.py --out OUT --miniature            on any machine: shows that every slice runs

Copy OUT/*.json and OUT/curves to docs/results and type ``make figures``: trainings have been added to the figures that were
there. OUT and HPC_CIFAR_RUNS should lie where they stay between two calls, since trainings go on from their checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import suite
import torch
from suite import main, package, script
from systems import from_scratch, with_claim

COMPILED = ("--set=training.compile=true",)
GRAPH = ("--set=training.graph=true", *COMPILED)
TESTS = ("-v", "--tb=short", "--timeout=150", "-n", "6")  # so that a test that hangs is named, and costs no slice
SLICES = 3  # of the published systems
PUBLISHED = suite.ROOT / "published"  # what benchmarks/published.py says is cloned; not part of this project


def trained(out: Path, name: str, *jobs: str, options: tuple[str, ...] = (), small: bool = False) -> list[str]:
    """Whole trainings of some jobs, into one file of figures."""
    return script("systems", *jobs, *options, *(suite.TRAINING if small else ()), json=out / f"{name}-gpu.json")


def published(out: Path, name: str, *options: str) -> list[str]:
    """A record script beside the recipes."""
    return script("published", str(PUBLISHED / f"{name}.py"), *options, json=out / "published-gpu.json")


def parts(out: Path, small: bool) -> dict[str, list[str]]:
    scratch = from_scratch()
    pretrained = [name for name in with_claim() if name not in scratch]
    graph, compiled = ((), ()) if small else (GRAPH, COMPILED)  # a processor takes a minute to compile
    if small:
        scratch = scratch[:SLICES]
    five, twenty = (f"--seeds={1 if small else count}" for count in (5, 20))
    steps = suite.STEP if small else ("--steps=30",)
    restarts = suite.RESTART if small else ("--gpus", "--processes=1")
    checkpoint = suite.CHECKPOINT if small else ("--batch-size=1024", "--steps=40")
    bench = suite.DATA if small else ("--rounds=5",)
    scaling = suite.SCALING if small else ("--steps=20", *graph)
    found = {
        "kernel": script("kernel", "--rounds=30", json=out / "kernel-gpu.json"),
        "tests": [sys.executable, "-m", "pytest", *TESTS, "-m", "component", "-k", "gpu", "tests/data", "tests/train"],
        "step": script("step", *steps, json=out / "step-gpu.json"),
        "deep300": trained(out, "recipes", "deep300", options=(*graph, "--suffix=graph"), small=small),
        "speed94": trained(out, "recipes", "speed94", options=(*graph, twenty), small=small),
        "published": published(out, "airbench94_muon"),
        "tuned": trained(out, "recipes", "deep300-tuned", options=graph, small=small),
        "data": package("bench", "data", *bench, json=out / "data-gpu.json"),
        "restart": script("restart", *restarts, json=out / "restart-gpu.json"),
        "checkpoint": package("bench", "checkpoint", "deep300", *checkpoint, json=out / "checkpoint-gpu.json"),
        **{f"systems-{1 + slice}": trained(out, "systems", *scratch[slice::SLICES], small=small) for slice in range(SLICES)},
        "speed96": trained(out, "recipes", "speed96", options=(*graph, twenty), small=small),
        "published96": published(out, "airbench96_faster", "--runs=3"),
        "deep300-5": trained(out, "recipes", "deep300", options=(*graph, five, "--suffix=graph"), small=small),
        "tuned-5": trained(out, "recipes", "deep300-tuned", options=(*graph, five), small=small),
        "large-batch": trained(out, "recipes", "deep300-large-batch", options=compiled, small=small),
        "resnet18": trained(out, "recipes", "resnet18", options=graph, small=small),
        "pretrained": trained(out, "systems", *pretrained, small=small),
        "scaling": package("bench", "step", "deep300", *scaling, json=out / "scaling-gpu.json"),
    }  # fmt: skip
    if small and not torch.cuda.is_available():
        # a GPU's own code; weights and scripts that may be missing
        for part in ("kernel", "tests", "pretrained", "published", "published96"):
            del found[part]
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available() and not {"--miniature", "--list", "--help", "-h"} & set(sys.argv):
        print("torch sees no GPU here; --miniature shows that the suite runs", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(__doc__, parts, minutes=8))
