"""The resident pipeline: the whole dataset lies where the training is, and a batch is one fused pass over it.

On a CPU the memory-mapped store is used in place: all ranks of a node share its pages, and nothing is copied. On a GPU the
uint8 images are copied to the device once (184 MB for CIFAR-10), the order and the draws of an epoch once an epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from ..config.experiment import Augment
from .draws import Draws
from .pipeline import Batch, Epochs, Output
from .store import Arrays

_LEAST_PER_THREAD = 128  # images; fewer are done sooner than a thread wakes up


def lookup_table(output: Output) -> torch.Tensor:
    """float32 (C,256): the normalised value of each raw value, in the steps of torchvision, so equal to the last bit."""
    raw = torch.arange(256, dtype=torch.float32) * (1 / 255)
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (output.mean, output.std))
    return (raw - mean) / std


class Resident:
    """See :class:`hpc_cifar.data.pipeline.Pipeline`."""

    name = "resident"

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output) -> None:
        self._epochs = epochs
        self._make: Normaliser | None = Normaliser(epochs.config.augment, arrays, output, resident=True)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        if self._make is None:
            raise RuntimeError("the pipeline is closed")
        samples, drawn, positions = self._epochs.of(epoch, first)
        on_device = self._make.to_device(samples, drawn)
        start = 0
        for number, global_size, count in positions:
            if self._make is None:
                return
            part = slice(start, start + count)
            start += count
            images, labels = self._make(samples[part], drawn[part], None if on_device is None else on_device[:, part])
            yield Batch(images, labels, number, global_size)

    def close(self) -> None:
        self._make = None


class Normaliser:
    """Makes the batch of given samples and draws on the device of ``output``.

    Args:
        resident: keep all images on the device; else only those of each batch go there. The same on a CPU.
    """

    def __init__(self, augment: Augment, arrays: Arrays, output: Output, *, resident: bool) -> None:
        self._augment = augment
        self._output = output
        self._images = np.asarray(arrays.images)
        self._labels = np.asarray(arrays.labels)
        self._table = lookup_table(output).to(output.device)
        self._on_cpu = output.device.type == "cpu"
        self._device_images: torch.Tensor | None = None
        if self._on_cpu:
            self._flat_images = self._images.reshape(-1)
            self._flat_table = self._table.numpy().reshape(-1)
            self._threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
            self._pool = ThreadPoolExecutor(self._threads - 1, "augment") if self._threads > 1 else None
        elif resident:
            self._device_images = torch.from_numpy(np.array(self._images)).to(output.device)
            self._device_labels = torch.from_numpy(np.array(self._labels)).to(output.device)

    def to_device(self, samples: npt.NDArray[np.int64], drawn: Draws) -> torch.Tensor | None:
        """int64 (6,n): samples and draws on a GPU, for many batches at once; None on a CPU."""
        if self._on_cpu:
            return None
        rows = np.stack([samples, drawn.dy, drawn.dx, drawn.flip.astype(np.int64), drawn.cut_y, drawn.cut_x])
        pinned = torch.from_numpy(rows).pin_memory() if self._output.device.type == "cuda" else torch.from_numpy(rows)
        return pinned.to(self._output.device, non_blocking=True)

    def __call__(
        self, samples: npt.NDArray[np.int64], drawn: Draws, on_device: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n,C,H,W) and labels (n,)."""
        if self._on_cpu:
            return self._fused(samples, drawn), torch.from_numpy(self._labels[samples])
        rows = self.to_device(samples, drawn) if on_device is None else on_device
        assert rows is not None
        if self._device_images is not None:
            chosen = rows[0]
            return augment_batch(self._device_images, rows, self._table, self._augment, self._output), self._device_labels[
                chosen
            ]
        images = torch.from_numpy(self._images[samples]).to(self._output.device, non_blocking=True)
        labels = torch.from_numpy(self._labels[samples]).to(self._output.device, non_blocking=True)
        rows[0] = torch.arange(len(samples), device=self._output.device)
        return augment_batch(images, rows, self._table, self._augment, self._output), labels

    def _fused(self, samples: npt.NDArray[np.int64], drawn: Draws) -> torch.Tensor:
        from .kernels import fill

        height, width, channels = self._images.shape[1:]
        count = len(samples)
        shape = (count, height, width, channels) if self._output.channels_last else (count, channels, height, width)
        batch = torch.empty(shape, dtype=torch.float32)
        augment = self._augment

        def work(first: int, last: int) -> None:
            fill(
                self._flat_images, height, width, channels, samples, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x,
                augment.crop_padding, augment.padding_mode == "reflect", augment.cutout, self._flat_table,
                not self._output.channels_last, first, last, flat,
            )  # fmt: skip

        flat = batch.numpy().reshape(-1)
        threads = max(1, min(self._threads, count // _LEAST_PER_THREAD))
        edges = [count * part // threads for part in range(threads + 1)]
        others = [self._pool.submit(work, *edges[part : part + 2]) for part in range(1, threads)] if self._pool else []
        work(0, edges[1])
        for other in others:
            other.result()
        batch = batch.to(self._output.dtype)
        return batch.permute(0, 3, 1, 2) if self._output.channels_last else batch


def augment_batch(
    images: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, augment: Augment, output: Output
) -> torch.Tensor:
    """The same batch by torch operations, for any device and without a host synchronisation.

    Args:
        images: uint8 (N,H,W,C) on the device.
        rows: int64 (6,n), see :meth:`Normaliser.to_device`; row 0 are positions in ``images``.
        table: float32 (C,256).

    Returns:
        (n,C,H,W) in ``output.dtype`` and memory format.
    """
    chosen, dy, dx, flip, cut_y, cut_x = (row[:, None] for row in rows)
    height, width, channels = images.shape[1:]
    down, across = (torch.arange(side, device=images.device)[None] for side in (height, width))
    y = down + dy - augment.crop_padding  # (n,H): the row of the image that each row shows
    x = torch.where(flip > 0, width - 1 - across, across) + dx - augment.crop_padding
    if augment.padding_mode == "reflect":
        y, x = (place.abs() for place in (y, x))
        y, x = torch.minimum(y, 2 * (height - 1) - y), torch.minimum(x, 2 * (width - 1) - x)
    black_y, black_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
    pixels = images[chosen[:, :, None], y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    black = black_y[:, :, None] | black_x[:, None, :]
    if augment.cutout:
        top, left = cut_y - augment.cutout // 2, cut_x - augment.cutout // 2
        inside_y, inside_x = (down >= top) & (down < top + augment.cutout), (across >= left) & (across < left + augment.cutout)
        black = black | (inside_y[:, :, None] & inside_x[:, None, :])
    pixels = pixels.masked_fill(black[..., None], 0)
    offsets = 256 * torch.arange(channels, device=images.device, dtype=torch.int32)
    batch = table.reshape(-1).to(output.dtype)[pixels.int() + offsets].permute(0, 3, 1, 2)
    return batch if output.channels_last else batch.contiguous()
