"""The sequential family and BatchNorm over all ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn

from hpc_cifar.config.layers import LAYER_NAMES
from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import SequentialModel
from hpc_cifar.config.shapes import layer_shapes
from hpc_cifar.models.batch_norm import BatchNorm
from hpc_cifar.models.build import build, initialise_from_images

EVERY_LAYER: list[Any] = [
    {"conv": {"filters": 6, "kernel": 5, "padding": "valid", "bias": False}},
    {"batch_norm": {"momentum": 0.8, "eps": 1e-3}},
    "relu",
    {"conv": {"filters": 8, "kernel": 4, "stride": 2, "padding": 1}},
    "gelu",
    {"drop_block": {"rate": 0.1, "size": 3}},
    {
        "residual": {
            "layers": [{"conv": {"filters": 12, "stride": 2, "fixed_weights": True}}, {"batch_norm": {"scale": False}}, "relu"],
            "shortcut": [{"conv": {"filters": 12, "kernel": 1, "stride": 2, "bias": False}}, "batch_norm"],
        }
    },
    {"residual": {"layers": ["relu", {"conv": {"filters": 12}}]}},
    {"avg_pool": {"size": 2}},
    "silu",
    {"conv": {"filters": 9}},
    {"max_pool": {"size": 3}},
    {"dropout": {"rate": 0.5}},
    "tanh",
    {"aptx": {"beta": 0.5}},
    "flatten",
    {"dense": {"units": 20, "bias": False}},
    "batch_norm",
    {"dense": {"units": 10}},
]


def model(layers: list[Any], **options: Any) -> SequentialModel:
    return SequentialModel.model_validate({"family": "sequential", "layers": layers, **options})


@pytest.mark.parametrize("pool", ["global_avg_pool", "global_max_pool", "flatten"])
def test_shapes_and_counts_by_arithmetic_are_those_of_torch(pool: str) -> None:
    layers = [*EVERY_LAYER]
    layers[layers.index("flatten")] = pool
    config = model(layers)
    network = build(config, (3, 32, 32))
    x = torch.zeros(2, 3, 32, 32)
    network.eval()
    for spec, module in zip(layer_shapes(config, (3, 32, 32)), network, strict=True):  # type: ignore[call-overload]
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == spec.parameters, spec
        kept = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
        assert sum(tensor.numel() for tensor in kept) == spec.buffers, spec
        x = module(x)
        assert tuple(x.shape[1:]) == tuple(spec.out_shape), spec
    assert build(config, (3, 32, 32)).train()(torch.randn(4, 3, 32, 32)).shape == (4, 10)


def test_every_layer_is_built() -> None:
    used = {layer if isinstance(layer, str) else next(iter(layer)) for layer in EVERY_LAYER}
    assert used | {"global_avg_pool", "global_max_pool"} == set(LAYER_NAMES)


def test_a_block_adds_its_two_ways() -> None:
    layers = [{"residual": {"layers": [{"conv": {"filters": 3}}]}}, "flatten", {"dense": {"units": 10}}]
    network = build(model(layers), (3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    block = network.get_submodule("0")
    convolution = network.get_submodule("0.body.0")
    torch.testing.assert_close(block(x), convolution(x) + x)


def test_deep300_has_the_parameters_of_its_table(repository: Path) -> None:
    network = build(load_experiment(repository / "jobs" / "deep300.yaml").model, (3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == 551_722


@pytest.mark.parametrize("init", ["torch", "glorot_uniform", "he_normal"])
def test_initialisation_depends_on_the_seed_alone(init: str) -> None:
    config = model(["flatten", {"dense": {"units": 50}}, {"dense": {"units": 10}}], init=init)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append([p.detach().clone() for p in build(config, (3, 32, 32)).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    spread = {"glorot_uniform": (2 / (3072 + 50)) ** 0.5, "he_normal": (2 / 3072) ** 0.5}.get(init)
    if spread:
        assert float(weights[0][0].std()) == pytest.approx(spread, rel=0.02)
        assert float(weights[0][1].abs().max()) == 0


def test_dirac_passes_channels_through() -> None:
    layers = [{"conv": {"filters": 4}}, {"conv": {"filters": 6}}, "global_avg_pool", {"dense": {"units": 10}}]
    network = build(model(layers, init="dirac"), (3, 32, 32))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        y = network[1](x) - network[1].bias.view(1, -1, 1, 1)  # type: ignore[index]
    torch.testing.assert_close(y[:, :4], x)
    assert not torch.equal(y[:, 4:], torch.zeros(2, 2, 8, 8))


def test_whitening_makes_the_first_layer_s_outputs_uncorrelated() -> None:
    """Of the images that it was computed from; the second half of the filters are the first with the other sign."""
    layers = [{"conv": {"filters": 24, "kernel": 2, "padding": "valid", "init": "whiten"}}, "flatten", {"dense": {"units": 10}}]
    config = model(layers)
    network = build(config, (3, 32, 32))
    images = torch.nn.functional.avg_pool2d(torch.randn(50, 3, 34, 34, generator=torch.Generator().manual_seed(1)), 3, 1)
    initialise_from_images(config, network, lambda: images)
    out = network[0](images).detach()  # type: ignore[index]
    values = out[:, :12].double().transpose(0, 1).flatten(1)
    variances = torch.diagonal(values @ values.T / values.shape[1])
    assert (variances[:4] > 0.9).all() and (variances < 1).all(), "a small constant is added to the smallest ones"
    correlation = (values / variances.sqrt()[:, None]) @ (values / variances.sqrt()[:, None]).T / values.shape[1]
    torch.testing.assert_close(correlation, torch.eye(12, dtype=torch.float64), atol=2e-3, rtol=0)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    assert variances[0] == variances.max(), "main direction first"


def test_whitening_adds_to_the_variances_what_the_job_says() -> None:
    """Each direction's variance v becomes v / (v + eps), from which v follows."""
    images = torch.randn(50, 3, 12, 12, generator=torch.Generator().manual_seed(1)).cumsum(3)
    found = []
    for eps in (0.1, 1.0):
        conv = {"filters": 24, "kernel": 2, "padding": "valid", "init": "whiten", "whiten_eps": eps}
        config = model([{"conv": conv}, "flatten", {"dense": {"units": 10}}])
        network = build(config, (3, 12, 12))
        initialise_from_images(config, network, lambda: images)
        values = network[0](images).detach()[:, :12].double().transpose(0, 1).flatten(1)  # type: ignore[index]
        variances = values.square().mean(1)
        found.append(eps * variances / (1 - variances))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0.0)


def test_images_are_read_only_where_they_are_needed() -> None:
    config = model(["flatten", {"dense": {"units": 10}}])
    initialise_from_images(config, build(config, (3, 32, 32)), lambda: pytest.fail("nobody asked for images"))


def test_aptx() -> None:
    config = model([{"aptx": {}}, "flatten", {"dense": {"units": 10}}])
    x = torch.linspace(-4, 4, 3 * 32 * 32).reshape(1, 3, 32, 32)
    torch.testing.assert_close(build(config, (3, 32, 32))[0](x), (1 + torch.tanh(x)) * 0.5 * x)  # type: ignore[index]


def test_batch_of_one_keeps_the_running_statistics() -> None:
    norm = BatchNorm(3)
    norm(torch.randn(8, 3))
    before = norm.running_mean.clone()
    assert torch.isfinite(norm(torch.randn(1, 3))).all()
    assert torch.equal(norm.running_mean, before)


def test_local_statistics_equal_torch() -> None:
    ours, theirs = BatchNorm(5, keep=0.7, eps=1e-3), nn.BatchNorm2d(5, momentum=0.3, eps=1e-3)
    x = torch.randn(6, 5, 4, 4)
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def _rank(rank: int, sizes: list[int], port: int, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(sizes))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 4, 3, 3, generator=generator, dtype=torch.float32) * 3 + 5
    target = torch.randn(sum(sizes), 4, 3, 3, generator=generator)
    start = sum(sizes[:rank])
    mine = x[start : start + sizes[rank]].clone().requires_grad_()
    norm = BatchNorm(4, keep=0.9, over_all_ranks=True)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 5.0))
    y = norm(mine)
    (y * target[start : start + sizes[rank]]).sum().backward()
    for tensor in (norm.weight.grad, norm.bias.grad):
        dist.all_reduce(tensor)
    queue.put(
        (
            rank,
            [t.detach().numpy() for t in (y, mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)],
        )
    )
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[4, 4], [5, 3], [3, 2, 4], [7, 0, 1]])
def test_statistics_over_all_ranks_equal_the_joint_batch(sizes: list[int]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_rank, args=(rank, sizes, port, queue)) for rank in range(len(sizes))]
    for child in children:
        child.start()
    results = dict(queue.get(timeout=90) for _ in sizes)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(sum(sizes), 4, 3, 3, generator=generator) * 3 + 5).requires_grad_()
    target = torch.randn(sum(sizes), 4, 3, 3, generator=generator)
    norm = nn.BatchNorm2d(4, momentum=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 5.0))
    y = norm(x)
    (y * target).sum().backward()
    joint = [torch.cat([torch.from_numpy(results[rank][k]) for rank in range(len(sizes))]) for k in (0, 1)]
    torch.testing.assert_close(joint[0], y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joint[1], x.grad, rtol=1e-4, atol=1e-4)
    for rank in range(len(sizes)):
        for k, expected in enumerate((norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var), 2):
            torch.testing.assert_close(torch.from_numpy(results[rank][k]), expected, rtol=1e-4, atol=1e-4)


def test_layer_shorthand_and_long_form_agree() -> None:
    adapter = TypeAdapter(SequentialModel)
    short = adapter.validate_python({"family": "sequential", "layers": ["relu", {"conv": {"filters": 3}}]})
    long = adapter.validate_python({"family": "sequential", "layers": [{"type": "relu"}, {"type": "conv", "filters": 3}]})
    assert short == long
