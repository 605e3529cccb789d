"""``training.batch_norm_images``: against torch's update_bn, over ranks, after a kill, in what is evaluated and exported."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from steps import ALONE, configured
from torch import Tensor, nn

from hpc_cifar import files
from hpc_cifar.config.experiment import Experiment
from hpc_cifar.data import draws
from hpc_cifar.errors import UsageError
from hpc_cifar.models import exported
from hpc_cifar.models.batch_norm import BatchNorm
from hpc_cifar.runs import Run
from hpc_cifar.train import checkpoint, evaluation, export, statistics, trained
from hpc_cifar.train.setup import prepare_data

IMAGES = 320
RENEWED: dict[str, Any] = {"training": {"batch_norm_images": IMAGES}, "data": {"batch_size": 64}}


def network(kind: str, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(3)
    maps: nn.Module = nn.BatchNorm2d(6, momentum=0.3) if kind == "torch" else BatchNorm(6, 0.7, 1e-5, kind == "global")
    units: nn.Module = nn.BatchNorm1d(16) if kind == "torch" else BatchNorm(16, 0.9, 1e-5, kind == "global")
    made = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        maps,
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 16),
        units,
        nn.Linear(16, 10),
    )
    for parameter in (*maps.parameters(), *units.parameters()):
        nn.init.normal_(parameter)
    return made


def images(count: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [2 + 3 * torch.randn(12, 3, 8, 8, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("kind", ["local", "global", "torch"])
@pytest.mark.parametrize(
    ("dtype", "layout", "tolerance"),
    [
        (torch.float32, torch.contiguous_format, 1e-5),
        (torch.float32, torch.channels_last, 1e-4),  # torch adds one value after the other
        (torch.float64, torch.channels_last, 1e-12),
    ],
)
def test_they_are_those_of_torch(kind: str, dtype: torch.dtype, layout: torch.memory_format, tolerance: float) -> None:
    """Which drops out in its pass, so its network has none of it; and ours has statistics of a training before."""
    ours, theirs = (one.to(dtype).to(memory_format=layout) for one in (network(kind), network("torch", 0.0)))
    given = [batch.contiguous(memory_format=layout) for batch in images(dtype=dtype)]
    for batch in images(3, dtype):
        ours(10 * batch)
    torch.optim.swa_utils.update_bn(given, theirs)
    found = statistics.computed(ours, given, contextlib.nullcontext)
    expected = {name: value for name, value in theirs.state_dict().items() if "running" in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    with statistics.using(ours, found):
        ours.eval()
        theirs.eval()
        torch.testing.assert_close(ours(given[0]), theirs(given[0]), rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("kind", ["local", "global", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_as_it_is(kind: str, training: bool) -> None:
    module = network(kind)
    for batch in images(3):
        module(batch)
    module.train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    places = [buffer.data_ptr() for buffer in module.buffers()]  # a CUDA graph reads them
    options = [{k: v for k, v in vars(layer).items() if not k.startswith("_")} for layer in module.modules()]
    state = torch.get_rng_state()
    found = statistics.computed(module, images(), contextlib.nullcontext)
    assert any(not torch.equal(found[name], before[name]) for name in found)
    with statistics.using(module, found):
        assert all(torch.equal(module.get_buffer(name), value) for name, value in found.items())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [{k: v for k, v in vars(layer).items() if not k.startswith("_")} for layer in module.modules()] == options
    assert [buffer.data_ptr() for buffer in module.buffers()] == places
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_overflowed_before_has_finite_statistics_again() -> None:
    for kind in ("local", "torch"):
        module = network(kind)
        module.get_buffer("1.running_mean").fill_(math.nan)
        found = statistics.computed(module, images(), contextlib.nullcontext)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("kind", ["local", "torch"])
def test_a_compiled_network_is_not_compiled_again(kind: str) -> None:
    torch._dynamo.reset()
    module = network(kind)
    compiled = torch.compile(module, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in images(2):
            compiled(batch).sum().backward()
            with statistics.using(module, statistics.computed(module, images(), contextlib.nullcontext)):
                module.eval()
                module(batch)
                module.train()


class PartlyFrozen(nn.Sequential):
    """As a backbone is, whose first normalisation keeps its statistics."""

    def train(self, mode: bool = True) -> PartlyFrozen:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("kind", ["local", "torch"])
def test_a_frozen_layer_is_left_alone(kind: str) -> None:
    module = PartlyFrozen(*network(kind))
    found = statistics.computed(module, images(), contextlib.nullcontext)
    assert set(found) == {"6.running_mean", "6.running_var"}
    module.eval()  # the layer after it sees what it makes of its own statistics
    units = torch.stack([module[:6](batch).mean(0) for batch in images()]).mean(0)
    torch.testing.assert_close(found["6.running_mean"], units, rtol=1e-5, atol=1e-5)


def test_a_network_without_such_layers_is_refused() -> None:
    config = configured({"name": "sgd", "lr": 0.1}, training={"batch_norm_images": 100})
    statistics.check(config, network("torch"))
    with pytest.raises(UsageError, match=r"training\.batch_norm_images: the layers of this network that are trained"):
        statistics.check(config, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("wanted", "batch", "micro", "count", "size"),
    [
        (320, 64, None, 320, 64),
        (350, 64, None, 320, 64),  # whole batches
        (40, 64, None, 40, 40),
        (320, 64, 25, 300, 25),
        (1200, 1250, None, 1000, 1000),  # as many as in a validation
        (10**6, 100, None, 1200, 100),  # of 1,294
        (5, 1, None, 4, 2),  # one value has no variance
    ],
)
def test_the_images_follow_from_the_seed(
    digits_data: Path, wanted: int, batch: int, micro: int | None, count: int, size: int
) -> None:
    config = ranks.experiment(data={"batch_size": batch, "micro_batch_size": micro}, training={"batch_norm_images": wanted})
    prepared = prepare_data(config, digits_data, ALONE)
    indices, found = statistics.images_of(config, prepared)
    assert (len(indices), found) == (count, size)
    assert np.array_equal(indices, draws.order(7, 0, prepared.train_indices)[:count])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def complete(folder: Path, data: Path, config: Experiment, world: int = 1) -> tuple[Run, dict[str, Any]]:
    run = ranks.new_run(folder, config)
    return run, ranks.complete(run, data, world)


def state_of(run: Run, link: str = "latest") -> dict[str, Any]:
    saved = checkpoint.named(run.checkpoints, link)
    assert saved is not None
    return checkpoint.read(saved)


def validations(run: Run) -> list[tuple[float, float]]:
    rows = files.read_json_lines(run.metrics_file)
    return [(row["val_loss"], row["val_accuracy"]) for row in rows if row["kind"] == "epoch"]


def assert_evaluated_and_exported_alike(run: Run, data: Path, folder: Path) -> None:
    """What `evaluate` finds is the run's result, and what `export` writes has the same statistics."""
    result, loaded = files.read_object(run.result_file), trained.load(run, data)
    found, _ = evaluation.evaluate(loaded, "test", tta=False, pictures=False, maps_of=None)
    assert found["accuracy"] == pytest.approx(result["test_accuracy"], abs=1e-9)
    assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-5)
    validated = state_of(run, loaded.which)["statistics"]
    assert validated
    export.export(loaded, folder / "exported.safetensors")
    alone, _ = exported.load(folder / "exported.safetensors")
    for name, value in validated.items():
        assert torch.equal(loaded.network.get_buffer(name).float(), value.float())
        assert torch.equal(alone.get_buffer(name), value.float())


@pytest.mark.slow
@pytest.mark.parametrize(("select", "average"), [("last", 0.99), ("best", 0.99), ("best", None)])
def test_the_training_is_the_same_and_the_figures_are_of_the_new_statistics(
    tmp_path: Path, digits_data: Path, select: str, average: float | None
) -> None:
    changes = {
        "epochs": 3,
        "checkpoint": {"select": select},
        "training": {"ema_decay": average, "test_time_augmentation": True},
    }
    config = ranks.experiment(**ranks.merge(RENEWED, changes))
    run, result = complete(tmp_path, digits_data, config)
    changes["data"] = RENEWED["data"]
    other, lagging = complete(tmp_path, digits_data, ranks.experiment(**changes))
    assert ranks.losses(run) == ranks.losses(other)
    one, two = state_of(run), state_of(other)
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert two["statistics"] is None
    assert validations(run) != validations(other) and result["test_loss"] != lagging["test_loss"]
    assert_evaluated_and_exported_alike(run, digits_data, tmp_path)

    loaded = trained.load(run, digits_data)  # has the average of the weights, whose statistics torch finds as well
    theirs = torch.nn.Sequential(*loaded.network)
    theirs[1] = nn.BatchNorm2d(8)
    theirs[1].load_state_dict(loaded.network[1].state_dict(), strict=False)  # type: ignore[index]
    theirs[4] = nn.Identity()  # it would drop out
    indices, size = statistics.images_of(config, loaded.prepared)
    assert (len(indices), size) == (IMAGES, 64)
    batches = [batch.images.float() for batch in loaded.batches(loaded.prepared.store.train, indices, size)]
    torch.optim.swa_utils.update_bn(batches, theirs)
    tolerance = 1e-4 if loaded.precision is torch.float32 else 0.02
    for name, value in state_of(run, loaded.which)["statistics"].items():
        torch.testing.assert_close(theirs.get_buffer(name), value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["local", "global"])
def test_they_are_the_same_bits_on_any_number_of_ranks(tmp_path: Path, digits_data: Path, batch_norm: str) -> None:
    """The weights are of one checkpoint, which is validated by one rank, then by three."""
    config = ranks.experiment(**ranks.merge(RENEWED, {"training": {"batch_norm": batch_norm}}))
    run = ranks.new_run(tmp_path, config)
    figures = []
    for world in (1, 3):
        notes = {"STATISTICS": str(tmp_path / f"of-{world}")}
        result = ranks.complete(run, digits_data, world, max_steps=9, environment=notes)
        assert (result["state"], result["steps"]) == ("stopped", 9)
        figures.append(result["val_loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    [expected] = torch.load(tmp_path / "of-1.0")
    assert set(expected) == {"1.running_mean", "1.running_var"}
    for rank in range(3):
        [found] = torch.load(tmp_path / f"of-3.{rank}")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert_is_computed_for_a_checkpoint_that_was_not_validated(run, digits_data, expected)


def assert_is_computed_for_a_checkpoint_that_was_not_validated(run: Run, data: Path, expected: dict[str, Tensor]) -> None:
    assert state_of(run)["statistics"] is None
    loaded = trained.load(run, data)
    for name, value in expected.items():  # here with other threads
        torch.testing.assert_close(loaded.network.get_buffer(name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "training"), [(1, {"graph": True}), (2, {"ema_decay": None}), (2, {"batch_norm": "global"})])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, digits_data: Path, world: int, training: dict[str, Any]) -> None:
    """With epochs that are chosen by what is validated; the first kill is in an epoch, the second behind a validation."""
    changes = {
        "epochs": 3,
        "training": training,
        "checkpoint": {"select": "best", "monitor": "val_loss", "every_steps": 5},
    }
    config = ranks.experiment(**ranks.merge(RENEWED, changes))
    undisturbed, expected = complete(tmp_path, digits_data, config, world)
    killed = ranks.new_run(tmp_path, config)
    for step in (17, 43):  # of 21 in an epoch
        processes = ranks.start(killed, digits_data, world)
        ranks.wait_for_step(killed, step, processes)
        ranks.kill_all(processes)
    result = ranks.complete(killed, digits_data, world)
    assert ranks.losses(killed) == ranks.losses(undisturbed)
    assert validations(killed) == validations(undisturbed)
    assert (result["test_loss"], result["test_accuracy"]) == (expected["test_loss"], expected["test_accuracy"])
    for link in ("latest", "best"):
        one, other = state_of(undisturbed, link)["statistics"], state_of(killed, link)["statistics"]
        assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert_evaluated_and_exported_alike(killed, digits_data, tmp_path)


@pytest.mark.slow
def test_a_head_on_cached_features_has_them_too(tmp_path: Path, digits_data: Path) -> None:
    """Of the features; those of the frozen backbone stay."""
    values = ranks.experiment(**ranks.merge(RENEWED, {"epochs": 1, "training": {"ema_decay": None}})).model_dump()
    head = ["global_avg_pool", "batch_norm", {"dense": {"units": 10}}]
    values["model"] = {"family": "timm", "name": "resnet10t", "weights": None, "head": head}
    values["data"] |= {"augment": {}, "train_images": 400}
    config = Experiment.model_validate(values)
    run, _ = complete(tmp_path, digits_data, config, world=2)
    [pipeline] = [row["pipeline"] for row in files.read_json_lines(run.metrics_file) if row.get("event") == "pipeline"]
    assert pipeline == "features"
    assert set(state_of(run)["statistics"]) == {"head.1.running_mean", "head.1.running_var"}
    assert_evaluated_and_exported_alike(run, digits_data, tmp_path)
