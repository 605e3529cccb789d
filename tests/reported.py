"""Run directories as a training leaves them, without the training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.track import evaluated
from hpc_cifar.track.evaluated import Prediction
from hpc_cifar.track.metrics import MetricsLog

FIELDS: dict[str, Any] = {
    "name": "net",
    "epochs": 5,
    "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
    "data": {"dataset": "digits", "batch_size": 144},
    "optimizer": {"name": "sgd", "lr": 0.01},
}
STEPS = 9
SCORES = {"precision": 0.5, "recall": 0.25, "f1": 0.33, "images": 10}
EVALUATED = {
    "images": 20, "split": "test", "checkpoint": "latest", "step": 45, "accuracy": 0.5, "ece": 0.1,
    "per_class": {"cat": SCORES, "dog": SCORES}, "confusion": [[5, 5], [5, 5]],
}  # fmt: skip


def left_behind(
    root: Path, *, called: str = "", epochs: int = 5, test: float | None = 0.9, restarts: int = 0, lost: int = 0,
    validated: float = 0.98, **fields: Any
) -> Run:  # fmt: skip
    """A run that made ``epochs`` epochs of nine steps; finished if ``test`` is its accuracy.

    Args:
        called: its name, if that matters.
        validated: accuracy on validation images, as a share of the one of training.
    """
    values = {**FIELDS, "epochs": max(epochs, 1), **fields}
    experiment = Experiment.model_validate(values)
    where = {"command": ["/opt/here/bin/hpc-cifar", "submit", "net.yaml"], "git": {"commit": "c0ffee", "dirty": False}}
    run = runs.create(root, called or runs.new_run_id(experiment.name, root), experiment, {"batch_size": 144}, where)
    log = MetricsLog(run.metrics_file)
    for segment in range(restarts):
        log.write("event", epoch=0, step=segment, event="started")
        log.write("event", epoch=0, step=segment + 1, event="requeued", reason="preempted")
    log.write("event", epoch=0, step=restarts, event="started")
    for epoch in range(1, epochs + 1):
        good = 1 - math.exp(-epoch / 3) * (1 + 0.01 * (experiment.seed % 7))
        figures = {"train_loss": 2 / epoch, "train_accuracy": good, "val_loss": 2.1 / epoch, "val_accuracy": validated * good}
        log.write("epoch", epoch=epoch, step=epoch * STEPS, lr=0.01, images_per_second=1000.0 + epoch, **figures)
    state = {"state": "running", "restarts": restarts, "lost_steps": lost, "gpu_hours": 0.25, "seconds": 61.5}
    if test is not None:
        log.write("event", epoch=epochs, step=epochs * STEPS, event="finished")
        state["state"] = "finished"
        done = {"test_accuracy": test, "test_loss": 0.3, "steps": epochs * STEPS, "epochs": epochs, "data": "digits"}
        files.write_json(run.result_file, {**state, **done})
    run.update_state(**state, step=epochs * STEPS, world_size=2, device="cpu")
    log.close()
    return run


def leave_evaluation(run: Run, classes: list[str], rows: list[Prediction]) -> Path:
    """The folder that ``evaluate`` leaves, without pictures."""
    folder = run.path / "evaluation" / "test"
    (folder / "mistakes").mkdir(parents=True)
    confusion = [[0] * len(classes) for _ in classes]
    for one in rows:
        confusion[one.label][one.predicted] += 1
    found = EVALUATED | {"images": len(rows), "per_class": dict.fromkeys(classes, SCORES), "confusion": confusion}
    files.write_sealed(folder / "evaluation.json", found)
    evaluated.write_predictions(folder, rows)
    return folder
