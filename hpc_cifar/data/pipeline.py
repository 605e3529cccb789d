"""What a pipeline is, and the one place that chooses one.

All pipelines deliver the same pixels, since order and draws come from :mod:`hpc_cifar.data.draws`:

1. pad by ``crop_padding``: with raw pixel value 0 (black), or by reflection without repeating the edge (numpy's "reflect");
2. crop to the original size; 3. mirror; 4. cut out: a square of raw pixel value 0, after crop and flip;
5. normalise: x / 255, then minus mean, divided by std. So padding and cut-out are -mean/std in the batch, as with torchvision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..config.experiment import Data
from ..errors import UsageError
from ..plan import shard
from . import draws
from .store import Arrays

Positions = list[tuple[int, int, int]]  # number of the batch, images in the global batch, images of this rank


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's shard of a global batch; it may be empty."""

    images: torch.Tensor  # (n,C,H,W) in the dtype and memory format asked for
    labels: torch.Tensor  # int64 (n,)
    number: int  # of the batch in its epoch, from 0
    global_size: int  # images of the global batch over all ranks; in an evaluation, of the whole evaluation


class Pipeline(Protocol):
    name: str

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's shard of each global batch of ``epoch`` from batch ``first`` on; every rank yields as many."""
        ...

    def close(self) -> None:
        """End workers and free memory; iterators that are still open end as well."""
        ...


@dataclasses.dataclass(frozen=True)
class Output:
    """How batches are delivered."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build(
    config: Data,
    arrays: Arrays,
    indices: npt.ArrayLike,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    channels_last: bool,
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
) -> Pipeline:
    """The training pipeline of one rank.

    Args:
        arrays, indices: the samples ``indices`` of ``arrays`` make an epoch.
        mean, std: (C,) in units of the full pixel range; not used with ``normalize: zero_one``.

    Raises:
        UsageError: reflection needs a padding smaller than the image.
    """
    size = min(arrays.images.shape[1:3])
    if config.augment.padding_mode == "reflect" and config.augment.crop_padding >= size:
        raise UsageError(
            f"data.augment.crop_padding: {config.augment.crop_padding} with padding_mode reflect on images of {size} pixels; "
            f"use {size - 1} at most, or padding_mode zero"
        )
    plan = Epochs(config, np.asarray(indices, dtype=np.int64), seed, rank, world_size, size)
    output = _output(config, device, dtype, channels_last, mean, std)
    match config.pipeline:
        case "auto" | "resident":
            from .resident import Resident

            return Resident(plan, arrays, output)
        case "reference":
            from .reference import Reference

            return Reference(plan, arrays, output, config.workers)


def evaluation_batches(
    config: Data,
    arrays: Arrays,
    indices: npt.ArrayLike,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    channels_last: bool,
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
) -> Iterator[Batch]:
    """This rank's contiguous shard of ``indices``, in their order, without draws; no sample comes twice over all ranks.

    Args:
        batch_size: images of a batch of this rank. A rank without images yields nothing: ranks must not meet inside the loop.

    The ``global_size`` of each batch is the number of all indices: sums over all batches and ranks divided by it are means.
    """
    from .resident import Normaliser

    samples = np.asarray(indices, dtype=np.int64)
    begin, end = shard(len(samples), world_size, rank)
    plain = config.model_copy(update={"augment": type(config.augment)()})
    normaliser = Normaliser(plain.augment, arrays, _output(config, device, dtype, channels_last, mean, std), resident=False)
    for number, first in enumerate(range(begin, end, batch_size)):
        chosen = samples[first : min(first + batch_size, end)]
        images, labels = normaliser(chosen, draws.augmentation(0, 0, chosen, plain.augment, 1))
        yield Batch(images, labels, number, len(samples))


def _output(
    config: Data, device: torch.device | str, dtype: torch.dtype, channels_last: bool, mean: npt.ArrayLike, std: npt.ArrayLike
) -> Output:
    means, stds = np.atleast_1d(np.asarray(mean, float)), np.atleast_1d(np.asarray(std, float))
    if config.normalize == "zero_one":
        means, stds = np.zeros_like(means), np.ones_like(stds)
    return Output(torch.device(device), dtype, channels_last, tuple(means.tolist()), tuple(stds.tolist()))


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Which samples one rank takes in each epoch, and what is done to them."""

    config: Data
    indices: npt.NDArray[np.int64]
    seed: int
    rank: int
    world_size: int
    size: int  # height and width of an image

    def of(self, epoch: int, first: int) -> tuple[npt.NDArray[np.int64], draws.Draws, Positions]:
        """Samples and draws of this rank from batch ``first`` on, one after the other, and how they fall into batches."""
        order = draws.order(self.seed, epoch, self.indices)
        batch = self.config.batch_size
        parts, positions = [order[:0]], []
        for number, start in enumerate(range(0, len(order), batch)):
            if number < first:
                continue
            count = min(batch, len(order) - start)
            begin, end = shard(count, self.world_size, self.rank)
            parts.append(order[start + begin : start + end])
            positions.append((number, count, end - begin))
        samples = np.concatenate(parts)
        return samples, draws.augmentation(self.seed, epoch, samples, self.config.augment, self.size), positions
