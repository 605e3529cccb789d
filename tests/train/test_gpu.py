"""The trainer and its pipelines on a real GPU, where there is one."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

pytestmark = [pytest.mark.component("gpu"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


def latest(run: Run) -> dict[str, Any]:
    saved = checkpoint.named(run.checkpoints, "latest")
    assert saved is not None
    return checkpoint.read(saved)


def test_bf16_training_learns_and_resumes_where_it_was(tmp_path: Path, digits_data: Path) -> None:
    config = ranks.experiment(epochs=4, resources={"gpus_per_node": 1})
    undisturbed, stopped = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    result = ranks.complete(undisturbed, digits_data, 1)
    assert undisturbed.state().device == "cuda"
    assert result["state"] == "finished" and math.isfinite(result["test_loss"])
    losses = ranks.losses(undisturbed)
    assert losses[max(losses)] < losses[1]
    ranks.complete(stopped, digits_data, 1, max_steps=20)
    ranks.complete(stopped, digits_data, 1)
    # cuDNN's sums are not in a fixed order: equal up to bf16 noise, not bit for bit
    for step, loss in ranks.losses(stopped).items():
        assert loss == pytest.approx(losses[step], rel=0.05), f"step {step}"
    assert latest(stopped)["position"] == latest(undisturbed)["position"]


def test_no_gpus_asked_for_is_the_cpu(tmp_path: Path, digits_data: Path) -> None:
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=1))
    ranks.complete(run, digits_data, 1)
    assert run.state().device == "cpu"


MUON = {"name": "muon", "lr": 0.01, "other_lr": 0.002}
MUON_AND_SGD = MUON | {"other": "sgd", "last_layer_lr": 0.02, "normalize_weights": True, "lookahead": {"steps": 5}}


@pytest.mark.parametrize(
    ("optimizer", "rel"),
    [
        ({"name": "sgd", "lr": 0.02, "momentum": 0.9}, 1e-4),
        ({"name": "adam", "lr": 0.002}, 1e-4),
        (MUON, 0.05),  # timm orthogonalizes in bf16
        (MUON_AND_SGD, 0.05),
    ],
    ids=["sgd", "adam", "muon", "muon and sgd"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_graph_makes_the_steps_of_the_eager_mode(
    tmp_path: Path, digits_data: Path, compiled: bool, optimizer: dict[str, Any], rel: float
) -> None:
    """In float64, in which rounding stays small. It is resumed in the middle, and tail batches become a graph of their own."""
    losses = {}
    for graph in (False, True):
        training = {"precision": "float64", "graph": graph, "compile": compiled, "clip_grad_norm": 5.0}
        values = ranks.experiment(epochs=12, resources={"gpus_per_node": 1}, training=training).model_dump()
        values["optimizer"] = optimizer
        run = ranks.new_run(tmp_path, Experiment.model_validate(values))
        ranks.complete(run, digits_data, 1, max_steps=70)
        assert ranks.complete(run, digits_data, 1)["state"] == "finished"
        losses[graph] = ranks.losses(run)
    assert losses[True] == pytest.approx(losses[False], rel=rel)


def test_300_epochs_in_graph_mode_preempted_twice_end_where_undisturbed_ones_end(tmp_path: Path, digits_data: Path) -> None:
    """Up to the order of cuDNN's sums."""
    training = {"graph": True, "evaluate_every_epochs": 50}
    changes: dict[str, Any] = {"epochs": 300, "data": {"batch_size": 664}, "checkpoint": {"every_epochs": 50}}
    config = ranks.experiment(**changes, training=training, resources={"gpus_per_node": 1})
    undisturbed, run = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    expected = ranks.complete(undisturbed, digits_data, 1)
    for step in (137, 411):
        processes = ranks.start(run, digits_data, 1)
        ranks.wait_for_step(run, step, processes)
        processes[0].send_signal(signal.SIGUSR2)
        assert ranks.finish(processes) == [0], ranks.logs(run)
    result = ranks.complete(run, digits_data, 1)
    assert (result["epochs"], result["lost_steps"]) == (300, 0)
    assert result["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.02)


@pytest.mark.parametrize("batch_norm", ["local", "global"])
def test_two_gpus_with_a_graph_end(tmp_path: Path, digits_data: Path, batch_norm: str) -> None:
    """NCCL would wait for ever for a graph that still holds one of its collectives."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    training = {"graph": True, "batch_norm": batch_norm}
    run = ranks.new_run(tmp_path, ranks.experiment(epochs=8, resources={"gpus_per_node": 2}, training=training))
    assert ranks.complete(run, digits_data, 2)["state"] == "finished"
