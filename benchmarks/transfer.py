"""What pretrained weights are worth on few images: a frozen backbone beside itself with random weights, and beside networks
trained from scratch.

    python benchmarks/transfer.py --json docs/results/transfer-2-cores.json

Every network sees the same images, those of ``data.train_images`` in the job of the backbone. One that is trained from
scratch is given as many epochs as fit into the backbone's time on this machine (its features, its epochs and its test), as its
own first epochs took, and no more steps than its source made; one that cannot make an epoch in that time makes one. Run it
alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from systems import JOBS, from_scratch, train
from systems_record import measured

from hpc_cifar import files
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.load import load_experiment
from hpc_cifar.data import bench
from hpc_cifar.errors import ConfigError
from hpc_cifar.runs import Run

PROBE = 2  # epochs by which the time of one is told; the first of them is not counted


def one(name: str, run: str, sets: list[str]) -> dict[str, Any] | None:
    """Figures of a run to its end; None if it could not be trained."""
    if not train(JOBS / f"{name}.yaml", run, sets):
        return None
    return measured(Run(files.runs_root() / run)) | {"job": name, "set": sets}


def epoch_seconds(name: str, sets: list[str]) -> float | None:
    """Seconds of an epoch with its validation, without start and test."""
    run = f"{name}-probe"
    if not train(JOBS / f"{name}.yaml", run, with_epochs(name, sets, PROBE)):
        return None
    times = [row["time"] for row in files.read_json_lines(Run(files.runs_root() / run).metrics_file) if row["kind"] == "epoch"]
    return float(times[-1] - times[0]) / (PROBE - 1)


def with_epochs(name: str, sets: list[str], count: int) -> list[str]:
    """So many epochs; at a constant rate where they are fewer than the job's schedule has stages for."""
    changes = [*sets, f"epochs={count}"]
    try:
        load_experiment(JOBS / f"{name}.yaml", changes)
    except ConfigError:
        return [*changes, "schedule={name: constant}"]
    return changes


def epochs_in(seconds: float, epoch_s: float, experiment: Experiment, share: float) -> int:
    """Epochs that fit; at most the steps of the source, whose epochs were ``1 / share`` times as long."""
    return max(1, min(int(seconds / epoch_s), round(experiment.epochs / share)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help="networks trained from scratch; every published one unless some are named")
    parser.add_argument("--backbone", default="effnet-lite0", help="job of the frozen backbone")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a.b=value for all of them")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--add", action="store_true", help="keep the other networks of that file; the backbone is timed again")
    options = parser.parse_args()
    before = (files.read_json(options.json) or {}) if options.add and options.json else {}
    backbone: Experiment = load_experiment(JOBS / f"{options.backbone}.yaml", options.sets)
    same = [f"data.train_images={backbone.data.train_images}", f"data.dataset={backbone.data.dataset}", *options.sets]
    if before and before["images"] != backbone.data.train_images:
        parser.error(
            f"--add: {options.json} is of {before['images']} images, {options.backbone} of {backbone.data.train_images}"
        )
    trained = one(options.backbone, options.backbone, options.sets)
    untrained = before.get("random weights") or one(
        options.backbone, f"{options.backbone}-random", [*options.sets, "model.weights=null"]
    )
    if trained is None or untrained is None:
        return 1
    names = options.jobs or from_scratch()
    results = {
        "images": backbone.data.train_images,
        "pretrained": trained,
        "random weights": untrained,
        "from scratch": [row for row in before.get("from scratch", []) if row["job"] not in names],
        "hardware": bench.hardware(),
        "versions": bench.versions(),
    }
    failed = []
    for name in names:
        experiment = load_experiment(JOBS / f"{name}.yaml", same)
        epoch_s = epoch_seconds(name, same)
        found = None
        if epoch_s is not None:
            count = epochs_in(trained["seconds"], epoch_s, experiment, (backbone.data.train_images or 50_000) / 50_000)
            found = one(name, f"{name}-few", with_epochs(name, same, count))
        if found is None:
            failed.append(name)
        else:
            results["from scratch"].append(found)
        if options.json:
            files.write_json(options.json.absolute(), results)
    for entry in (trained, untrained, *results["from scratch"]):
        print(f"{entry['job']:30} {entry['epochs']:4} epochs {entry['seconds']:6.0f} s  test {entry['test_accuracy']:.2%}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
