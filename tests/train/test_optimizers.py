"""One step of the trainer against torch written out, for every optimizer and option that changes a step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from steps import ALONE, batches, configured, network, stepper_of
from torch import nn

from hpc_cifar.data.pipeline import Batch
from hpc_cifar.errors import RunError
from hpc_cifar.models.build import Rule, build
from hpc_cifar.models.build import rules as build_rules
from hpc_cifar.plan import make_plan, requested_placement
from hpc_cifar.train import optim
from hpc_cifar.train.distributed import gradient_sync
from hpc_cifar.train.step import Stepper

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


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_l2_is_a_part_of_the_loss(name: str, clip: float | None) -> None:
    """And so of the gradient whose norm is clipped."""
    ours, theirs = network(), network()
    weight = ours.get_parameter("1.weight")
    config = configured({"name": name, "lr": 0.01}, training={"clip_grad_norm": clip})
    stepper = stepper_of(config, ours, [Rule(weight, l2=0.03)])
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    expected = kind(theirs.parameters(), lr=0.01)
    for batch in batches(3):
        stepper(batch, batch.number)
        loss = F.cross_entropy(theirs(batch.images), batch.labels) + 0.03 * theirs.get_parameter("1.weight").square().sum()
        expected.zero_grad()
        loss.backward()
        if clip is not None:
            assert nn.utils.clip_grad_norm_(theirs.parameters(), clip) > clip
        expected.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert optim.penalty([Rule(weight, l2=0.03)]) == pytest.approx(0.03 * weight.square().sum().item(), rel=1e-5)


def test_biases_of_normalisations_move_faster_and_shrink_no_faster() -> None:
    layers = [{"conv": {"filters": 4, "bias_lr_factor": 4}}, "batch_norm", "relu", "flatten", {"dense": {"units": 10}}]
    config = configured(
        {"name": "sgd", "lr": 0.01, "weight_decay": 0.5, "norm_bias_lr_factor": 8.0},
        model={"family": "sequential", "layers": layers},
    )
    ours = build(config.model, (3, 8, 8))
    bias, other = ours.get_parameter("1.bias"), ours.get_parameter("0.bias")
    with torch.no_grad():
        bias.fill_(1.0)
        other.fill_(1.0)
    before = ours.state_dict()["4.weight"].clone()
    rules = build_rules(config.model, ours, config.optimizer.norm_bias_lr_factor)
    stepper = stepper_of(config, ours, rules)
    batch = next(batches(1))
    gradients = {}
    copy = build(config.model, (3, 8, 8))
    copy.load_state_dict(ours.state_dict())
    F.cross_entropy(copy(batch.images), batch.labels).backward()
    for name, parameter in copy.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    stepper(batch, 0)
    torch.testing.assert_close(bias.detach(), 1 - 0.01 * (8 * gradients["1.bias"] + 0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.detach(), 1 - 0.01 * (4 * gradients["0.bias"] + 0.5), rtol=1e-5, atol=1e-6)
    expected = before - 0.01 * (gradients["4.weight"] + 0.5 * before)
    torch.testing.assert_close(ours.get_parameter("4.weight").detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_whose_rate_falls_to_nothing_by_itself() -> None:
    layers = [{"conv": {"filters": 4, "bias_lr_factor": 3, "bias_epochs": 2}}, "relu", "flatten", {"dense": {"units": 10}}]
    changes = {"schedule": {"name": "linear", "warmup_epochs": 0}, "model": {"family": "sequential", "layers": layers}}
    config = configured({"name": "sgd", "lr": 0.1, "weight_decay": 0.3}, **changes)
    network = build(config.model, (3, 8, 8))
    stepper = stepper_of(config, network, build_rules(config.model, network), stored=24)  # two steps an epoch
    per_epoch = stepper._plan.steps_per_epoch
    bias, rates, still = network.get_parameter("0.bias"), [], []
    for batch in batches(3 * per_epoch):
        before = bias.detach().clone()
        stepper(batch, batch.number)
        rates.append([group["lr"] for group in stepper._optimizer.param_groups if "lr_epochs" in group])
        still.append(torch.equal(bias, before))
    falling = [[0.3 * max(0.0, 1 - step / (2 * per_epoch))] for step in range(3 * per_epoch)]
    assert rates == [pytest.approx(rate) for rate in falling]
    assert still == [False] * 2 * per_epoch + [True] * per_epoch


def test_norms_and_rates_of_single_parameters() -> None:
    ours = network()
    first, last = ours.get_parameter("1.weight"), ours.get_parameter("3.weight")
    before = last.detach().clone()
    stepper = stepper_of(configured({"name": "sgd", "lr": 0.5}), ours, [Rule(first, max_norm=0.4), Rule(last, lr_factor=0.0)])
    for batch in batches(3):
        stepper(batch, batch.number)
        lengths = first.detach().flatten(1).norm(dim=1)
        assert (lengths <= 0.4 + 1e-6).all() and (lengths > 0.39).any()
    assert torch.equal(last, before)
    assert stepper.rate == 0.5


TIMMS: dict[str, tuple[dict[str, Any], list[float]]] = {  # with what each group's rate is multiplied by
    "muon": ({"name": "muon", "lr": 0.05, "other_lr": 0.01}, [1.0, 0.2]),
    "muon and sgd": ({"name": "muon", "lr": 0.05, "other": "sgd", "other_lr": 0.1, "last_layer_lr": 0.2}, [1.0, 2.0, 4.0]),
    "lars": ({"name": "lars", "lr": 5.0}, [1.0, 1.0]),
}


@pytest.mark.parametrize("name", TIMMS)
def test_optimizers_of_timm_learn_and_restore(name: str) -> None:
    """A state that was read back goes on as one that was kept, for the optimizers that torch has not got."""
    options, factors = TIMMS[name]
    config = configured(options | {"lookahead": {"steps": 2}})
    ours = network()
    optimizer = optim.build(config.optimizer, ours.parameters())
    weights = ours.get_parameter("1.weight")

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for batch in list(batches(2)) * 8:
            loss = F.cross_entropy(net(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first = steps(ours, optimizer)
    assert sum(first[-2:]) < 0.8 * sum(first[:2]), first
    groups = optimizer.param_groups
    assert [group["lr_factor"] for group in groups] == pytest.approx(factors)
    other = network()
    other.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    restored = optim.build(config.optimizer, other.parameters())
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert steps(ours, optimizer) == steps(other, restored)
    assert torch.equal(weights, other.get_parameter("1.weight"))


def orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Jordan's polynomial of degree 5 on the singular values."""
    x = matrix / matrix.norm()
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    for _ in range(steps):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def test_muon_with_sgd_beside_it_as_it_is_written_out() -> None:
    """Weights of a length, updates that are turned to be orthogonal, SGD for biases and the last layer."""
    options = {
        "name": "muon",
        "lr": 0.2,
        "momentum": 0.6,
        "newton_schulz_steps": 3,
        "newton_schulz_coefficients": "original",
        "normalize_weights": True,
        "other": "sgd",
        "other_lr": 0.05,
        "other_momentum": 0.8,
        "other_weight_decay": 0.1,
        "last_layer_lr": 0.5,
    }
    ours, theirs = network(), network()
    stepper = stepper_of(configured(options), ours, [])
    weight, bias, last, last_bias = theirs.parameters()
    groups = [
        {"params": [bias, last_bias], "lr": 0.05, "weight_decay": 0.1},
        {"params": [last], "lr": 0.5, "weight_decay": 0.01},  # rate times decay stays
    ]
    sgd = torch.optim.SGD(groups, momentum=0.8, nesterov=True)
    kept = torch.zeros_like(weight)
    for batch in batches(3):
        stepper(batch, batch.number)
        theirs.zero_grad()
        F.cross_entropy(theirs(batch.images), batch.labels).backward()
        sgd.step()
        with torch.no_grad():
            assert weight.grad is not None
            kept = 0.6 * kept + weight.grad
            weight *= len(weight) ** 0.5 / weight.norm()
            weight -= 0.2 * orthogonal(weight.grad + 0.6 * kept, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.004)  # timm turns in bf16


@pytest.mark.parametrize("more", [{}, {"other_beta1": 0.8, "other_beta2": 0.95, "other_eps": 1e-4}])
def test_adamw_beside_muon_is_adamw(more: dict[str, float]) -> None:
    """torch's, on biases and the last layer, with its own rate and decay."""
    ours, theirs = network(), network()
    options = {"name": "muon", "lr": 0.02, "other_lr": 0.01, "last_layer_lr": 0.04, "other_weight_decay": 0.1, **more}
    stepper = stepper_of(configured(options), ours, [])
    names = ("1.bias", "3.bias", "3.weight")
    groups = [
        {"params": [theirs.get_parameter(name) for name in names[:2]], "lr": 0.01, "weight_decay": 0.1},
        {"params": [theirs.get_parameter(names[2])], "lr": 0.04, "weight_decay": 0.025},
    ]
    betas = (more.get("other_beta1", 0.9), more.get("other_beta2", 0.999))
    adamw = torch.optim.AdamW(groups, betas=betas, eps=more.get("other_eps", 1e-8))
    for batch in batches(3):
        theirs.load_state_dict(theirs.state_dict() | {"1.weight": ours.get_parameter("1.weight").detach().clone()})
        stepper(batch, batch.number)
        theirs.zero_grad()
        F.cross_entropy(theirs(batch.images), batch.labels).backward()
        adamw.step()
        for name in names:
            torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_a_state_with_l2_in_its_decay_counts_it_once() -> None:
    """As an earlier version saved it."""
    config = configured({"name": "sgd", "lr": 0.1, "weight_decay": 1e-4})
    optimizer = optim.build(config.optimizer, network().parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["weight_decay"] = 1e-4 + 2 * 0.01
    optim.restore(optimizer, saved)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_a_state_of_an_optimizer_that_worked_otherwise_is_refused() -> None:
    """Before, timm's Muon updated all, and the layers with L2 were a group of their own."""
    from timm.optim.muon import Muon as TimmMuon

    config = configured({"name": "muon", "lr": 0.02})
    ours = optim.build(config.optimizer, network().parameters())
    groups = [{"params": list(group["params"]), "use_muon": group["use_muon"]} for group in ours.param_groups]
    with pytest.raises(RunError, match="of an earlier version of hpc-cifar"):
        optim.restore(ours, TimmMuon(groups, lr=0.02).state_dict())
    adam = optim.build(configured({"name": "adam", "lr": 0.02}).optimizer, network().parameters())
    first, *rest = network().parameters()
    apart = torch.optim.Adam([{"params": [first], "weight_decay": 2e-4}, {"params": rest}], lr=0.02)
    with pytest.raises(RunError, match="of an earlier version of hpc-cifar"):
        optim.restore(adam, apart.state_dict())


@pytest.mark.parametrize("other", ["adamw", "sgd"])
def test_muon_beside_a_graph_ends_where_the_eager_mode_does(other: str) -> None:
    options = {"name": "muon", "lr": 0.02, "other": other, "other_lr": 0.01, "normalize_weights": True, "weight_decay": 0.01}
    networks = [network(), network()]
    steppers = [
        stepper_of(configured(options | {"lookahead": {"steps": 2}}), one, [], graph)
        for one, graph in zip(networks, (False, True), strict=True)
    ]
    for batch in batches(7):
        for stepper in steppers:
            stepper(batch, batch.number)
    for a, b, start in zip(*(one.parameters() for one in (*networks, network())), strict=True):
        moved = (a - start).abs().max().item()
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.03 * moved)  # a rate on the device is multiplied in bf16


@pytest.mark.parametrize("options", [{"name": "adam"}, {"name": "muon"}, {"name": "muon", "other": "sgd", "other_lr": 0.1}])
def test_a_state_goes_on_in_another_mode(options: dict[str, Any]) -> None:
    """Saved without recording and continued with it, and back; a device without memory stands for a GPU."""
    config = configured(options)
    ours = network()
    eager = optim.build(config.optimizer, ours.parameters())
    for batch in batches(2):
        F.cross_entropy(ours(batch.images), batch.labels).backward()
        eager.step()
    recorded = optim.build(config.optimizer, network().to("meta").parameters(), capturable=True)
    optim.restore(recorded, copy.deepcopy(eager.state_dict()))
    assert all(group.get("capturable", True) for group in recorded.param_groups)
    counts = [state["step"] for state in recorded.state.values() if "step" in state]
    assert all(count.is_meta for count in counts) and bool(counts) == (options.get("other") != "sgd")
    saved = copy.deepcopy(eager.state_dict())
    for group in saved["param_groups"]:
        group |= {"capturable": True} if "capturable" in group else {}
    optim.restore(eager, saved)
    assert not any(group.get("capturable", False) for group in eager.param_groups)
    eager.step()


def test_a_rehearsal_rests_once_a_step() -> None:
    options = {"name": "muon", "other": "sgd", "lookahead": {"steps": 2}}  # optimizers in an optimizer in another
    stepper = stepper_of(configured(options), network(), [])
    rests: list[int] = []
    stepper.rest = lambda: rests.append(stepper.seen)
    for batch in batches(3):
        stepper(batch, batch.number)
    assert rests == [1, 2, 3]


def test_lars_steps_are_relative_to_the_weights() -> None:
    """With no decay at all, too; biases take plain steps."""
    ours = network()
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    stepper = stepper_of(configured({"name": "lars", "lr": 2.0, "momentum": 0.0, "trust_coefficient": 0.01}), ours, [])
    [batch] = batches(1)
    stepper(batch, 0)
    theirs = network()
    F.cross_entropy(theirs(batch.images), batch.labels).backward()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        scale = 0.01 * before[name].norm() / parameter.grad.norm() if parameter.dim() > 1 else 1.0
        expected = before[name] - 2.0 * scale * parameter.grad
        torch.testing.assert_close(ours.get_parameter(name), expected, rtol=1e-4, atol=1e-6)


def test_rates_grow_with_the_batch() -> None:
    ours = network()
    stepper = stepper_of(configured({"name": "sgd", "lr": 0.1, "base_batch_size": 48}), ours, [])
    for batch in batches(1):
        assert stepper(batch, 0) == pytest.approx(0.1 * 12 / 48)
