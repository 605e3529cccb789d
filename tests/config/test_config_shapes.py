"""Shapes and parameter counts by arithmetic; tests/models compares them with what torch builds."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_cifar.config.load import load_experiment
from hpc_cifar.config.model import SequentialModel
from hpc_cifar.config.packaged import find_job
from hpc_cifar.config.shapes import ShapeError, layer_shapes, parameter_count


def network(*layers: Any) -> SequentialModel:
    return SequentialModel.model_validate({"family": "sequential", "layers": layers})


def test_deep300_has_the_parameters_of_its_source() -> None:
    rows = layer_shapes(load_experiment(find_job("deep300")).model, classes=10)
    assert parameter_count(rows) == 551_722
    assert sum(row.buffers for row in rows) == 2 * (2 * (32 + 64 + 128) + 128)
    assert rows[0].in_shape == (3, 32, 32)
    assert rows[6].out_shape == (32, 16, 16)
    assert rows[-1].out_shape == (10,)


@pytest.mark.parametrize(
    ("layers", "parameters"),
    [
        (["flatten", {"dense": {"units": 10}}], 30_730),
        (["flatten", {"dense": {"units": 100}}, {"dense": {"units": 50}}, {"dense": {"units": 10}}], 307_300 + 5_050 + 510),
        ([{"conv": {"filters": 50}}, "relu", "flatten", {"dense": {"units": 10}}], 513_400 + 10),
    ],
)
def test_counts_of_the_source_documents(layers: list[Any], parameters: int) -> None:
    assert parameter_count(layer_shapes(network(*layers), classes=10)) == parameters


@pytest.mark.parametrize(
    ("options", "out"),
    [
        ({"kernel": 3}, (8, 32, 32)),
        ({"kernel": 5, "padding": "valid"}, (8, 28, 28)),
        ({"kernel": 2, "padding": "valid"}, (8, 31, 31)),
        ({"kernel": 3, "stride": 2}, (8, 16, 16)),
        ({"kernel": 3, "padding": 2}, (8, 34, 34)),
        ({"kernel": 32, "padding": "valid"}, (8, 1, 1)),
    ],
)
def test_convolution(options: dict[str, Any], out: tuple[int, ...]) -> None:
    rows = layer_shapes(network({"conv": {"filters": 8, **options}}, "flatten"))
    assert rows[0].out_shape == out
    assert rows[0].parameters == options["kernel"] ** 2 * 3 * 8 + 8


def test_without_bias() -> None:
    rows = layer_shapes(network({"conv": {"filters": 8, "bias": False}}, "flatten", {"dense": {"units": 1, "bias": False}}))
    assert [row.parameters for row in rows] == [216, 0, 8 * 1024]


def test_what_is_not_trained_counts_as_buffers() -> None:
    conv, norm = {"filters": 8, "fixed_weights": True}, {"batch_norm": {"scale": False}}
    rows = layer_shapes(network({"conv": conv}, norm, {"residual": {"layers": [{"conv": conv}, norm]}}, "flatten"))
    assert [(row.parameters, row.buffers) for row in rows] == [(8, 216), (8, 24), (8 + 8, 576 + 24), (0, 0)]


def test_pools() -> None:
    rows = layer_shapes(network({"max_pool": {"size": 3}}, "avg_pool", "global_avg_pool", "batch_norm"))
    assert [row.out_shape for row in rows] == [(3, 10, 10), (3, 5, 5), (3,), (3,)]
    assert (rows[3].parameters, rows[3].buffers) == (6, 6)


@pytest.mark.parametrize(
    ("layers", "index", "words"),
    [
        (
            ["flatten", "relu", {"conv": {"filters": 3}}],
            2,
            "conv needs an input of channels x height x width, but gets 3,072",
        ),
        ([{"dense": {"units": 10}}], 0, "dense needs a flat input, but gets 3x32x32"),
        (
            [{"residual": {"layers": [{"conv": {"filters": 8, "stride": 2}}]}}],
            0,
            "residual cannot add its layers' 8x16x16: it has no shortcut, so the input is added, which is 3x32x32; a shortcut",
        ),
        (
            [{"residual": {"layers": [{"conv": {"filters": 8}}], "shortcut": ["flatten", "max_pool"]}}],
            0,
            "residual shortcut[1]: max_pool needs an input",
        ),
        ([{"residual": {"layers": [{"conv": {"filters": 6, "init": "whiten"}}]}}], 0, "conv with init: whiten belongs at the"),
        (["flatten", "max_pool"], 1, "max_pool needs an input"),
        (["global_avg_pool", "global_avg_pool"], 1, "global_avg_pool needs an input"),
        ([{"max_pool": {"size": 64}}], 0, "max_pool of size 64 is larger than its input of 3x32x32"),
        ([{"conv": {"filters": 3, "kernel": 33, "padding": "valid"}}], 0, "conv with a 33x33 kernel does not fit its input"),
        (["relu"], 0, "relu is the last layer and delivers 3x32x32"),
        (["flatten"], 0, "flatten is the last layer and delivers 3,072 values, but there are 10 classes"),
        (["flatten", {"dense": {"units": 10}}, {"dense": {"units": 10}}], 2, "dense is a second head: layer 1 gives one score"),
        (["global_avg_pool"], 0, "global_avg_pool is the last layer and delivers 3 values, but there are 10 classes"),
        ([{"drop_block": {"rate": 0.1, "size": 33}}], 0, "drop_block of size 33 is larger than its input of 3x32x32"),
        (["relu", {"conv": {"filters": 2, "init": "whiten"}}], 1, "conv with init: whiten belongs at the beginning"),
        ([{"conv": {"filters": 3, "init": "whiten"}}], 0, "conv with init: whiten needs an even number of filters, at most 54"),
        ([{"conv": {"filters": 26, "kernel": 2, "padding": "valid", "init": "whiten"}}], 0, "conv with init: whiten needs an"),
    ],
)
def test_what_does_not_fit(layers: list[Any], index: int, words: str) -> None:
    with pytest.raises(ShapeError, match=r"model\.layers") as caught:
        layer_shapes(network(*layers), classes=10)
    assert caught.value.index == index
    assert caught.value.message.startswith(words)


def test_a_network_without_weights_has_nothing_to_train() -> None:
    with pytest.raises(ShapeError, match="none has a weight: there is nothing to train"):
        layer_shapes(network("global_avg_pool"), classes=3)
