"""The trainer and its pipelines on a real GPU, where there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

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
    assert undisturbed.state()["device"] == "cuda"
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
    assert run.state()["device"] == "cpu"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_graph_makes_the_steps_of_the_eager_mode(tmp_path: Path, digits_data: Path, compiled: bool) -> None:
    """In float64, in which rounding stays small; every step draws its dropout anew. It is resumed in the middle, too."""
    losses = {}
    for graph in (False, True):
        training = {"precision": "float64", "graph": graph, "compile": compiled}
        run = ranks.new_run(tmp_path, ranks.experiment(epochs=4, resources={"gpus_per_node": 1}, training=training))
        ranks.complete(run, digits_data, 1, max_steps=20)
        assert ranks.complete(run, digits_data, 1)["state"] == "finished"
        losses[graph] = ranks.losses(run)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
