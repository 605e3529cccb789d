"""One step of the trainer against torch written out, for every optimizer and option that changes a step."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

from hpc_cifar.data.pipeline import Batch
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.train import optim
from hpc_cifar.train.distributed import World, gradient_sync
from hpc_cifar.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
WANTED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=1e-2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "adam": {"name": "adam", "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 1e-2},
    "adamw": {"name": "adamw", "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 1e-2},
}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_steps_equal_torch(name: str, smoothing: float, clip: float | None, micro: int | None) -> None:
    config = ranks.experiment(
        data={"batch_size": 12, "micro_batch_size": micro},
        schedule={"name": "constant", "warmup_epochs": 0},
        loss={"label_smoothing": smoothing},
        training={"clip_grad_norm": clip, "ema_decay": None, "log_every_steps": 3},
    )
    values = config.model_dump()
    values["optimizer"] = OPTIONS[name]
    config = type(config).model_validate(values)
    ours, theirs = network(), network()
    optimizer = optim.build(config.optimizer, ours.parameters())
    plan = make_plan(config, requested_placement(config.resources), 1000)
    stepper = Stepper(config, gradient_sync("auto", ours, ALONE), optimizer, None, ALONE, torch.float32, plan)
    expected = WANTED[name](theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(3):
        images = torch.randn(12, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (12,), generator=generator)
        stepper(Batch(images=images, labels=labels, number=step, global_size=12), step)
        loss = F.cross_entropy(theirs(images), labels, label_smoothing=smoothing)
        expected.zero_grad()
        loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            assert norm > clip, "the test must really clip"
        expected.step()
        losses.append(loss.item())
    found, *_ = stepper.take_window().result()
    assert found == pytest.approx(losses, rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # Adam divides float noise by tiny second moments
