"""What W&B costs a training: disabled, beside a server that answers, and beside one that takes every request and never answers.

    python benchmarks/tracking.py --rounds 5 --json docs/results/tracking-2-cores.json --set epochs=200

The seconds are those from the first step to the last epoch's end, by the run's own metrics; kinds take turns in every round,
and begin it by turns. The start of the client falls into them, so a training should last a minute at least.
The training has half the processors, so that what the rest of the machine does disturbs it less; the client and the server have
the others, as a client has on a cluster. The servers are those of the tests, on loopback; the client is the real one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hpc_cifar import files
from hpc_cifar.data import bench

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import wandb_server  # noqa: E402

KINDS = ("disabled", "online", "hanging")


def seconds(folder: Path, kind: str, job: str, sets: list[str], threads: int) -> float:
    """Of one training."""
    with wandb_server.serving() as server:
        if kind == "hanging":
            server.trouble = lambda what, number: wandb_server.HANG
        mode = "disabled" if kind == "disabled" else "online"
        command = [sys.executable, "-m", "hpc_cifar", "train", job, "--name", kind]
        for change in (*sets, f"tracking.wandb={mode}"):
            command += ["--set", change]
        environment = {**os.environ, **server.environment, "HPC_CIFAR_RUNS": str(folder), "HPC_CIFAR_THREADS": str(threads)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = files.read_json_lines(folder / kind / "metrics.jsonl")
        [begin] = [row["time"] for row in rows if row.get("event") == "first step"]
        end = max(row["time"] for row in rows if row["kind"] == "epoch")
        if kind == "online":
            [kept] = server.runs.values()
            curves = [row for row in rows if row["kind"] != "event"]
            shown = [row for row in kept.history if "global_step" in row]  # the others are pictures
            assert len(shown) == len(curves), f"it has {len(shown)} of {len(curves)} rows"
    return float(end - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="quickstart-digits")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a.b=value for all of them")
    parser.add_argument("--rounds", type=int, default=5)
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=max(1, cpus // 2), help="of the training")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind in (*KINDS[number % len(KINDS) :], *KINDS[: number % len(KINDS)]):
            with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as folder:
                found = seconds(Path(folder), kind, options.job, options.sets, options.threads)
            if number:  # a first round fills caches
                taken[kind].append(round(found, 3))
    report: dict[str, Any] = {"job": options.job, "set": options.sets, "threads": options.threads}
    report |= {"n": options.rounds, "seconds": taken}
    ratios = {k: [x / y for x, y in zip(taken[k], taken["disabled"], strict=True)] for k in KINDS[1:]}
    report |= {"ratio": {k: round(statistics.median(values), 4) for k, values in ratios.items()}}
    report |= {"hardware": bench.hardware(), "versions": bench.versions()}
    for kind in KINDS:
        values = taken[kind]
        print(f"{kind:9} {statistics.median(values):7.2f} s ({min(values):.2f} to {max(values):.2f}, n = {len(values)})")
    print("median ratio to disabled: " + ", ".join(f"{kind} {value:.3f}" for kind, value in report["ratio"].items()))
    if options.json:
        files.write_json(options.json.absolute(), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
