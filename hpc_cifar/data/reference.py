"""The reference pipeline: torchvision transforms in a torch DataLoader, one image at a time.

Deliberately plain. It is what the other pipelines are compared with, in pixels and in speed, so it shares nothing with them
but the draws.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..config.experiment import Augment
from ..errors import DataError, first_line
from .fused import threads_for
from .pipeline import Batch, Epochs, Output
from .store import Arrays

transforms: Any = v2.functional
WORKERS = 2  # processes, unless the job file says how many
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
            how: dict[str, Any] = {"padding_mode": "reflect"}
            if augment.padding_mode != "reflect":
                how = {"fill": [float(value) for value in augment.padding_values(len(image))]}
            image = transforms.crop(transforms.pad(image, [augment.crop_padding], **how), dy, dx, height, width)
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
    """See :class:`hpc_cifar.data.pipeline.Source`."""

    name = "reference"

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output) -> None:
        self._epochs = epochs
        self._output = output
        workers = epochs.config.workers
        self._workers = min(WORKERS, threads_for()) if isinstance(workers, str) else workers
        self._dataset = _Augmented(arrays, epochs.config.augment, output)
        self._nothing = torch.empty(0, arrays.images.shape[3], *arrays.images.shape[1:3])

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        samples, drawn, positions = self._epochs.of(epoch, first)
        columns: list[Any] = [samples, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x]
        keys: list[Key] = list(zip(*(column.tolist() for column in columns), strict=True))
        ends = np.cumsum([count for _, _, count in positions], dtype=int).tolist()
        shards = [keys[end - count : end] for end, (_, _, count) in zip(ends, positions, strict=True)]
        cuda = self._output.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            self._dataset, batch_sampler=shards, num_workers=self._workers, collate_fn=_collate, pin_memory=cuda,
            worker_init_fn=_ignore_signals,
        )  # fmt: skip
        memory = torch.channels_last if self._output.channels_last else torch.contiguous_format
        loading: Iterator[Any] | None = None
        for number, global_size, _ in positions:
            try:
                loading = loading or iter(loader)
                images, labels = next(loading) or (self._nothing, torch.empty(0, dtype=torch.int64))
            except (RuntimeError, OSError) as error:  # a worker was killed, or /dev/shm has no room for what it sends
                if not self._workers:
                    raise
                raise DataError(
                    f"data.pipeline: reference: its workers failed ({first_line(error)}); data.workers: 0 needs neither "
                    "processes nor room in /dev/shm"
                ) from error
            images = images.to(self._output.device, self._output.dtype, non_blocking=True).contiguous(memory_format=memory)
            yield Batch(images, labels.to(self._output.device, non_blocking=True), number, global_size)

    def close(self) -> None:
        """Its worker processes ended with the iterators."""


def _ignore_signals(_: int) -> None:
    """Slurm signals every process of a step; a worker that died of it would take the checkpoint on stopping with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
