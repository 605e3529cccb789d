"""Training and validation indices, and the mean and standard deviation of any of them."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .draws import SPLIT, Ints, order

Floats = npt.NDArray[np.float64]


def split(labels: npt.ArrayLike, share: float | Literal["test"], seed: int) -> tuple[Ints, Ints]:
    """Stratified split into training and validation indices, both sorted.

    Args:
        labels: (N,) class of each stored training image.
        share: part held out for validation, or ``"test"``: nothing is held out and the second result is empty.
        seed: ``data.split_seed``. Another seed of the run does not change the split.

    Returns:
        int64 indices; together every index once. The number of training indices is that of ``plan.train_images_of``. Each
        class gives its proportional number of validation images, rounded by largest remainder.

    Raises:
        DataError: there are too few images to hold one out.
    """
    classes = np.asarray(labels, dtype=np.int64)
    everything = np.arange(len(classes), dtype=np.int64)
    if share == "test":
        return everything, everything[:0]
    if len(classes) < 2:
        raise DataError(f"a validation split needs at least 2 training images, there are {len(classes)}")
    held_out = min(max(round(len(classes) * share), 1), len(classes) - 1)
    names, counts = np.unique(classes, return_counts=True)
    quota = held_out * counts  # in units of 1 / len(classes), so that all of this is exact
    taken = quota // len(classes)
    largest_first = np.argsort(-(quota % len(classes)), kind="stable")
    taken[largest_first[: held_out - int(taken.sum())]] += 1
    chosen = np.zeros(len(classes), dtype=np.bool_)
    for name, count in zip(names, taken, strict=True):
        chosen[order(seed, 0, everything[classes == name], SPLIT)[:count]] = True
    return everything[~chosen], everything[chosen]


def fold(labels: npt.ArrayLike, folds: int, number: int, seed: int) -> tuple[Ints, Ints]:
    """Training and validation indices of one fold, both sorted; the folds are disjoint and together hold every image.

    The images are dealt like cards: class after class, each shuffled by ``seed``, one to each fold in turn. So the number of a
    class in any two folds differs by one at most, and the size of a fold is known from the number of images alone.

    Args:
        labels: (N,) class of each stored training image.
        folds: how many there are.
        number: which one is held out, from 0.
        seed: ``data.split_seed``.

    Raises:
        DataError: there are fewer images than folds.
    """
    classes = np.asarray(labels, dtype=np.int64)
    if len(classes) < folds:
        raise DataError(f"{folds} folds need at least {folds} training images, there are {len(classes)}")
    everything = np.arange(len(classes), dtype=np.int64)
    shuffled = [order(seed, 0, everything[classes == name], SPLIT) for name in np.unique(classes)]
    chosen = np.zeros(len(classes), dtype=np.bool_)
    chosen[np.concatenate(shuffled)[number::folds]] = True
    return everything[~chosen], everything[chosen]


def mean_std(moments: npt.ArrayLike, indices: npt.ArrayLike, pixels_per_image: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation per channel over the images ``indices``, in units of the full pixel range (0..1).

    Args:
        moments: int64 (N,2,C) sum and sum of squares of the raw pixels of each image and channel.
        pixels_per_image: height times width.

    Returns:
        float64 (C,) and (C,), from exact integer sums. A channel without variance gets 1, so that dividing by it is harmless.

    Raises:
        DataError: there is no image.
    """
    chosen = np.asarray(moments)[np.asarray(indices, dtype=np.int64)]
    count = len(chosen) * pixels_per_image
    if not count:
        raise DataError("the mean and standard deviation of no images are not defined")
    sums = [int(value) for value in chosen[:, 0].sum(axis=0)]
    squares = [int(value) for value in chosen[:, 1].sum(axis=0)]
    mean = [total / (count * 255) for total in sums]
    variance = [(count * square - total * total) / (count * 255) ** 2 for total, square in zip(sums, squares, strict=True)]
    return np.array(mean), np.array([math.sqrt(value) or 1.0 for value in variance])
