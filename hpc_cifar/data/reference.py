"""The reference pipeline: torchvision transforms in a torch DataLoader, one image at a time.

Deliberately plain. It is what the other pipelines are compared with, in pixels and in speed, so it shares nothing with them
but the draws.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2

from ..config.experiment import Augment
from ..errors import DataError, first_line
from .fused import threads_for
from .pipeline import Batch, Epochs, Output
from .store import Arrays

transforms: Any = v2.functional
SHARED = Path("/dev/shm")  # through which torch's workers send their batches
AHEAD = 2  # batches that torch's loader has each worker make beforehand
PAGES = 2**14  # that a batch and its labels take at most beside what is in them, with a semaphore
WORKERS = 2  # processes, unless the job file says how many
Key = tuple[int, int, int, bool, int, int]  # sample, dy, dx, flip, cut_y, cut_x


class _Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Maps a sample and its draws to a normalised image (C,H,W), float32 or for float64 batches float64, and its label."""

    def __init__(self, arrays: Arrays, augment: Augment, output: Output) -> None:
        self._images: npt.NDArray[np.uint8] = arrays.images
        self._labels = arrays.labels
        self._augment = augment
        self._mean, self._std = list(output.mean), list(output.std)
        self._dtype = torch.promote_types(output.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self._images.shape
        return height, width, channels

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: where a memory-mapped file lies instead of what is in it."""
        images = self._images
        # a part of a mapped array has the offset of the whole one; its base is that array, and not the file
        mapped = isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap)
        place = (str(images.filename), images.dtype, images.offset, images.shape) if mapped else None  # type: ignore[attr-defined]
        return self.__dict__ | {"_images": None if place else images, "_place": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        place = state.pop("_place")
        self.__dict__.update(state)
        if place is not None:
            name, dtype, offset, shape = place
            self._images = np.memmap(name, dtype, "r", offset, shape)

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
        image = transforms.to_dtype(image, self._dtype, scale=True)
        return transforms.normalize(image, self._mean, self._std), int(self._labels[sample])


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Stack the samples; None for an empty shard, which the loader's own function refuses."""
    if not samples:
        return None
    images, labels = torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])
    if get_worker_info() is not None:  # here an error reaches the loader; in its thread that sends the batch it would be lost
        for tensor in (images, labels):
            tensor.untyped_storage().share_memory_()
    return images, labels


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
        processes: dict[str, Any] = {}
        if self._workers:
            self._check_room(max((count for _, _, count in positions), default=0), len(positions))
            # without a time limit, the loader looks every 5 s whether they live
            processes = {"worker_init_fn": _ignore_signals, "multiprocessing_context": _context()}
        loader: DataLoader[Any] = DataLoader(
            self._dataset, batch_sampler=shards, num_workers=self._workers, collate_fn=_collate, pin_memory=cuda, **processes
        )
        memory = torch.channels_last if self._output.channels_last else torch.contiguous_format
        loading: Iterator[Any] | None = None
        for number, global_size, _ in positions:
            try:
                loading = loading or iter(loader)
                images, labels = next(loading) or (self._nothing, torch.empty(0, dtype=torch.int64))
            except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or /dev/shm has no room for what it sends
                if not self._workers:
                    raise
                raise DataError(
                    f"data.pipeline: reference: its workers failed ({_why(error)}); data.workers: 0 needs neither "
                    "processes nor room in /dev/shm"
                ) from error
            images = images.to(self._output.device, self._output.dtype, non_blocking=True).contiguous(memory_format=memory)
            yield Batch(images, labels.to(self._output.device, non_blocking=True), number, global_size)

    def _check_room(self, largest: int, batches: int) -> None:
        """Whether all batches that may be on their way fit into shared memory: a worker is killed where a page has no room.

        Raises:
            DataError: they do not.
        """
        height, width, channels = self._dataset.shape
        item = torch.promote_types(self._output.dtype, torch.float32).itemsize
        batch = largest * (height * width * channels * item + 8) + PAGES
        needed = min(self._workers * AHEAD + 2, batches) * batch * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        try:
            free = shutil.disk_usage(SHARED).free
        except OSError:
            return
        if free < needed:
            raise DataError(
                f"data.pipeline: reference: its {self._workers} workers need {needed / 2**20:,.1f} MiB of {SHARED}, where "
                f"{free / 2**20:,.1f} MiB are free; data.workers: 0 needs none, --shm-size of a container gives more"
            )

    def close(self) -> None:
        """Its worker processes ended with the iterators."""


def _why(error: BaseException) -> str:
    """What a worker raised is the last line of what the loader says."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines and lines[0].startswith("Caught") else first_line(error)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _context() -> Any:
    """Workers are forked from a server that has no threads.

    A process forked from this one, whose threads (of OpenMP, numba, DALI, W&B) it does not get, may wait for ever for a lock
    that one of them held: seen once in about a hundred starts.
    """
    context = multiprocessing.get_context("forkserver")
    if not forkserver._forkserver._forkserver_pid and forkserver._forkserver._preload_modules == ["__main__"]:  # type: ignore[attr-defined]
        context.set_forkserver_preload([__name__])
    # Slurm signals every process of a step; a blocked signal stays blocked in all that begin here, and is not lost for us.
    # The tracker unblocks some of them, so each gets its own turn.
    for begin in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            begin()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _ignore_signals(_: int) -> None:
    """Slurm signals every process of a step; a worker that died of it would take the checkpoint on stopping with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
