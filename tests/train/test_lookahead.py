"""Lookahead against its first algorithm written out, resumed at any step, and beside a graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import batches, configured, network, stepper_of

from hpc_cifar.models.build import Rule
from hpc_cifar.train import optim


@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("graph", [False, True])
def test_lookahead_goes_back_half_of_the_way(name: str, graph: bool) -> None:
    """From the initial weights on, as the first algorithm of Zhang et al. 2019 has it."""
    ours, theirs = network(), network()
    options = {"sgd": {"lr": 0.1, "momentum": 0.9}, "adam": {"lr": 0.01}, "muon": {"lr": 0.02, "newton_schulz_steps": 3}}[name]
    plain = configured({"name": name, **options})
    stepper = stepper_of(configured({"name": name, **options, "lookahead": {"steps": 2, "alpha": 0.5}}), ours, [], graph)
    expected = optim.build(plain.optimizer, theirs.parameters())
    for group in expected.param_groups:
        group["lr"] = plain.lr * group["lr_factor"]
    slow = [p.detach().clone() for p in theirs.parameters()]
    for batch in batches(6):
        stepper(batch, batch.number)
        expected.zero_grad()
        F.cross_entropy(theirs(batch.images), batch.labels).backward()
        expected.step()
        if batch.number % 2:
            with torch.no_grad():
                fast = [p.clone() for p in theirs.parameters()]
                slow = [(a + b) / 2 for a, b in zip(slow, fast, strict=True)]
                for p, value in zip(theirs.parameters(), slow, strict=True):
                    p.copy_(value)
    for a, b, start in zip(ours.parameters(), theirs.parameters(), network().parameters(), strict=True):
        moved = (a - start).abs().max().item()
        # with a graph the rate is a tensor, which timm's Muon multiplies in bf16
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.03 * moved if name == "muon" and graph else 1e-5)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_lookahead_goes_on_from_a_state_saved_at_any_step(stop: int) -> None:
    options = {"name": "adam", "lr": 0.01, "lookahead": {"steps": 3, "alpha": 0.5}}
    whole, first, second = network(), network(), network()
    through, before, after = (stepper_of(configured(options), one, []) for one in (whole, first, second))
    for batch in batches(7):
        through(batch, batch.number)
        (before if batch.number < stop else after)(batch, batch.number)
        if batch.number + 1 == stop:
            second.load_state_dict(first.state_dict())
            optim.restore(after._optimizer, copy.deepcopy(before._optimizer.state_dict()))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lookahead_beside_a_graph_ends_where_the_eager_mode_does() -> None:
    """With what comes after it: norms that are kept, and an average of the weights."""
    options = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "lookahead": {"steps": 2, "alpha": 0.5}}
    config = configured(options, training={"ema_decay": 0.9})
    networks = [network(), network()]
    steppers = [
        stepper_of(config, one, [Rule(one.get_parameter("1.weight"), max_norm=0.5)], graph)
        for one, graph in zip(networks, (False, True), strict=True)
    ]
    for batch in batches(7):
        for stepper in steppers:
            stepper(batch, batch.number)
    eager, graph = networks
    for a, b in zip(eager.parameters(), graph.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(*(stepper._ema.shadow for stepper in steppers if stepper._ema), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
