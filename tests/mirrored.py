"""Runs that are mirrored in W&B, for the tests of that: as training leaves them, without training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMANDS, TRAINING, preload, typed
from reported import FIELDS
from wandb_server import Kept, Server

from hpc_cifar import files, runs
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.track import identity
from hpc_cifar.track.metrics import MetricsLog

preload(*COMMANDS, *TRAINING)

EXPERIMENT: dict[str, Any] = {
    **FIELDS,
    "name": "mirrored",
    "epochs": 40,
    "training": {"log_every_steps": 1},
    "checkpoint": {"every_steps": 20},
    "tracking": {"wandb": "online"},
}


GIT = {"commit": "c0ffee", "dirty": False}


def a_run(folder: Path) -> Run:
    tracking = {"wandb": "online", "group": "a group", "tags": ["one", "two"], "alerts": True}
    values = EXPERIMENT | {"name": "curves", "tracking": tracking}
    return runs.create(
        folder, runs.new_run_id("curves", folder), Experiment.model_validate(values), {"batch_size": 64}, {"git": GIT}
    )


def train(run: Run, begin: int, end: int, *, ended: str = "") -> None:
    """What a segment from step ``begin`` on leaves: a row a step, an epoch after every ten, and an event at its begin."""
    log = MetricsLog(run.metrics_file, begin)
    log.write("event", epoch=0, step=begin, event="started")
    for step in range(begin + 1, end + 1):
        log.write("step", epoch=step // 10, step=step, train_loss=1 / step)
        if step % 10 == 0:
            log.write("epoch", epoch=step // 10, step=step, val_loss=2 / step, val_accuracy=step / 100)
    log.close()
    state = {"state": ended or "running", "data": "digits", "restarts": 0, "gpu_hours": 0.5}
    run.update_state(**state)
    if ended == "finished":
        files.write_json(run.result_file, {"state": ended, "test_accuracy": 0.75})


def sync(run: Run, server: Server, *options: str, code: int = 0) -> str:
    """What ``hpc-cifar sync`` says."""
    environment = {**os.environ, **server.environment}
    done = typed(["sync", str(run.path), *options], environment, run.path.parent, timeout_s=400)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}\n{server.requests}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def assert_whole(server: Server, run: Run, steps: int) -> Kept:
    """Every step and every epoch of the run, once, and in order."""
    [kept] = server.runs.values()
    assert kept.id == identity.kept(run).id
    rows = [row for row in kept.history if "global_step" in row]
    assert [row["global_step"] for row in rows if "step/train_loss" in row] == list(range(1, steps + 1))
    assert [row["epoch"] for row in rows if "val_loss" in row] == list(range(1, steps // 10 + 1))
    assert all(row["step/train_loss"] == pytest.approx(1 / row["global_step"]) for row in rows if "step/train_loss" in row)
    assert server.unknown == []
    return kept


def job(folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps(EXPERIMENT))
    return path


def at(server: Server, folder: Path, data: Path) -> dict[str, str]:
    """The environment of a training whose runs are in a folder and whose W&B is that server."""
    return {**os.environ, **server.environment, "HPC_CIFAR_RUNS": str(folder), "HPC_CIFAR_DATA": str(data)}


def is_oldest_client() -> bool:
    """Whether it is one of 0.21, which cannot show a log, and measures the machine after 15 s only."""
    import wandb

    return not hasattr(wandb.sdk.wandb_run.Run, "write_logs")
