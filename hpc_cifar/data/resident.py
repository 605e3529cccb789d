"""The resident pipeline: the whole dataset lies where the training is, and a batch is one fused pass over it.

On a CPU the memory-mapped store is used in place: all ranks of a node share its pages, and nothing is copied. On a GPU the
uint8 images are copied to the device once (184 MB for CIFAR-10), the order of an epoch once an epoch, and one Triton kernel
makes as many batches at once as fit into ``CHUNK_BYTES``; where there is no Triton, torch operations make each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import caches
from ..config.experiment import Augment
from ..errors import DataError, first_line
from .draws import Draws
from .fused import Fused, lookup_table, threads_for
from .pipeline import Batch, Epochs, Output
from .store import Arrays

CHUNK_BYTES = 512 * 2**20  # of finished images; an epoch of CIFAR-10 in bf16 is 307 MB


class Resident:
    """See :class:`hpc_cifar.data.pipeline.Source`.

    Args:
        triton: use the kernel; None means wherever the device and the installation allow it.

    Attributes:
        note: why the kernel does not work here, if it should.
    """

    name = "resident"
    note = ""

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output, *, triton: bool | None = None) -> None:
        self._epochs, self._output = epochs, output
        self._normaliser: Normaliser | None = None
        self._kernel: Any = None
        if triton or (triton is None and output.device.type == "cuda"):
            try:
                self._kernel = self._tried(arrays)
            except torch.OutOfMemoryError as error:
                raise DataError(f"data.pipeline: resident: {first_line(error)}") from error
            except Exception as error:  # no Triton, no C compiler, no folder for its cache: it may raise anything
                if triton:
                    raise
                self.note = f"by torch operations, since Triton's kernel does not work here ({first_line(error)})"
        if self._kernel is None:
            self._normaliser = Normaliser(epochs.config.augment, arrays, output, resident=True, threads=threads_for())

    def _tried(self, arrays: Arrays) -> Any:
        """The kernel, after one launch."""
        caches.use("TRITON_CACHE_DIR", "triton")
        from .triton_kernel import Kernel

        made = Kernel(self._epochs.config.augment, arrays, self._output, self._epochs.seed)
        made.begin(0, np.zeros(1, np.int64))
        made(0, 1)
        if self._output.device.type == "cuda":
            torch.cuda.synchronize(self._output.device)
        return made

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        if self._kernel is not None:
            yield from self._launched(epoch, first)
            return
        assert self._normaliser is not None
        samples, drawn, positions = self._epochs.of(epoch, first)
        on_device = self._normaliser.to_device(samples, drawn)
        start = 0
        for number, global_size, count in positions:
            part = slice(start, start + count)
            start += count
            images, labels = self._normaliser(samples[part], drawn[part], None if on_device is None else on_device[:, part])
            yield Batch(images, labels, number, global_size)

    def _launched(self, epoch: int, first: int) -> Iterator[Batch]:
        """As many batches a launch as fit; each is a part of one finished block."""
        assert self._kernel is not None
        samples, positions = self._epochs.samples_of(epoch, first)
        self._kernel.begin(epoch, samples)
        largest = max(1, CHUNK_BYTES // self._kernel.image_bytes)
        start = 0
        block = labels = None
        while positions:
            taken, images = 0, 0
            while taken < len(positions) and (taken == 0 or images + positions[taken][2] <= largest):
                images += positions[taken][2]
                taken += 1
            block = labels = None  # so that their memory can be used again
            block, labels = self._kernel(start, images)
            start, used = start + images, 0
            for number, global_size, count in positions[:taken]:
                part = slice(used, used + count)
                used += count
                yield Batch(block[part], labels[part], number, global_size)
            positions = positions[taken:]

    def close(self) -> None:
        if self._normaliser is not None:
            self._normaliser.close()
        self._normaliser = self._kernel = None


class Normaliser:
    """Makes the batch of given samples and draws on the device of ``output``.

    Args:
        resident: keep all images on the device; else only those of each batch go there. The same on a CPU.
        threads: of the CPU's fused pass.
    """

    def __init__(self, augment: Augment, arrays: Arrays, output: Output, *, resident: bool, threads: int) -> None:
        self._augment = augment
        self._output = output
        self._images = np.asarray(arrays.images)
        self._labels = np.asarray(arrays.labels)
        self._fused: Fused | None = None
        self._device_images: torch.Tensor | None = None
        height, width, channels = self._images.shape[1:]
        if output.device.type == "cpu":
            self._fused = Fused(augment, output, (height, width, channels), threads)
            self._flat_images = self._images.reshape(-1)
            return
        self._table = lookup_table(output).to(output.device)
        self._border = torch.tensor(augment.padding_values(channels), dtype=torch.uint8).to(output.device)
        if resident:
            self._device_images = torch.from_numpy(np.array(self._images)).to(output.device)
            self._device_labels = torch.from_numpy(np.array(self._labels)).to(output.device)

    def close(self) -> None:
        """End the threads."""
        if self._fused is not None:
            self._fused.close()

    def to_device(self, samples: npt.NDArray[np.int64], drawn: Draws) -> torch.Tensor | None:
        """int64 (6,n): samples and draws on a GPU, for many batches at once; None on a CPU."""
        if self._fused is not None:
            return None
        rows = np.stack([samples, drawn.dy, drawn.dx, drawn.flip.astype(np.int64), drawn.cut_y, drawn.cut_x])
        pinned = torch.from_numpy(rows).pin_memory() if self._output.device.type == "cuda" else torch.from_numpy(rows)
        return pinned.to(self._output.device, non_blocking=True)

    def __call__(
        self, samples: npt.NDArray[np.int64], drawn: Draws, on_device: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n,C,H,W) and labels (n,)."""
        if self._fused is not None:
            return self._fused(self._flat_images, samples, drawn), torch.from_numpy(self._labels[samples])
        rows = self.to_device(samples, drawn) if on_device is None else on_device
        assert rows is not None
        if self._device_images is not None:
            images, labels = self._device_images, self._device_labels[rows[0]]
        else:
            images = torch.from_numpy(self._images[samples]).to(self._output.device, non_blocking=True)
            labels = torch.from_numpy(self._labels[samples]).to(self._output.device, non_blocking=True)
            rows[0] = torch.arange(len(samples), device=self._output.device)
        return augment_batch(images, rows, self._table, self._border, self._augment, self._output), labels


def augment_batch(
    images: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, border: torch.Tensor, augment: Augment, output: Output
) -> torch.Tensor:
    """The same batch by torch operations, for any device and without a host synchronisation.

    Args:
        images: uint8 (N,H,W,C) on the device.
        rows: int64 (6,n), see :meth:`Normaliser.to_device`; row 0 are positions in ``images``.
        table: (C,256), see :func:`hpc_cifar.data.fused.lookup_table`.
        border: uint8 (C,), the raw value outside of the image, unless it is reflected.

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
    outside_y, outside_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
    pixels = images[chosen[:, :, None], y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    outside = outside_y[:, :, None] | outside_x[:, None, :]
    pixels = torch.where(outside[..., None], border, pixels)
    if augment.cutout:
        top, left = cut_y - augment.cutout // 2, cut_x - augment.cutout // 2
        inside_y, inside_x = (down >= top) & (down < top + augment.cutout), (across >= left) & (across < left + augment.cutout)
        pixels = pixels.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[..., None], 0)
    offsets = 256 * torch.arange(channels, device=images.device, dtype=torch.int32)
    batch = table.reshape(-1).to(output.dtype)[pixels.int() + offsets].permute(0, 3, 1, 2)
    return batch if output.channels_last else batch.contiguous()
