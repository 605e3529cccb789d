"""The validation split and the exact mean and standard deviation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cifar.config.experiment import Experiment
from hpc_cifar.data.split import fold, mean_std, split
from hpc_cifar.data.store import moments_of
from hpc_cifar.errors import DataError
from hpc_cifar.plan import train_images_of


def experiment(share: object = 0.1, **data: object) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "x",
            "epochs": 1,
            "model": {"family": "sequential", "layers": ["flatten", {"dense": {"units": 10}}]},
            "data": {"batch_size": 4, "validation": share, **data},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=300), st.floats(0.001, 0.999), st.integers(0, 2**63 - 1))
def test_a_split_is_stratified_and_exact(labels: list[int], share: float, seed: int) -> None:
    train, validation = split(labels, share, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist()) and validation.tolist() == sorted(validation.tolist())
    held_out = len(validation)
    assert held_out == min(max(round(len(labels) * share), 1), len(labels) - 1)
    for name in set(labels):
        here = sum(labels[i] == name for i in validation)
        assert abs(here - held_out * labels.count(name) / len(labels)) < 1


@pytest.mark.parametrize("share", [0.1, 0.25, 0.0001, 0.9999, "test"])
def test_the_plan_counts_the_same(share: object) -> None:
    labels = np.arange(5000) % 10
    train, validation = split(labels, share, 0)  # type: ignore[arg-type]
    planned = train_images_of(experiment(share), 5000)
    assert len(train) == planned and len(validation) == 5000 - planned


def test_seeds_give_other_splits() -> None:
    labels = np.arange(1000) % 10
    one, same, other = (split(labels, 0.1, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.bincount(labels[one]).tolist() == [10] * 10


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least 2"):
        split([0], 0.5, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=300), st.integers(2, 12), st.integers(0, 2**63 - 1))
def test_folds_are_disjoint_covering_and_stratified(labels: list[int], folds: int, seed: int) -> None:
    if len(labels) < folds:
        with pytest.raises(DataError, match=f"{folds} folds need at least {folds} training images"):
            fold(labels, folds, 0, seed)
        return
    held_out = []
    for number in range(folds):
        train, validation = fold(labels, folds, number, seed)
        assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
        assert train.tolist() == sorted(train.tolist()) and validation.tolist() == sorted(validation.tolist())
        assert len(train) == train_images_of(experiment(folds=folds, fold=number), len(labels))
        for name in set(labels):
            share = labels.count(name) / folds
            assert abs(sum(labels[index] == name for index in validation) - share) < 1
        held_out += validation.tolist()
    assert sorted(held_out) == list(range(len(labels))), "each image is in exactly one fold"


def test_seeds_give_other_folds() -> None:
    labels = np.arange(1000) % 10
    one, same, other = (fold(labels, 5, 2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.bincount(labels[one]).tolist() == [20] * 10


def test_mean_and_std_are_those_of_the_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    chosen = np.arange(0, 300, 3)
    mean, std = mean_std(moments_of(images), chosen, 64)
    pixels = images[chosen].reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_constant_channels_and_no_images() -> None:
    images = np.full((3, 4, 4, 1), 7, np.uint8)
    mean, std = mean_std(moments_of(images), [0, 1, 2], 16)
    assert mean.tolist() == [7 / 255] and std.tolist() == [1.0]
    with pytest.raises(DataError):
        mean_std(moments_of(images), [], 16)
