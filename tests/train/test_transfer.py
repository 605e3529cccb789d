"""Transfer in whole runs: features computed once, frozen and trained parts over ranks and restarts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar import files
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

pytestmark = pytest.mark.slow

BACKBONE = {"family": "timm", "name": "resnet10t", "weights": None}


def experiment(
    model: dict[str, Any], augment: dict[str, Any] | None = None, images: int | None = 300, **changes: Any
) -> Experiment:
    values = ranks.experiment(training={"ema_decay": None}, optimizer={"lr": 0.02}, **changes).model_dump()
    values["model"] = BACKBONE | model
    values["data"]["augment"] = augment or {}
    values["data"]["train_images"] = images
    return Experiment.model_validate(values)


def complete(folder: Path, data: Path, config: Experiment, world: int = 1) -> tuple[Run, dict[str, Any]]:
    run = ranks.new_run(folder, config)
    return run, ranks.complete(run, data, world)


def pipeline_of(run: Run) -> str:
    [name] = [row["pipeline"] for row in files.read_json_lines(run.metrics_file) if row.get("event") == "pipeline"]
    return str(name)


def weights_of(run: Run, link: str = "latest") -> dict[str, torch.Tensor]:
    saved = checkpoint.named(run.checkpoints, link)
    assert saved is not None
    model: dict[str, torch.Tensor] = checkpoint.read(saved)["model"]
    return model


@pytest.mark.parametrize("world", [1, 2])
def test_cached_features_change_nothing_but_the_speed(tmp_path: Path, digits_data: Path, world: int) -> None:
    """Every step's loss is that of a run that goes through the backbone each time, on any number of ranks."""
    slow, expected = complete(tmp_path, digits_data, experiment({"cache_features": False}))
    fast, result = complete(tmp_path, digits_data, experiment({}), world)
    assert (pipeline_of(slow), pipeline_of(fast)) == ("resident", "features")
    assert ranks.losses(fast) == pytest.approx(ranks.losses(slow), rel=1e-4)
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    assert result["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.005)


def test_features_are_not_cached_where_every_epoch_differs(tmp_path: Path, digits_data: Path) -> None:
    run, result = complete(tmp_path, digits_data, experiment({}, {"flip": "random"}))
    assert pipeline_of(run) == "resident" and result["state"] == "finished"


@pytest.mark.parametrize(
    "model", [{"train": "frozen"}, {"train": "last3", "backbone_lr_factor": 0.1}, {"train": "all"}], ids=lambda m: m["train"]
)
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, digits_data: Path, model: dict[str, Any]) -> None:
    config = experiment(model, checkpoint={"every_steps": 2})
    undisturbed, expected = complete(tmp_path, digits_data, config)
    killed = ranks.new_run(tmp_path, config)
    processes = ranks.start(killed, digits_data, 1)
    ranks.wait_for_step(killed, 3, processes)
    ranks.kill_all(processes)
    result = ranks.complete(killed, digits_data, 1)
    assert ranks.losses(killed) == ranks.losses(undisturbed)
    assert result["test_loss"] == expected["test_loss"]
    one, other = weights_of(undisturbed), weights_of(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_images_that_are_asked_for_are_trained_on(tmp_path: Path, digits_data: Path) -> None:
    run, result = complete(tmp_path, digits_data, experiment({}))
    assert result["steps"] == 6  # 300 images, batches of 100, 2 epochs
    assert "300 training images" in ranks.logs(run)


def test_a_stop_is_heard_while_features_are_computed(tmp_path: Path, digits_data: Path) -> None:
    """Every rank leaves, though only one was told; the run goes on as if it had not been."""
    config = experiment({"resize": 80}, images=None)
    run = ranks.new_run(tmp_path, config)
    processes = ranks.start(run, digits_data, 2)
    ranks.eventually(lambda: bool(files.read_json_lines(run.metrics_file)), processes, run)  # it started: features are next
    processes[1].send_signal(signal.SIGTERM)
    assert ranks.finish(processes) == [0, 0], ranks.logs(run)
    stopped = files.read_object(run.result_file)
    assert (stopped["state"], stopped["steps"]) == ("stopped", 0)
    undisturbed, expected = complete(tmp_path, digits_data, config, 2)
    result = ranks.complete(run, digits_data, 2)
    assert (result["state"], result["restarts"]) == ("finished", 1)
    assert ranks.losses(run) == ranks.losses(undisturbed)
    assert result["test_loss"] == expected["test_loss"]
