"""How long a checkpoint at the end of an epoch keeps the training waiting, beside a plain ``torch.save`` of the same state.

    python benchmarks/checkpoint.py --json docs/results/checkpoint-2-cores.json

One training of few images; its epochs end in a checkpoint of ours and in a plain one by turns (which is not even fsynced).
What a whole epoch takes follows from the images per second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hpc_cifar import files, runs
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.packaged import find_job
from hpc_cifar.data import bench
from hpc_cifar.train import loop
from hpc_cifar.train.trainer import Trainer

KINDS = ("ours", "torch.save")


class Compared(Trainer):
    """Notes how long each of its checkpoints keeps it; every other one is a plain one."""

    taken: list[tuple[str, float]]
    state_bytes = 0

    def _save(self, best: bool = False) -> None:
        session = self.session
        number = session.position.epoch
        if not number or number == len(Compared.taken):  # at a stop, or the end
            super()._save(best)
            return
        kind = KINDS[number % 2]
        if self.world.on_gpu:
            torch.cuda.synchronize(self.world.device)
        began = time.perf_counter()
        if kind == "ours":
            super()._save(best)
        elif self.world.main:
            state = {"model": session.network.state_dict(), "optimizer": session.optimizer.state_dict()}
            if session.ema is not None:
                state["ema"] = {"shadow": session.ema.shadow}
            path = self.run.path / "plain.pt"
            torch.save(state, path)
            Compared.state_bytes = path.stat().st_size
        Compared.taken.append((kind, time.perf_counter() - began))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="deep300")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="checkpoints of each kind")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--gpus", action="store_true")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    root = files.data_root().absolute()
    epochs = 2 * options.rounds + 2  # the first two fill caches
    sets = [
        *(f"data.dataset={options.dataset}", f"data.batch_size={options.batch}", "data.micro_batch_size=null"),
        *(f"data.train_images={options.batch * options.steps}", "data.validation=0.01", f"epochs={epochs}"),
        *(f"training.evaluate_every_epochs={epochs}", "training.early_stopping=null", "schedule={name: constant}"),
        *("resources.nodes=1", f"resources.gpus_per_node={int(options.gpus)}", "tracking.wandb=disabled"),
        "checkpoint={every_epochs: 1}",
    ]
    experiment = load_experiment(find_job(options.job), sets)
    Compared.taken = []
    loop.Trainer = Compared  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="hpc-cifar-bench-") as folder:
        run = runs.create(Path(folder), "checkpoint", experiment, {}, {})
        loop.train(run, data_root=root, console=False)
        rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    rate = statistics.median(row["images_per_second"] for row in rows[2:])
    taken = {kind: [round(seconds, 5) for name, seconds in Compared.taken[2:] if name == kind] for kind in KINDS}
    # what is still written while the next epoch has begun costs it a part of the processors
    after = {kind: [row["images_per_second"] for row in rows[2:] if KINDS[(row["epoch"] - 1) % 2] == kind] for kind in KINDS}
    report: dict[str, Any] = {
        "job": options.job, "n": options.rounds, "batch_size": options.batch, "seconds": taken,
        "images_per_second": rate, "images_per_second_after": after, "state_bytes": Compared.state_bytes,
        "device": "cuda" if options.gpus else "cpu",
        "hardware": bench.hardware(), "versions": bench.versions(),
    }  # fmt: skip
    print("\n".join(table(report)))
    if options.json:
        files.write_json(options.json.absolute(), report)
    return 0


def table(report: dict[str, Any]) -> list[str]:
    epoch = 50_000 / report["images_per_second"]
    lines = [
        f"`{report['job']}`, {report['state_bytes'] / 1e6:.1f} MB of state, {report['images_per_second']:,.0f} images/s: "
        f"an epoch of 50,000 images takes {epoch:,.1f} s.",
        "",
        "| checkpoint | ms without a step, median (least to most) | of an epoch | images/s of the steps after it |",
        "|---|---|---|---|",
    ]
    for kind, seconds in report["seconds"].items():
        ms = [1000 * value for value in seconds]
        after = statistics.median(report["images_per_second_after"][kind])
        share = statistics.median(seconds) / epoch
        lines.append(f"| {kind} | {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}) | {share:.3%} | {after:,.0f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
