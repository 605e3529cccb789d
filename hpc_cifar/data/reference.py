"""The reference pipeline: torchvision transforms in a torch DataLoader, one image at a time.

Deliberately plain. It is what the other pipelines are compared with, in pixels and in speed, so it shares nothing with them
but the draws.
"""

from __future__ import annotations

import atexit
import inspect
import signal
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..config.experiment import Augment
from .pipeline import Batch, Epochs, Output
from .store import Arrays

transforms: Any = v2.functional
Key = tuple[int, int, int, bool, int, int]  # sample, dy, dx, flip, cut_y, cut_x


class _Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Maps a sample and its draws to a normalised float32 image (C,H,W) and its label."""

    def __init__(self, arrays: Arrays, augment: Augment, output: Output) -> None:
        self._images: npt.NDArray[np.uint8] = arrays.images
        self._labels = arrays.labels
        self._augment = augment
        self._mean, self._std = list(output.mean), list(output.std)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        sample, dy, dx, flip, cut_y, cut_x = key
        image = torch.from_numpy(np.array(self._images[sample])).permute(2, 0, 1)
        height, width = image.shape[1:]
        augment = self._augment
        if augment.crop_padding:
            mode = "constant" if augment.padding_mode == "zero" else "reflect"
            image = transforms.crop(transforms.pad(image, [augment.crop_padding], padding_mode=mode), dy, dx, height, width)
        if flip:
            image = transforms.horizontal_flip(image)
        if augment.cutout:
            top, left = cut_y - augment.cutout // 2, cut_x - augment.cutout // 2
            bottom, right = min(top + augment.cutout, height), min(left + augment.cutout, width)
            top, left = max(top, 0), max(left, 0)
            image = transforms.erase(image, top, left, bottom - top, right - left, torch.zeros(1, 1, 1, dtype=torch.uint8))
        image = transforms.to_dtype(image, torch.float32, scale=True)
        return transforms.normalize(image, self._mean, self._std), int(self._labels[sample])


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Stack the samples; None for an empty shard, which the loader's own function refuses."""
    if not samples:
        return None
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


class Reference:
    """See :class:`hpc_cifar.data.pipeline.Pipeline`."""

    name = "reference"

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output, workers: int) -> None:
        self._epochs = epochs
        self._output = output
        self._workers = workers
        self._dataset = _Augmented(arrays, epochs.config.augment, output)
        self._nothing = torch.empty(0, arrays.images.shape[3], *arrays.images.shape[1:3])
        self._open: list[Generator[Batch, None, None]] = []
        _pipelines.add(self)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        iterator = self._iterate(epoch, first)
        self._open = [other for other in self._open if inspect.getgeneratorstate(other) != inspect.GEN_CLOSED]
        self._open.append(iterator)
        return iterator

    def _iterate(self, epoch: int, first: int) -> Generator[Batch, None, None]:
        samples, drawn, positions = self._epochs.of(epoch, first)
        columns: list[Any] = [samples, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x]
        keys: list[Key] = list(zip(*(column.tolist() for column in columns), strict=True))
        ends = np.cumsum([count for _, _, count in positions]).tolist()
        shards = [keys[end - count : end] for end, (_, _, count) in zip(ends, positions, strict=True)]
        cuda = self._output.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            self._dataset, batch_sampler=shards, num_workers=self._workers, collate_fn=_collate, pin_memory=cuda,
            worker_init_fn=_ignore_signals,
        )  # fmt: skip
        memory = torch.channels_last if self._output.channels_last else torch.contiguous_format
        for (number, global_size, _), loaded in zip(positions, loader, strict=True):
            images, labels = loaded or (self._nothing, torch.empty(0, dtype=torch.int64))
            images = images.to(self._output.device, self._output.dtype, non_blocking=True).contiguous(memory_format=memory)
            yield Batch(images, labels.to(self._output.device, non_blocking=True), number, global_size)

    def close(self) -> None:
        """Ends the worker processes with the iterators that own them."""
        while self._open:
            self._open.pop().close()


def _ignore_signals(_: int) -> None:
    """Slurm signals every process of a step; a worker that died of it would take the checkpoint on stopping with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


_pipelines: weakref.WeakSet[Reference] = weakref.WeakSet()


@atexit.register  # after torch's own, so it runs before, while torch still ends its workers
def _close_all() -> None:
    """A pipeline that nobody closed: at its exit Python waits for the workers, for ever since they ignore its TERM."""
    for pipeline in list(_pipelines):
        pipeline.close()
