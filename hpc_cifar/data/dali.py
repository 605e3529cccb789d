"""The DALI pipeline: fed by us with images and explicit draws, so that nothing in it is random.

DALI's readers repeat samples over shards, and its iterators start again silently after a restore, so neither is used. A border
that is a reflection cannot be drawn by ``slice``; the images come with it already. DALI mirrors as it normalises, after the
square was cut out, so the square of a mirrored image is put where the mirror takes it from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline as DaliPipeline

from ..errors import DataError, UsageError, first_line
from .draws import Draws
from .fused import lookup_table, threads_for
from .pipeline import Batch, Epochs, Output
from .store import Arrays

AHEAD = 2  # batches in the making while one is used
_TYPES = {torch.float16: types.FLOAT16, torch.float32: types.FLOAT}


class Dali:
    """See :class:`hpc_cifar.data.pipeline.Source`."""

    name = "dali"

    def __init__(self, epochs: Epochs, arrays: Arrays, output: Output) -> None:
        self._epochs, self._output, self._arrays = epochs, output, arrays
        self._augment = epochs.config.augment
        self._table = lookup_table(output).reshape(-1).to(output.device) if output.dtype == torch.float64 else None
        self._border = self._augment.crop_padding if self._augment.padding_mode == "reflect" else 0
        self._images: npt.NDArray[np.uint8] = np.asarray(arrays.images)
        self._labels = np.asarray(arrays.labels)
        largest = -(-min(epochs.config.batch_size, len(epochs.indices)) // epochs.world_size)
        device = output.device
        number = (device.index if device.index is not None else torch.cuda.current_device()) if device.type == "cuda" else None
        try:
            self._pipeline: DaliPipeline | None = self._build(max(1, largest), number)
            self._begin()
        except Exception as error:
            if number is None:
                raise DataError(f"data.pipeline: dali: {first_line(error)}") from error
            raise UsageError(
                f"data.pipeline: dali: no pipeline on GPU {number}, is there a driver? ({first_line(error)})"
            ) from error

    def _build(self, largest: int, device_id: int | None) -> DaliPipeline:
        height, width, channels = self._arrays.images.shape[1:]
        augment, place = self._augment, "cpu" if device_id is None else "gpu"
        pipeline = DaliPipeline(
            batch_size=largest, num_threads=threads_for(self._epochs.config.workers), device_id=device_id,
            prefetch_queue_depth=AHEAD, exec_async=True, exec_pipelined=True, exec_dynamic=True,
        )  # fmt: skip
        with pipeline:
            pixels = fn.external_source(name="images", layout="HWC", dtype=types.UINT8, ndim=3, no_copy=True)
            pixels = pixels.gpu() if place == "gpu" else pixels
            if augment.crop_padding:
                start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
                border = list(augment.padding_values(channels))
                pixels = fn.slice(
                    pixels, start=start, shape=[height, width], axes=[0, 1], out_of_bounds_policy="pad", fill_values=border
                )
            if augment.cutout:
                corner = fn.external_source(name="corner", dtype=types.FLOAT, ndim=1)
                side = [float(augment.cutout)] * 2
                pixels = fn.erase(pixels, anchor=corner, shape=side, axes=[0, 1], fill_value=0.0)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0) if augment.flip != "none" else 0
            # DALI computes in float32: for float64 batches it gives raw values, which a table normalises
            mean, std = ([0.0], [1.0]) if self._table is not None else (self._output.mean, self._output.std)
            unit = 1.0 if self._table is not None else 255.0
            finished = fn.crop_mirror_normalize(
                pixels, mirror=mirror, dtype=_TYPES.get(self._output.dtype, types.FLOAT),
                mean=[unit * value for value in mean], std=[unit * value for value in std],
                output_layout="HWC" if self._output.channels_last else "CHW",
            )  # fmt: skip
            pipeline.set_outputs(finished)
        pipeline.build()
        return pipeline

    def _begin(self) -> None:
        """The first run of a pipeline makes as many batches as it keeps ahead: images of no use, and an early error if any."""
        assert self._pipeline is not None
        sample = np.zeros(1, np.int64)
        for _ in range(AHEAD):
            self._feed(sample, self._epochs.draws_of(0, sample))
        self._pipeline.schedule_run()
        for _ in range(AHEAD):
            self._outputs()

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        samples, drawn, positions = self._epochs.of(epoch, first)
        ends = np.cumsum([count for _, _, count in positions], dtype=int).tolist()
        parts = [slice(end - count, end) for end, (_, _, count) in zip(ends, positions, strict=True) if count]
        fed = taken = 0
        try:
            for (number, global_size, count), end in zip(positions, ends, strict=True):
                while fed < len(parts) and fed <= taken + AHEAD - 1:
                    self._feed(samples[parts[fed]], drawn[parts[fed]])
                    assert self._pipeline is not None
                    self._pipeline.schedule_run()
                    fed += 1
                labels = torch.from_numpy(self._labels[samples[end - count : end]])
                images = self._take(count)
                taken += bool(count)
                yield Batch(images, labels.to(self._output.device, non_blocking=True), number, global_size)
        finally:
            with contextlib.suppress(DataError):  # of a pipeline that is being taken apart
                for _ in range(fed - taken if self._pipeline else 0):  # whoever comes next must not get what is in the making
                    self._outputs()

    def _feed(self, samples: npt.NDArray[np.int64], drawn: Draws) -> None:
        assert self._pipeline is not None
        pipeline, augment = self._pipeline, self._augment
        images = self._images[samples]
        if self._border:
            margin = (self._border, self._border)
            images = np.pad(images, ((0, 0), margin, margin, (0, 0)), mode="reflect")
        pipeline.feed_input("images", images)
        if augment.crop_padding:
            start = np.stack([drawn.dy, drawn.dx], axis=1) - augment.crop_padding + self._border
            pipeline.feed_input("start", start.astype(np.int32))
        if augment.cutout:
            width = self._arrays.images.shape[2]
            top, left = drawn.cut_y - augment.cutout // 2, drawn.cut_x - augment.cutout // 2
            left = np.where(drawn.flip, width - left - augment.cutout, left)
            pipeline.feed_input("corner", np.stack([top, left], axis=1).astype(np.float32))
        if augment.flip != "none":
            pipeline.feed_input("mirror", drawn.flip.astype(np.int32))

    def _outputs(self) -> Any:
        assert self._pipeline is not None
        stream = torch.cuda.current_stream(self._output.device) if self._output.device.type == "cuda" else None
        try:
            [outputs] = self._pipeline.share_outputs(cuda_stream=stream)
            self._pipeline.release_outputs()  # with this executor they stay valid as long as somebody holds them
        except Exception as error:
            self._pipeline = None  # of no use after an error
            raise DataError(f"data.pipeline: dali: {first_line(error)}") from error
        return outputs

    def _take(self, count: int) -> torch.Tensor:
        output = self._output
        height, width, channels = self._arrays.images.shape[1:]
        if not count:
            return torch.empty(0, channels, height, width, dtype=output.dtype, device=output.device)
        images = torch.utils.dlpack.from_dlpack(self._outputs().as_tensor())
        if self._table is None:
            images = images.to(output.dtype)
        else:
            offsets = 256 * torch.arange(channels, dtype=torch.int32, device=images.device)
            offsets = offsets if output.channels_last else offsets[:, None, None]
            images = self._table[images.int() + offsets]
        return images.permute(0, 3, 1, 2) if output.channels_last else images

    def close(self) -> None:
        self._pipeline = None
