"""The FFCV pipeline: its loader reads and decodes ``train.beton``, one operation of ours does the rest.

FFCV's own augmentation cannot be reproduced (its seed controls the order only), its distributed mode repeats samples, and its
custom orders do not work in 1.0.2. So order, shards and draws are ours: the loader is given the samples of each batch, and
the operation, which runs in the loader's thread, asks for the draws of just those samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.operation import Operation
from ffcv.transforms import ToDevice, ToTensor
from numba.core import config as numba_config

from ..errors import DataError, first_line
from . import beton
from .fused import Fused, threads_for
from .pipeline import Batch, Epochs, Output
from .store import Arrays, prepare_command

_JOIN_S = 0.02


def _numba_threads() -> int:
    """NUMBA_NUM_THREADS, more than which FFCV must not ask for."""
    config: Any = numba_config
    return int(config.NUMBA_NUM_THREADS)


@contextlib.contextmanager
def _own_threads() -> Iterator[None]:
    """FFCV sets the number of torch's threads, for all threads that begin from then on, to that of its own."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Augmented(Operation):  # type: ignore[misc]
    """Decoded images to finished ones, by the draws of the thread's epoch."""

    def __init__(self, fused: Fused, epochs: Epochs) -> None:
        super().__init__()
        self._fused, self._epochs = fused, epochs

    def generate_code(self) -> Any:
        def augment(images: Any, _: None, indices: Any) -> torch.Tensor:
            worker = threading.current_thread()
            assert isinstance(worker, _Worker)
            if torch.get_num_threads() != worker.torch_threads:  # FFCV has just set it, for every thread that begins later
                torch.set_num_threads(worker.torch_threads)
            drawn = self._epochs.draws_of(worker.epoch, indices)
            return self._fused(images.reshape(-1), np.arange(len(images)), drawn)

        augment.with_indices = True  # type: ignore[attr-defined]
        return augment

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        shape, dtype = self._fused.batch_shape, self._fused.dtype
        state = dataclasses.replace(previous_state, jit_mode=False, shape=shape, dtype=dtype)
        # new memory for each batch: the loader writes into buffers of its own again before a copy from there need have ended
        return state, None


class _Worker(EpochIterator):  # type: ignore[misc]
    """One epoch's thread. FFCV's own leaves its consumer waiting for ever when it fails, and lives on when it is left."""

    def __init__(self, loader: Loader, order: np.ndarray, epoch: int) -> None:
        self.epoch = epoch
        self.torch_threads = torch.get_num_threads()
        self.error: BaseException | None = None
        super().__init__(loader, order)

    def start(self) -> None:
        """The buffers on a GPU may be blocks that the training is still reading from: the copies into them come after that."""
        for stream in self.cuda_streams:
            if stream is not None:
                stream.wait_stream(self.current_stream)
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            while not self.terminate_event.is_set():
                with contextlib.suppress(queue.Full):
                    self.output_queue.put(None, timeout=0.1)
                    return

    def stop(self) -> None:
        """End the thread, whatever it is about to do, and wait for that."""
        self.close()
        self.iter_ixes = iter(())
        while self.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:
                    self.output_queue.get_nowait()
            self.join(_JOIN_S)
        for stream in self.cuda_streams:  # nor may anybody get the blocks before the last copies into them
            if stream is not None:
                self.current_stream.wait_stream(stream)


class Ffcv:
    """See :class:`hpc_cifar.data.pipeline.Source`."""

    name = "ffcv"

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output) -> None:
        if arrays.beton is None:
            raise DataError(f"data.pipeline: ffcv: there is no {beton.NAME} beside the dataset")
        folder = arrays.beton.parent
        remedy = prepare_command(folder.parent, folder.name) + " --beton"
        beton.verify(arrays.beton, arrays.images, arrays.labels, remedy)
        self._epochs, self._output = epochs, output
        height, width, channels = arrays.images.shape[1:]
        self._empty = torch.empty(0, channels, height, width, dtype=output.dtype, device=output.device)
        threads = threads_for(epochs.config.workers)
        self._fused = Fused(epochs.config.augment, output, (height, width, channels), threads)
        self._on_gpu = output.device.type == "cuda"
        images: list[Operation] = [SimpleRGBImageDecoder(), _Augmented(self._fused, epochs)]
        if self._on_gpu:
            images.append(ToDevice(output.device, non_blocking=True))
        try:
            with _own_threads():
                self._loader: Loader | None = Loader(
                    str(arrays.beton), batch_size=1, num_workers=min(threads, _numba_threads()), os_cache=True,
                    order=OrderOption.SEQUENTIAL, drop_last=False,
                    pipelines={"image": images, "label": [IntDecoder(), ToTensor()]},
                )  # fmt: skip
        except Exception as error:
            raise DataError(f"data.pipeline: ffcv: {arrays.beton}: {first_line(error)}") from error

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        samples, positions = self._epochs.samples_of(epoch, first)
        largest = max((count for _, _, count in positions), default=0)
        if self._loader is None or not largest:
            for number, global_size, _ in positions:
                yield self._nothing(number, global_size)
            return
        # FFCV cuts the order into equal parts: a shard that is smaller than the others repeats its last sample
        order, start = [], 0
        for _, _, count in positions:
            part = samples[start : start + count]
            start += count
            if count:
                order.append(np.pad(part, (0, largest - count), mode="edge"))
        self._loader.batch_size = largest
        try:
            worker = _Worker(self._loader, np.concatenate(order).astype(np.uint64), epoch)
        except Exception as error:
            raise DataError(f"data.pipeline: ffcv: {first_line(error)}") from error
        try:
            for number, global_size, count in positions:
                yield self._taken(worker, number, global_size, count) if count else self._nothing(number, global_size)
        finally:
            worker.stop()

    def _taken(self, worker: _Worker, number: int, global_size: int, count: int) -> Batch:
        device = self._output.device
        try:
            images, labels = next(worker)
        except StopIteration:
            why = first_line(worker.error) if worker.error else "it ended early"
            kind = type(worker.error).__name__ if worker.error else "loading"
            raise DataError(f"data.pipeline: ffcv: the loading thread failed ({kind}: {why})") from worker.error
        images = images[:count]
        if self._on_gpu:  # the loader writes into its buffers again
            images = images.clone()
        return Batch(
            images.to(self._output.dtype),
            labels[:count].flatten().clone().to(device, non_blocking=True),
            number,
            global_size,
        )

    def _nothing(self, number: int, global_size: int) -> Batch:
        return Batch(self._empty, torch.empty(0, dtype=torch.int64, device=self._output.device), number, global_size)

    def close(self) -> None:
        self._fused.close()
        self._loader = None
