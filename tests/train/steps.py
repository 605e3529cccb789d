"""Single steps of the trainer, of one process, on images that are noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ranks
import torch
from torch import nn

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.data.pipeline import Batch
from hpc_cifar.models.build import Rule
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.train import optim
from hpc_cifar.train.distributed import World, gradient_sync
from hpc_cifar.train.step import Stepper

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


def stepper_of(
    config: Experiment, network: nn.Module, rules: Sequence[Rule] = (), graph: bool = False, stored: int = 1000
) -> Stepper:
    """In float32. ``stored``: training images, which give the steps of an epoch."""
    optimizer = optim.build(config.optimizer, network.parameters(), rules)
    ema = optim.EMA(network.parameters(), 0.9, on_device=graph) if config.training.ema_decay else None
    plan = make_plan(config, requested_placement(config.resources), stored)
    sync = gradient_sync("auto", network, ALONE)
    return Stepper(config, sync, optimizer, ema, ALONE, torch.float32, plan, rules, graph)


def batches(count: int) -> Iterator[Batch]:
    """Of 12 images of 3 x 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        images = torch.randn(12, 3, 8, 8, generator=generator)
        yield Batch(images, torch.randint(0, 10, (12,), generator=generator), number, 12)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.Tanh(), nn.Linear(16, 10))


def configured(optimizer: dict[str, Any], **changes: Any) -> Any:
    common: dict[str, Any] = {
        "data": {"batch_size": 12},
        "schedule": {"name": "constant", "warmup_epochs": 0},
        "training": {"ema_decay": None, "log_every_steps": 100},
    }
    config = ranks.experiment(**ranks.merge(common, changes))
    values = config.model_dump()
    values["optimizer"] = optimizer
    return type(config).model_validate(values)
