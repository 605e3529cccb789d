"""What a pipeline is, and the one place that chooses one.

All pipelines deliver the same pixels, since order and draws come from :mod:`hpc_cifar.data.draws`:

1. pad by ``crop_padding``: with raw pixel value 0 (black) or another one, or by reflection without repeating the edge
   (numpy's "reflect"); 2. crop to the original size; 3. mirror; 4. cut out: a square of raw pixel value 0;
5. normalise: x / 255, then minus mean, divided by std. So padding and cut-out are -mean/std in the batch, as with torchvision;
6. rotate and shift, on the device (:mod:`hpc_cifar.data.warp`).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import weakref
from collections.abc import Generator, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..config.experiment import Augment, Data
from ..errors import HpcCifarError, UsageError, first_line
from ..plan import shard
from . import draws
from .choice import Choice, choose
from .store import Arrays
from .warp import Warp

Positions = list[tuple[int, int, int]]  # number of the batch, images in the global batch, images of this rank


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's shard of a global batch; it may be empty. Nothing writes into its memory again."""

    images: torch.Tensor  # (n,C,H,W) in the dtype and memory format asked for
    labels: torch.Tensor  # int64 (n,)
    number: int  # of the batch in its epoch, from 0
    global_size: int  # images of the global batch over all ranks; in an evaluation, of the whole evaluation


class Source(Protocol):
    """What each kind of pipeline implements."""

    name: str

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's shard of each global batch of ``epoch`` from batch ``first`` on; every rank yields as many."""
        ...

    def close(self) -> None:
        """Free threads, processes and memory. No iterator is open any more."""
        ...


@dataclasses.dataclass(frozen=True)
class Output:
    """How batches are delivered."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Pipeline:
    """The training batches of one rank, and how many of them were taken.

    Attributes:
        name: of the source: resident, ffcv, dali or reference.
        choice: why it was chosen.
    """

    def __init__(self, source: Source, choice: Choice, epochs: Epochs, warp: Warp | None) -> None:
        note = getattr(source, "note", "")
        self.name = source.name
        self.choice = dataclasses.replace(choice, why=f"{choice.why}; {note}") if note else choice
        self._source: Source | None = source
        self._epochs, self._warp = epochs, warp
        self._position = (0, 0)
        self._loaded: tuple[int, int] | None = None
        self._open: Generator[Batch, None, None] | None = None
        _pipelines.add(self)

    def batches(self, epoch: int, first: int | None = None) -> Iterator[Batch]:
        """This rank's shard of each global batch of ``epoch``, as many on every rank. Ends an iterator that is still open.

        Args:
            first: number of the batch to begin with; None means 0, or what ``load_state_dict`` said if it was of this epoch.

        Raises:
            RuntimeError: the pipeline is closed.
            DataError: a worker died, or the data cannot be read.
        """
        if self._source is None:
            raise RuntimeError("the pipeline is closed")
        if first is None:
            first = self._loaded[1] if self._loaded and self._loaded[0] == epoch else 0
        self._loaded = None
        self._end()
        self._open = self._iterate(self._source, epoch, first)
        return self._open

    def _end(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _iterate(self, source: Source, epoch: int, first: int) -> Generator[Batch, None, None]:
        warps = self._epochs.warps_of(epoch, first) if self._warp else None
        with contextlib.closing(source.batches(epoch, first)) as batches:  # type: ignore[type-var]
            for batch in batches:
                if self._warp and warps:
                    batch = dataclasses.replace(batch, images=self._warp(batch.images, next(warps)))
                self._position = (epoch, batch.number + 1)
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches were taken; the same on every rank, and for every kind of pipeline."""
        return {"epoch": self._position[0], "batches": self._position[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next iterator go on after ``state``, which may come from another kind of pipeline or number of ranks."""
        self._position = self._loaded = (state["epoch"], state["batches"])

    def close(self) -> None:
        """End workers and free memory; iterators that are still open end as well."""
        self._end()
        if self._source is not None:
            self._source.close()
            self._source = None


_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@atexit.register  # after torch's own, so it runs before, while torch still ends its workers
def _close_all() -> None:
    """A pipeline that nobody closed: at its exit Python waits for the workers, for ever since they ignore its TERM."""
    for pipeline in list(_pipelines):
        pipeline.close()


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
        UsageError: the augmentation does not fit the images, or the pipeline asked for cannot run here.
        DataError: what the pipeline reads is missing or damaged.
    """
    height, width, channels = arrays.images.shape[1:]
    check_augment(config.augment, height, width, channels)
    plan = Epochs(config, np.asarray(indices, dtype=np.int64), seed, rank, world_size, height, width)
    output = _output(config, device, dtype, channels_last, mean, std)
    source: Source | None = None
    failed: dict[str, str] = {}  # those that `auto` tried
    while source is None:
        choice = choose(config.pipeline, output.device, arrays, failed)
        try:
            source = _source(choice.name, plan, arrays, output)
        except HpcCifarError as error:
            if config.pipeline != "auto" or choice.name == "reference":
                raise
            failed[choice.name] = first_line(error)
    warp = None
    if config.augment.warps:
        kind = torch.promote_types(output.dtype, torch.float32)
        black = -torch.tensor(output.mean, dtype=kind) / torch.tensor(output.std, dtype=kind)
        warp = Warp(config.augment, black, output.device)
    return Pipeline(source, choice, plan, warp)


def _source(name: str, epochs: Epochs, arrays: Arrays, output: Output) -> Source:
    match name:
        case "resident":
            from .resident import Resident

            return Resident(epochs, arrays, output)
        case "ffcv":
            from .ffcv import Ffcv

            return Ffcv(epochs, arrays, output)
        case "dali":
            from .dali import Dali

            return Dali(epochs, arrays, output)
        case _:
            from .reference import Reference

            return Reference(epochs, arrays, output)


def check_augment(augment: Augment, height: int, width: int, channels: int) -> None:
    """UsageError if an augmentation cannot be done to images of this size."""
    size = min(height, width)
    if augment.padding_mode == "reflect" and augment.crop_padding >= size:
        raise UsageError(
            f"data.augment.crop_padding: {augment.crop_padding} with padding_mode reflect on images of {size} pixels; "
            f"use {size - 1} at most, or padding_mode zero"
        )
    try:
        augment.padding_values(channels)
    except ValueError as error:
        raise UsageError(str(error)) from None


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
        indices: (n,) of images in ``arrays``.
        batch_size: images of a batch of this rank. A rank without images yields nothing: ranks must not meet inside the loop.
        mean, std: (channels,) of pixels from 0 to 1; images are normalised by them.

    The ``global_size`` of each batch is the number of all indices: sums over all batches and ranks divided by it are means.
    """
    from .fused import threads_for
    from .resident import Normaliser

    samples = np.asarray(indices, dtype=np.int64)
    begin, end = shard(len(samples), world_size, rank)
    plain = config.model_copy(update={"augment": type(config.augment)()})
    output = _output(config, device, dtype, channels_last, mean, std)
    normaliser = Normaliser(plain.augment, arrays, output, resident=False, threads=threads_for())
    try:
        for number, first in enumerate(range(begin, end, batch_size)):
            chosen = samples[first : min(first + batch_size, end)]
            images, labels = normaliser(chosen, draws.augmentation(0, 0, chosen, plain.augment, 1, 1))
            yield Batch(images, labels, number, len(samples))
    finally:
        normaliser.close()


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
    height: int
    width: int

    def samples_of(self, epoch: int, first: int) -> tuple[npt.NDArray[np.int64], Positions]:
        """Samples of this rank from batch ``first`` on, and how they fall into batches.

        Returns:
            int64 (n,), one batch after the other; for each batch its number, its images over all ranks, and those of this rank.
        """
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
        return np.concatenate(parts), positions

    def draws_of(self, epoch: int, samples: npt.NDArray[np.int64]) -> draws.Draws:
        """What is done to ``samples`` in ``epoch``."""
        return draws.augmentation(self.seed, epoch, samples, self.config.augment, self.height, self.width)

    def of(self, epoch: int, first: int) -> tuple[npt.NDArray[np.int64], draws.Draws, Positions]:
        """What :meth:`samples_of` returns from batch ``first`` on, with the draws of each sample in between."""
        samples, positions = self.samples_of(epoch, first)
        return samples, self.draws_of(epoch, samples), positions

    def warps_of(self, epoch: int, first: int) -> Iterator[draws.Warps]:
        """The rotations and shifts of each batch from ``first`` on."""
        samples, positions = self.samples_of(epoch, first)
        for count in (count for _, _, count in positions):
            yield draws.warp(self.seed, epoch, samples[:count], self.config.augment)
            samples = samples[count:]
