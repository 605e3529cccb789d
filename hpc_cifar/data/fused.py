"""The fused pass over uint8 images on a CPU, spread over threads: what `resident` and `ffcv` deliver there."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from ..config.experiment import Augment
from .draws import Draws
from .pipeline import Output

_LEAST_PER_THREAD = 128  # images of 32 x 32; fewer are done sooner than a thread wakes up


def lookup_table(output: Output) -> torch.Tensor:
    """(C,256): the normalised value of each raw value, in the steps of torchvision, so equal to the last bit.

    In float32, for float64 batches in float64.
    """
    kind = torch.promote_types(output.dtype, torch.float32)
    raw = torch.arange(256, dtype=kind) * (1 / 255)
    mean, std = (torch.tensor(values, dtype=kind)[:, None] for values in (output.mean, output.std))
    return (raw - mean) / std


def threads_for(workers: int | str = "auto") -> int:
    """How many threads of this process may work.

    No more than torch uses, which is this rank's share of the node, or than there are processors; fewer if ``workers`` is.
    """
    allowed = min(len(os.sched_getaffinity(0)), torch.get_num_threads())
    return max(1, allowed if isinstance(workers, str) else min(workers, allowed))


class Fused:
    """Makes batches of samples that lie in memory.

    Args:
        shape: (height, width, channels) of every image.
        threads: that work on one batch.
    """

    def __init__(self, augment: Augment, output: Output, shape: tuple[int, int, int], threads: int) -> None:
        from .kernels import fill_of

        self._augment, self._shape = augment, shape
        self._dtype, self._channels_last = output.dtype, output.channels_last
        self._border = np.array(augment.padding_values(shape[2]), np.uint8)
        table = lookup_table(output)
        self._table = _bits(table.to(output.dtype)).reshape(-1)
        self._fill = fill_of(self._table.dtype.name)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "augment") if threads > 1 else None
        self._pinned = output.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the batches."""
        return self._dtype

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """Of one image as it lies in memory: (H,W,C) or (C,H,W)."""
        height, width, channels = self._shape
        return (height, width, channels) if self._channels_last else (channels, height, width)

    def __call__(
        self,
        images: npt.NDArray[np.uint8],
        chosen: npt.NDArray[np.int64],
        drawn: Draws,
    ) -> torch.Tensor:
        """The batch of the images ``chosen``: (n,C,H,W), in new memory, from where it can be copied if it goes to a GPU.

        Args:
            images: uint8 (N * H * W * C,).
            chosen: int64 (n,).
        """
        height, width, channels = self._shape
        count, augment = len(chosen), self._augment
        batch = torch.empty((count, *self.batch_shape), dtype=self._dtype, pin_memory=self._pinned)
        flat = _bits(batch).reshape(-1)

        def work(first: int, last: int) -> None:
            self._fill(
                images, height, width, channels, chosen, drawn.dy, drawn.dx, drawn.flip, drawn.cut_y, drawn.cut_x,
                augment.crop_padding, augment.padding_mode == "reflect", self._border, augment.cutout, self._table,
                not self._channels_last, first, last, flat,
            )  # fmt: skip

        least = max(1, _LEAST_PER_THREAD * 1024 // (height * width))
        threads = max(1, min(self._threads, count // least))
        edges = [count * part // threads for part in range(threads + 1)]
        others = [self._pool.submit(work, *edges[part : part + 2]) for part in range(1, threads)] if self._pool else []
        work(0, edges[1])
        for other in others:
            other.result()
        return batch.permute(0, 3, 1, 2) if self._channels_last else batch

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool, self._threads = None, 1


def _bits(tensor: torch.Tensor) -> npt.NDArray[np.float32] | npt.NDArray[np.float64] | npt.NDArray[np.uint16]:
    """The same memory: 16-bit floats as whole numbers, since numpy and numba have no bf16, the others as they are."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype.itemsize == 2 else tensor.numpy()
