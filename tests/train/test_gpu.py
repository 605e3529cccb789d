"""The trainer and its pipelines on a real GPU, where there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch

from hpc_cifar.config.experiment import Augment, Data
from hpc_cifar.data import pipeline
from hpc_cifar.data.store import Store
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint

pytestmark = [pytest.mark.component("gpu"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_both_pipelines_deliver_the_pixels_of_the_cpu(digits_data: Path, mode: Any) -> None:
    store = Store.open(digits_data, "digits")
    augment = Augment(crop_padding=4, padding_mode=mode, flip="random", cutout=8)
    mean, std = store.manifest["train"]["mean"], store.manifest["train"]["std"]

    def batches(name: Any, device: str) -> list[pipeline.Batch]:
        made = pipeline.build(
            Data(dataset="digits", batch_size=100, pipeline=name, augment=augment), store.train, np.arange(250), seed=3, rank=0,
            world_size=1, device=device, dtype=torch.float32, channels_last=True, mean=mean, std=std,
        )  # fmt: skip
        return list(made.batches(1))

    expected = batches("reference", "cpu")
    for name in ("resident", "reference"):
        for ours, theirs in zip(batches(name, "cuda"), expected, strict=True):
            assert ours.images.is_cuda and ours.images.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours.images.cpu(), theirs.images, rtol=0, atol=1e-5)
            assert torch.equal(ours.labels.cpu(), theirs.labels)


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
