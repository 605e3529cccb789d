"""Training on the hardest images of each batch: against torch written out, over ranks, as a graph's twin, after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from steps import batches, stepper_of
from torch import nn

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.config.training import Selection
from hpc_cifar.train.step import kept_images

HARDEST: dict[str, Any] = {"share": 0.5, "from_epoch": 1}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 10))


def configured(selection: dict[str, Any], **changes: Any) -> Experiment:
    common: dict[str, Any] = {
        "data": {"batch_size": 12},
        "schedule": {"name": "constant", "warmup_epochs": 0},
        "training": {"ema_decay": None, "log_every_steps": 100, "selection": selection},
    }
    return ranks.experiment(**ranks.merge(common, changes))


@pytest.mark.parametrize("micro", [None, 4])
def test_a_step_is_made_of_the_images_with_the_largest_losses(micro: int | None) -> None:
    """A share of 0.4 of 12 is 5; there are two steps an epoch, and those of the second epoch choose."""
    ours, theirs = network(), network()
    for module in (ours, theirs):  # two networks draw other dropout
        module[4].p = 0.0  # type: ignore[assignment]
        if micro is not None:  # smaller passes have other statistics
            module[2] = nn.Identity()
    config = configured({"share": 0.4, "from_epoch": 1, "until_epoch": 2}, data={"micro_batch_size": micro})
    stepper = stepper_of(config, ours, stored=24)
    expected = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    trained = []
    for step, batch in enumerate(batches(6)):
        stepper(batch, step)
        images, labels = batch.images, batch.labels
        if step in (2, 3):  # the second of three epochs
            theirs.eval()
            with torch.no_grad():
                losses = F.cross_entropy(theirs(images), labels, reduction="none")
            theirs.train()
            hardest = sorted(range(12), key=lambda one: -losses[one].item())[:5]
            images, labels = images[sorted(hardest)], labels[sorted(hardest)]
        expected.zero_grad()
        F.cross_entropy(theirs(images), labels).backward()
        expected.step()
        trained.append(len(labels))
    assert trained == [12, 12, 5, 5, 12, 12] and stepper.epoch_sums[2].item() == sum(trained)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):  # BatchNorm's statistics, too
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [None, 5])
def test_a_graph_chooses_as_the_eager_mode_does(micro: int | None) -> None:
    states = []
    for graph in (False, True):
        module = network()
        config = configured(HARDEST, data={"micro_batch_size": micro})
        stepper = stepper_of(config, module, stored=60, graph=graph)
        for step, batch in enumerate(batches(15)):  # all images in the first five, then the warm-up of the others' graph
            stepper(batch, step)
        states.append(module.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_rank_keeps_its_share(world: int) -> None:
    selection = Selection(share=0.5)
    for count in range(1, 60):
        kept = kept_images(selection, count, world)
        assert min(count, 1) <= kept <= count
        assert abs(kept - count / 2) <= world / 2 + 1e-9, "rounded once in each rank"
    assert (selection.kept(0), selection.kept(1), Selection(share=0.01).kept(10)) == (0, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sync", "precision"), [(1, "flat", "bf16"), (2, "flat", "float32"), (2, "ddp", "float32")])
def test_chosen_images_survive_a_kill_bit_for_bit(
    tmp_path: Path, digits_data: Path, world: int, sync: str, precision: str
) -> None:
    """Killed in the second epoch, the first that chooses; the last batch of an epoch is smaller."""
    training = {"selection": HARDEST, "gradient_sync": sync, "precision": precision}
    config = ranks.experiment(epochs=3, training=training, checkpoint={"every_steps": 4})
    undisturbed, killed = ranks.new_run(tmp_path, config), ranks.new_run(tmp_path, config)
    expected = ranks.complete(undisturbed, digits_data, world)
    processes = ranks.start(killed, digits_data, world)
    ranks.wait_for_step(killed, 18, processes)
    ranks.kill_all(processes)
    result = ranks.complete(killed, digits_data, world)
    assert ranks.losses(killed) == ranks.losses(undisturbed)
    assert (result["test_loss"], result["test_accuracy"]) == (expected["test_loss"], expected["test_accuracy"])
    every = ranks.new_run(tmp_path, ranks.experiment(epochs=3, training={"gradient_sync": sync, "precision": precision}))
    ranks.complete(every, digits_data, world)
    losses, others = ranks.losses(undisturbed), ranks.losses(every)
    assert [step for step in losses if losses[step] != others[step]] == list(range(14, 40)), "from the second epoch on"
