"""Norms of gradients and weights in the rows of steps: those of a plain loop, on any number of ranks, free for the steps."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from steps import ALONE, batches, configured, network, stepper_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_cifar import files
from hpc_cifar.config import difference
from hpc_cifar.models.build import Rule
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.runs import Run
from hpc_cifar.track.metrics import MetricsLog
from hpc_cifar.track.rows import STEP_LINE, is_row
from hpc_cifar.train import optim, rehearsal
from hpc_cifar.train.distributed import gradient_sync
from hpc_cifar.train.norms import Norms
from hpc_cifar.train.step import Stepper

LOOKAHEAD = {"lookahead": {"steps": 2, "alpha": 0.5}}
MUON = {"name": "muon", "lr": 0.02, "newton_schulz_steps": 3}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "adam": {"name": "adam", "lr": 0.01, "weight_decay": 1e-3},
    "adamw": {"name": "adamw", "lr": 0.01},
    "lars": {"name": "lars", "lr": 1.0, "weight_decay": 1e-3},
    "muon": MUON,
    "muon and sgd": MUON | {"other": "sgd", "last_layer_lr": 0.02, "normalize_weights": True},
    "lookahead": {"name": "sgd", "lr": 0.1, "momentum": 0.9} | LOOKAHEAD,
}
ASKED = {"tracking": {"norms": True}}


def norm_of(tensors: Any) -> float:
    """Written out, in float64."""
    return math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors))


def norms_of(stepper: Stepper) -> list[float]:
    window = stepper.take_window()
    window.result()
    return list(window.more().values())


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_are_those_of_a_plain_loop(name: str, clip: float | None, graph: bool) -> None:
    """After clipping has seen the gradient as it was, and after slow weights, longest lengths and L2 have done their part."""
    ours, theirs = network(), network()
    config = configured(OPTIMIZERS[name], training={"clip_grad_norm": clip, "ema_decay": 0.9}, **ASKED)
    rules = [Rule(ours.get_parameter("1.weight"), l2=0.03, max_norm=0.4)]
    stepper = stepper_of(config, ours, rules, graph)
    expected = optim.build(config.optimizer, theirs.parameters())
    for group in expected.param_groups:
        group["lr"] = config.lr * group["lr_factor"]
    for batch in batches(7):
        stepper(batch, batch.number)
        expected.zero_grad()
        (F.cross_entropy(theirs(batch.images), batch.labels) + 0.03 * theirs[1].weight.square().sum()).backward()
        gradient = norm_of(p.grad for p in theirs.parameters())
        if clip is not None:
            assert gradient > clip, "the test must really clip"
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        expected.step()
        with torch.no_grad():
            theirs[1].weight.renorm_(2, 0, 0.4)
        # with a graph the rate is a tensor, which timm's Muon multiplies in bf16
        rel = 0.03 if name.startswith("muon") and graph else 1e-4
        assert norms_of(stepper) == pytest.approx([gradient, norm_of(theirs.parameters())], rel=rel), f"step {batch.number}"


def test_several_micro_batches_have_one_norm() -> None:
    config = configured(OPTIMIZERS["sgd"], **ASKED)
    found = []
    for accumulation in (1, 3):
        ours = network()
        plan = make_plan(config, requested_placement(config.resources), 1000)
        plan = dataclasses.replace(plan, accumulation=accumulation)
        optimizer = optim.build(config.optimizer, ours.parameters())
        stepper = Stepper(config, gradient_sync("auto", ours, ALONE), optimizer, None, ALONE, torch.float32, plan)
        for batch in batches(2):
            stepper(batch, batch.number)
        found.append(norms_of(stepper))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_frozen_layers_do_not_count() -> None:
    ours = network()
    ours[1].requires_grad_(False)
    stepper = stepper_of(configured(OPTIMIZERS["sgd"], **ASKED), ours)
    [batch] = batches(1)
    stepper(batch, 0)
    trained = list(ours[3].parameters())
    assert norms_of(stepper) == pytest.approx([norm_of(p.grad for p in trained), norm_of(trained)], rel=1e-6)


def test_a_parameter_without_a_gradient_has_a_length_only() -> None:
    one, other = nn.Parameter(torch.tensor([3.0, 0.0])), nn.Parameter(torch.tensor([[4.0]]))
    one.grad = torch.tensor([0.0, 2.0])
    assert Norms([one, other], clips=False).now().tolist() == [2.0, 5.0]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_one_that_is_not_finite_is_null(tmp_path: Path, clip: float | None) -> None:
    ours = network()
    stepper = stepper_of(configured(OPTIMIZERS["sgd"], training={"clip_grad_norm": clip}, **ASKED), ours)
    ours[3].weight.register_hook(lambda gradient: gradient * math.nan)
    [batch] = batches(1)
    stepper(batch, 0)
    window = stepper.take_window()
    assert math.isfinite(window.result()[0][0])
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = log.write("step", epoch=1, step=1, **window.more())
    log.close()
    assert row["grad_norm"] is row["weight_norm"] is None
    assert is_row(json.loads((tmp_path / "metrics.jsonl").read_text()))


class Counted(TorchDispatchMode):
    """Counts the operations within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_step_does_nothing_for_them(clip: float | None) -> None:
    """But for one copy of the norm that clipping has; and without them, neither does the row."""
    steps, rows = {}, {}
    for asked in (False, True):
        changes: dict[str, Any] = {"tracking": {"norms": asked}, "training": {"clip_grad_norm": clip}}
        stepper = stepper_of(configured(OPTIMIZERS["sgd"], **changes), network())
        first, second = batches(2)
        stepper(first, 0)
        with Counted() as counted:
            stepper(second, 1)
        steps[asked] = counted.names
        with Counted() as counted:
            stepper.take_window().result()
        rows[asked] = counted.names
    assert steps[True] - steps[False] == ({"aten.copy_.default": 1} if clip else {}) and not steps[False] - steps[True]
    assert not any("norm" in name for name in rows[False])
    assert any("norm" in name for name in rows[True]), "it is here that they are computed"
    assert not any("item" in name or "scalar" in name for name in rows[True]), "nothing waits for the device"


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Rows of steps, without what a clock says."""
    rows = [row for row in files.read_json_lines(run.metrics_file) if row["kind"] == "step"]
    return [{name: value for name, value in row.items() if name not in ("time", "images_per_second")} for row in rows]


def test_they_change_nothing_of_what_is_learned(tmp_path: Path, digits_data: Path) -> None:
    assert not difference.matters("tracking.norms", False, True)
    config = ranks.experiment(training={"clip_grad_norm": 1.0})
    assert difference.digest(config) == difference.digest(ranks.experiment(training={"clip_grad_norm": 1.0}, **ASKED))
    rows = {}
    for asked in (False, True):
        changes = {"epochs": 1, "tracking": {"norms": asked}, "training": {"clip_grad_norm": 1.0}}
        run = ranks.new_run(tmp_path, ranks.experiment(**changes))
        ranks.complete(run, digits_data, 1)
        rows[asked] = rows_of(run)
    assert all({"grad_norm", "weight_norm"} <= row.keys() for row in rows[True])
    assert [{k: v for k, v in row.items() if not k.endswith("_norm")} for row in rows[True]] == rows[False]
    steps = [line for line in run.metrics_file.read_bytes().splitlines() if b'"kind": "step"' in line]
    assert all(STEP_LINE.fullmatch(line) for line in steps), "readers that look for epochs need not read them"


@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, {"gradient_sync": "ddp"}, {"clip_grad_norm": 0.5}, {"graph": True}], ids=str)
def test_any_number_of_ranks_has_the_same(tmp_path: Path, digits_data: Path, training: dict[str, Any]) -> None:
    exact = {
        "data": {"batch_size": 128},
        "optimizer": {"lr": 0.02},
        "training": {"precision": "float64", "batch_norm": "global"},
    }
    values = ranks.experiment(**ranks.merge(exact, {"epochs": 1, "training": training, **ASKED})).model_dump()
    values["model"]["layers"] = [layer for layer in values["model"]["layers"] if layer["type"] != "dropout"]
    config = type(ranks.experiment()).model_validate(values)
    found = []
    for world in (1, 2, 4):
        run = ranks.new_run(tmp_path, config)
        ranks.complete(run, digits_data, world)
        found.append([(row["grad_norm"], row["weight_norm"]) for row in rows_of(run)])
    assert len(found[0]) > 10
    for others in found[1:]:
        for step, (one, other) in enumerate(zip(found[0], others, strict=True), 1):
            assert one == pytest.approx(other, rel=1e-8), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "training"), [(1, {"graph": True, "clip_grad_norm": 1.0}), (2, {})], ids=["graph", "ranks"])
def test_rows_after_a_resume_are_the_same_bits(tmp_path: Path, digits_data: Path, world: int, training: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 3}, "training": training, **ASKED}
    undisturbed, killed = (ranks.new_run(tmp_path, ranks.experiment(**changes)) for _ in range(2))
    ranks.complete(undisturbed, digits_data, world)
    for step in (5, 17):
        processes = ranks.start(killed, digits_data, world, environment={rehearsal.VARIABLE: "0.02"})
        ranks.wait_for_step(killed, step, processes)
        ranks.kill_all(processes)
    ranks.complete(killed, digits_data, world)
    assert rows_of(killed) == rows_of(undisturbed)
    assert all(row["grad_norm"] > 0 and row["weight_norm"] > 0 for row in rows_of(killed))
