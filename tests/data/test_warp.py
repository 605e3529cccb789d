"""Rotations and shifts: drawn like all else, the same after every pipeline, and those of scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from pipelines import COUNT, MEAN, NAMES, SEED, STD, make

from hpc_cifar.config.experiment import Augment
from hpc_cifar.data import draws
from hpc_cifar.data.draws import Warps
from hpc_cifar.data.store import Arrays
from hpc_cifar.data.warp import Warp

BLACK = torch.tensor([-1.0, -2.0, 0.5])


def by_scipy(image: np.ndarray, angle: float, down: float, across: float, mode: str) -> np.ndarray:
    """Rotate (C,H,W) about its centre, counter-clockwise as one sees it, then shift it."""
    height, width = image.shape[1:]
    centre = np.array([height - 1, width - 1]) / 2
    # rows grow downwards: a finished pixel shows the given one at rotation @ (its place - shift - centre) + centre
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    offset = centre - rotation @ (centre + np.array([down * height, across * width]))
    kept = {"nearest": "nearest", "reflect": "reflect", "black": "grid-constant"}[mode]
    return np.stack([scipy.ndimage.affine_transform(plane, rotation, offset, order=1, mode=kept) for plane in image])


@pytest.mark.parametrize("fill", ["nearest", "reflect", "black"])
@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_warps_are_those_of_scipy(fill: str, size: tuple[int, int]) -> None:
    augment = Augment(rotation_degrees=30, shift_fraction=0.2, warp_fill=fill)  # type: ignore[arg-type]
    images = torch.rand(12, 3, *size, generator=torch.Generator().manual_seed(0))
    warps = draws.warp(1, 2, np.arange(12), augment)
    black = torch.zeros(3)
    made = Warp(augment, black, torch.device("cpu"))(images, warps)
    for image, one, angle, down, across in zip(images, made, warps.angle, warps.down, warps.across, strict=True):
        expected = by_scipy(image.numpy(), angle, down, across, fill)
        np.testing.assert_allclose(one.numpy(), expected, atol=1e-4, rtol=0)


def test_a_quarter_turn_goes_against_the_clock() -> None:
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 0, 2] = 1  # top right
    quarter = Warps(*(np.array([value], np.float32) for value in (np.pi / 2, 0, 0)))
    made = Warp(Augment(rotation_degrees=90), torch.zeros(1), torch.device("cpu"))(image, quarter)
    torch.testing.assert_close(made[0, 0], torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]), atol=1e-6, rtol=0)
    down = Warps(*(np.array([value], np.float32) for value in (0, 1 / 3, 0)))
    moved = Warp(Augment(shift_fraction=0.5, warp_fill="black"), torch.zeros(1), torch.device("cpu"))(image, down)
    torch.testing.assert_close(moved[0, 0], torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 0]]), atol=1e-6, rtol=0)


def test_what_comes_into_view_may_be_black() -> None:
    augment = Augment(shift_fraction=1, warp_fill="black")
    away = Warps(*(np.array([value], np.float32) for value in (0, 1, 0)))
    made = Warp(augment, BLACK, torch.device("cpu"))(torch.rand(1, 3, 8, 8), away)
    torch.testing.assert_close(made, BLACK[None, :, None, None].expand(1, 3, 8, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_they_follow_every_pipeline_on_any_number_of_ranks(
    readable: Callable[[str], Arrays], name: str, channels_last: bool
) -> None:
    augment = Augment(crop_padding=2, flip="random", rotation_degrees=5, shift_fraction=0.05)
    arrays, epoch = readable(name), 3
    before = list(make(arrays, "reference", Augment(crop_padding=2, flip="random"), batch_size=300).batches(epoch))
    order = draws.order(SEED, epoch, np.arange(COUNT))
    warp = Warp(augment, -torch.tensor(MEAN) / torch.tensor(STD), torch.device("cpu"))
    expected = [
        warp(batch.images, draws.warp(SEED, epoch, order[300 * batch.number :][: len(batch.labels)], augment))
        for batch in before
    ]
    ranks = [make(arrays, name, augment, batch_size=300, rank=r, world_size=2, channels_last=channels_last) for r in range(2)]
    for right, *parts in zip(expected, *(one.batches(epoch) for one in ranks), strict=True):
        torch.testing.assert_close(torch.cat([p.images for p in parts]), right, atol=2e-6, rtol=0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert all(part.images.is_contiguous(memory_format=layout) for part in parts)
    for one in ranks:
        one.close()


def test_draws_of_warps_fill_their_range_and_belong_to_the_sample() -> None:
    augment = Augment(rotation_degrees=15, shift_fraction=0.1)
    samples = np.arange(20_000)
    drawn = draws.warp(7, 3, samples, augment)
    for values, limit in ((drawn.angle, np.deg2rad(15)), (drawn.down, 0.1), (drawn.across, 0.1)):
        assert abs(values).max() <= limit * (1 + 1e-6)
        counts, _ = np.histogram(values, bins=20, range=(-limit, limit))
        assert ((counts - 1000) ** 2 / 1000).sum() < 50.8  # chi-square, 19 degrees of freedom, 1 in 10,000
    some = draws.warp(7, 3, samples[5::7], augment)
    assert np.array_equal(some.angle, drawn.angle[5::7]) and np.array_equal(some.across, drawn.across[5::7])
    assert not np.array_equal(draws.warp(7, 4, samples, augment).angle, drawn.angle)
    assert abs(np.corrcoef([drawn.angle, drawn.down, drawn.across])[np.triu_indices(3, 1)]).max() < 0.03
