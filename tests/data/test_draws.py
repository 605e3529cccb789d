"""Order and draws: pure, uniform, independent, and never renumbered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import draws
from hpc_cifar.data.split import split
from hpc_cifar.train.step import seed_of_step

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10**6)
EXPECTED_HASHES = ["0x8eb48541b0082a7", "0x61536fcdf32f0acb", "0xc4d90628a97cf023"]
EXPECTED_ORDER = [9, 2, 3, 4, 8, 1, 5, 0, 7, 6]


def chi_square(counts: np.ndarray) -> float:
    """Standard scores of the chi-square statistic for equal probabilities; about normal for many cells."""
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1)))


@settings(max_examples=50, deadline=None)
@given(SEEDS, EPOCHS, st.lists(st.integers(0, 2**40), unique=True, max_size=200))
def test_order_is_a_permutation_whatever_comes_first(seed: int, epoch: int, indices: list[int]) -> None:
    order = draws.order(seed, epoch, indices)
    assert sorted(order.tolist()) == sorted(indices)
    assert order.dtype == np.int64
    assert np.array_equal(order, draws.order(seed, epoch, indices[::-1]))


@settings(max_examples=50, deadline=None)
@given(SEEDS, EPOCHS, st.integers(0, 64), st.integers(0, 64), st.sampled_from(["none", "random", "alternating"]))
def test_draws_are_in_range_and_belong_to_the_sample(seed: int, epoch: int, pad: int, cutout: int, flip: str) -> None:
    augment = Augment(crop_padding=pad, cutout=cutout, flip=flip)
    samples = np.arange(50)
    drawn = draws.augmentation(seed, epoch, samples, augment, 32)
    for values, bound in ((drawn.dy, 2 * pad), (drawn.dx, 2 * pad), (drawn.cut_y, 31), (drawn.cut_x, 31)):
        assert values.min() >= 0 and values.max() <= bound and values.dtype == np.int64
    assert flip != "none" or not drawn.flip.any()
    alone = draws.augmentation(seed, epoch, samples[17:18], augment, 32)  # the neighbours in a batch do not matter
    for name in ("dy", "dx", "flip", "cut_y", "cut_x"):
        assert getattr(alone, name)[0] == getattr(drawn, name)[17]


@pytest.mark.parametrize("seed,epoch", [(0, 0), (0, 1), (1, 0), (42, 299), (2**63 - 1, 10**6)])
def test_draws_are_uniform_together(seed: int, epoch: int) -> None:
    drawn = draws.augmentation(seed, epoch, np.arange(200_000), Augment(crop_padding=4, flip="random", cutout=8), 32)
    joint = (drawn.dy * 9 + drawn.dx) * 2 + drawn.flip
    assert abs(chi_square(np.bincount(joint, minlength=162))) < 5
    assert abs(chi_square(np.bincount(drawn.cut_y * 32 + drawn.cut_x, minlength=1024))) < 5
    across = (drawn.cut_y // 8 * 9 + drawn.dy) * 2 + drawn.flip  # between streams
    assert abs(chi_square(np.bincount(across, minlength=72))) < 5


def test_epochs_seeds_and_neighbours_are_independent() -> None:
    augment = Augment(crop_padding=4, flip="random")
    samples = np.arange(100_000)
    base = draws.augmentation(7, 3, samples, augment, 32)
    for other in (draws.augmentation(7, 4, samples, augment, 32), draws.augmentation(8, 3, samples, augment, 32)):
        assert abs(chi_square(np.bincount(base.dy * 9 + other.dy, minlength=81))) < 5
        assert abs(np.mean(base.flip == other.flip) - 0.5) < 0.01
    assert abs(chi_square(np.bincount(base.dx[:-1] * 9 + base.dx[1:], minlength=81))) < 5


def test_orders_of_epochs_and_seeds_differ_and_are_mixed() -> None:
    orders = [draws.order(seed, epoch, np.arange(20_000)) for seed in (0, 1) for epoch in (0, 1)]
    for first in range(4):
        assert abs(np.corrcoef(orders[first], np.arange(20_000))[0, 1]) < 0.03
        for second in range(first):
            assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.03


def test_order_is_independent_of_the_flip() -> None:
    order = draws.order(0, 0, np.arange(100_000))
    flip = draws.augmentation(0, 0, order, Augment(flip="random"), 32).flip
    assert abs(flip[:50_000].mean() - 0.5) < 0.01


def test_alternating_flips_turn_each_epoch() -> None:
    flips = [draws.augmentation(5, epoch, np.arange(1000), Augment(flip="alternating"), 32).flip for epoch in range(4)]
    assert 400 < flips[0].sum() < 600
    assert np.array_equal(flips[0], ~flips[1]) and np.array_equal(flips[0], flips[2]) and np.array_equal(flips[1], flips[3])


def test_the_numbers_themselves_never_change() -> None:
    """A run resumed by a newer version must go on with the same epoch."""
    assert [hex(v) for v in draws.hashes(42, 3, draws.CROP, [0, 1, 49_999]).tolist()] == EXPECTED_HASHES
    assert draws.order(42, 3, np.arange(10)).tolist() == EXPECTED_ORDER


def test_hashes_are_the_formula() -> None:
    """The vectorised hash against the one-number formula."""
    mask = 2**64 - 1
    key = draws.key_of(9, 8, draws.FLIP)
    for index in (0, 1, 12_345, 2**40):
        assert int(draws.hashes(9, 8, draws.FLIP, [index])[0]) == draws._mix((key + index * draws._WEYL) & mask)
    assert len(np.unique(draws.hashes(0, 0, draws.ORDER, np.arange(10**6)))) == 10**6


def test_nothing_is_drawn_for_nothing() -> None:
    drawn = draws.augmentation(0, 0, [], Augment(crop_padding=4, flip="random", cutout=8), 32)
    assert len(drawn.dy) == len(drawn.flip) == 0
    assert draws.order(0, 0, []).shape == (0,)


PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def formulas() -> dict[str, Any]:
    """The functions of the page, which use nothing of the package."""
    block = next(text for text in PAGE.read_text().split("```python\n")[1:] if "WEYL" in text).split("```")[0]
    made: dict[str, Any] = {}
    exec(block, made)
    return made


@settings(max_examples=40, deadline=None)
@given(SEEDS, EPOCHS, st.integers(1, 64), st.lists(st.integers(0, 2**40), min_size=1, max_size=30, unique=True))
def test_the_page_says_how_to_compute_every_draw(seed: int, epoch: int, size: int, samples: list[int]) -> None:
    """By plain numbers, without the package: order, augmentation, warps, dropout, split."""
    page = formulas()
    assert page["order"](seed, epoch, samples) == draws.order(seed, epoch, samples).tolist()
    augment = Augment(crop_padding=size, flip="random", cutout=8, rotation_degrees=15, shift_fraction=(0.1, 0.2))
    drawn, turned = draws.augmentation(seed, epoch, samples, augment, 32, 24), draws.warp(seed, epoch, samples, augment)
    other = draws.augmentation(seed, epoch, samples, Augment(flip="alternating"), 32)
    for row, sample in enumerate(samples):
        assert page["crop"](seed, epoch, sample, size) == (drawn.dy[row], drawn.dx[row])
        assert page["flip"](seed, epoch, sample) == drawn.flip[row]
        assert page["alternating"](seed, epoch, sample) == other.flip[row]
        assert page["cutout"](seed, epoch, sample, 32, 24) == (drawn.cut_y[row], drawn.cut_x[row])
        assert np.isclose(np.deg2rad(page["rotation"](seed, epoch, sample, 15)), turned.angle[row], rtol=1e-6, atol=1e-9)
        assert np.allclose(page["shift"](seed, epoch, sample, 0.1, 0.2), (turned.down[row], turned.across[row]), 1e-6, 1e-9)
        assert page["dropout_seed"](seed, sample, row) == seed_of_step(seed, sample, row)


def test_the_page_says_which_images_validate() -> None:
    labels = np.arange(100) % 3
    page = formulas()
    _, held_out = split(labels, 0.2, 5)
    expected = []
    for name, count in ((0, 7), (1, 7), (2, 6)):  # of 34, 33 and 33 images: 6.8, 6.6 and 6.6
        ranked = sorted(np.flatnonzero(labels == name).tolist(), key=lambda sample: page["draw"](5, 0, page["SPLIT"], sample))
        expected += ranked[:count]
    assert sorted(expected) == held_out.tolist()


def test_the_values_on_the_page_are_right() -> None:
    page = formulas()
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \| \d+ \| \d+ \| `", line)
    ]
    assert len(rows) == 3
    for seed, epoch, sample, drawn, *others in ([*map(int, row[:3]), *row[3:]] for row in rows):
        assert drawn == f"`{draws.hashes(seed, epoch, draws.ORDER, [sample])[0]:016x}`"
        assert others == [
            str(page["crop"](seed, epoch, sample, 4)), str(page["flip"](seed, epoch, sample)),
            str(page["cutout"](seed, epoch, sample, 32, 32)), f"{page['rotation'](seed, epoch, sample, 15):.6f}",
            str(seed_of_step(seed, sample, 0)),
        ]  # fmt: skip
