"""How long a checkpoint at the end of an epoch keeps the training waiting, beside a plain ``torch.save`` of the same state.

One training of few images; its epochs end in a checkpoint of ours and in a plain one by turns (which is not even fsynced).
What a whole epoch takes follows from the images per second.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .. import files, runs
from ..config.experiment import Experiment
from ..config.load import load_experiment
from . import loop
from .trainer import Trainer

KINDS = ("ours", "torch.save")
EPOCH_IMAGES = 50_000


class Compared(Trainer):
    """Notes how long each of its checkpoints keeps it; every other one is a plain one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[tuple[str, float]] = []
        self.state_bytes = 0

    def _save(self, best: bool = False) -> None:
        number = self.session.position.epoch
        if not number or number == len(self.taken):  # at a stop, or the end
            super()._save(best)
            return
        kind = KINDS[number % 2]
        if self.world.on_gpu:
            torch.cuda.synchronize(self.world.device)
        began = time.perf_counter()
        if kind == "ours":
            super()._save(best)
        elif self.world.main:
            self._save_plainly()
        self.taken.append((kind, time.perf_counter() - began))

    def _save_plainly(self) -> None:
        session = self.session
        state = {"model": session.network.state_dict(), "optimizer": session.optimizer.state_dict()}
        if session.ema is not None:
            state["ema"] = {"shadow": session.ema.shadow}
        path = self.run.path / "plain.pt"
        torch.save(state, path)
        self.state_bytes = path.stat().st_size


def shortened(job: Path, sets: list[str], batch: int, steps: int, rounds: int) -> Experiment:
    """The job's network and optimizer, with ``rounds`` checkpoints of each kind, each after ``steps`` of ``batch`` images.

    Raises:
        ConfigError: as the job file's reader says.
    """
    epochs = 2 * rounds + 2  # the first two fill caches
    small = [
        f"data.batch_size={batch}", "data.micro_batch_size=null", f"data.train_images={batch * steps}", "data.validation=0.01",
        f"epochs={epochs}", f"training.evaluate_every_epochs={epochs}", "training.early_stopping=null",
        "schedule={name: constant}", "tracking={}", "checkpoint={every_epochs: 1}", "resources.nodes=1",
    ]  # fmt: skip
    return load_experiment(job, [*small, *sets])


def measure(experiment: Experiment, data_root: Path, folder: Path) -> dict[str, Any]:
    """Train ``experiment`` in one process, in a run of its own below ``folder`` that is thrown away; the figures.

    Args:
        experiment: of :func:`shortened`.
        folder: on the file system that is to be measured.

    Returns:
        ``seconds`` without a step of each kind of checkpoint, the median of the ``images_per_second``, those of the epoch
        after each kind (what is still written costs it a part of the processors), and ``state_bytes``.
    """
    made: list[Compared] = []

    def trainer(*arguments: Any) -> Compared:
        made.append(Compared(*arguments))
        return made[-1]

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as root:
        run = runs.create(Path(root), "checkpoint", experiment, {}, {})
        loop.train(run, data_root=data_root, console=False, trainer=trainer)
        rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "epoch"]
    [compared] = made
    rates = {kind: [row["images_per_second"] for row in rows[2:] if KINDS[(row["epoch"] - 1) % 2] == kind] for kind in KINDS}
    taken = {kind: [round(seconds, 5) for name, seconds in compared.taken[2:] if name == kind] for kind in KINDS}
    return {
        "job": experiment.name,
        "n": len(taken[KINDS[0]]),
        "batch_size": experiment.data.batch_size,
        "seconds": taken,
        "images_per_second": statistics.median(row["images_per_second"] for row in rows[2:]),
        "images_per_second_after": rates,
        "state_bytes": compared.state_bytes,
        "device": compared.world.device.type,
    }


def table(report: dict[str, Any]) -> list[str]:
    """The figures in words and as a Markdown table, line by line."""
    epoch = EPOCH_IMAGES / report["images_per_second"]
    lines = [
        f"`{report['job']}`, {report['state_bytes'] / 1e6:.1f} MB of state, {report['images_per_second']:,.0f} images/s: "
        f"an epoch of {EPOCH_IMAGES:,} images takes {epoch:,.1f} s.",
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
