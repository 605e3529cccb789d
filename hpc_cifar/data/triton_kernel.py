"""One Triton kernel that makes finished batches from the dataset on the device: gather by index, pad, crop, flip, cut out,
normalise, convert. The draws are computed inside, by the formulas of :mod:`hpc_cifar.data.draws`.

Every argument that changes between launches lies in device memory (the order, the keys of the epoch, the place where the
batch begins), so a launch may be captured in a CUDA graph and replayed for the next batch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from ..config.experiment import Augment
from . import draws
from .pipeline import Output
from .store import Arrays

BLOCK = 1024  # values a program writes
_FLIPS = {"none": 0, "random": 1, "alternating": 2}

_WEYL = tl.constexpr(0x9E37_79B9_7F4A_7C15)
_FIRST = tl.constexpr(0xBF58_476D_1CE4_E5B9)
_SECOND = tl.constexpr(0x94D0_49BB_1331_11EB)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _hash(sample, key):  # type: ignore[no-untyped-def]
    """``draws.hashes`` of one sample; both arguments and the result are uint64."""
    value = sample * _WEYL + key
    value = (value ^ (value >> 30)) * _FIRST
    value = (value ^ (value >> 27)) * _SECOND
    return value ^ (value >> 31)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _below(field, bound: tl.constexpr):  # type: ignore[no-untyped-def]
    """``draws._below``: a 32-bit field to a whole number below ``bound``."""
    return ((field * bound) >> 32).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fill(  # type: ignore[no-untyped-def]
    images, labels, order, position, keys, scale, out, out_labels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDING: tl.constexpr, REFLECT: tl.constexpr,
    FLIP: tl.constexpr, CUTOUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes ``BLOCK`` values of one image.

    images: uint8 (N,H,W,C). labels: int64 (N,). order: int64, samples of an epoch. position: int64 (1,), where in the order
    the first image of this launch lies. keys: int64 (4,), of crop, flip and cut-out, and the epoch's parity. scale: (3,C), mean
    and 1 / std of raw values, and the raw value of a border, float32 or for float64 images float64.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(order + tl.load(position) + row)
    if tl.program_id(1) == 0:
        tl.store(out_labels + row, tl.load(labels + sample))
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    whole: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    wanted = value < whole
    if CHANNELS_LAST:
        channel = value % CHANNELS
        pixel = value // CHANNELS
    else:
        channel = value // (HEIGHT * WIDTH)
        pixel = value % (HEIGHT * WIDTH)
    y = pixel // WIDTH
    x = pixel % WIDTH
    index = sample.to(tl.uint64, bitcast=True)
    black = value < 0  # nothing
    if CUTOUT > 0:
        drawn = _hash(index, tl.load(keys + 2).to(tl.uint64, bitcast=True))
        top = _below(drawn >> 32, HEIGHT) - CUTOUT // 2
        left = _below(drawn & 0xFFFFFFFF, WIDTH) - CUTOUT // 2
        black = (y >= top) & (y < top + CUTOUT) & (x >= left) & (x < left + CUTOUT)
    if FLIP > 0:
        turned = (_hash(index, tl.load(keys + 1).to(tl.uint64, bitcast=True)) >> 63).to(tl.int32)
        if FLIP == 2:
            turned = turned ^ tl.load(keys + 3).to(tl.int32)
        x = tl.where(turned > 0, WIDTH - 1 - x, x)
    outside = value < 0
    if PADDING > 0:
        drawn = _hash(index, tl.load(keys).to(tl.uint64, bitcast=True))
        y += _below(drawn >> 32, 2 * PADDING + 1) - PADDING
        x += _below(drawn & 0xFFFFFFFF, 2 * PADDING + 1) - PADDING
        if REFLECT:
            y = tl.where(y < 0, -y, tl.where(y >= HEIGHT, 2 * (HEIGHT - 1) - y, y))
            x = tl.where(x < 0, -x, tl.where(x >= WIDTH, 2 * (WIDTH - 1) - x, x))
        else:
            outside = (y < 0) | (y >= HEIGHT) | (x < 0) | (x >= WIDTH)
    place = (y * WIDTH + x) * CHANNELS + channel
    raw = tl.load(images + sample * whole + place, mask=wanted & ~outside & ~black, other=0).to(tl.float32)
    mean = tl.load(scale + channel, mask=wanted, other=0.0)
    factor = tl.load(scale + CHANNELS + channel, mask=wanted, other=0.0)
    border = tl.load(scale + 2 * CHANNELS + channel, mask=wanted & outside, other=0.0)
    raw = tl.where(outside & ~black, border, raw)
    tl.store(out + row * whole + value, ((raw - mean) * factor).to(out.dtype.element_ty), mask=wanted)


class Kernel:
    """The dataset on a device, and launches over it.

    Args:
        arrays: copied to the device of ``output`` as they are.
    """

    def __init__(self, augment: Augment, arrays: Arrays, output: Output, seed: int) -> None:
        device = output.device
        self._augment, self._output, self._seed = augment, output, seed
        self._images = torch.from_numpy(np.array(arrays.images)).to(device)
        self._labels = torch.from_numpy(np.array(arrays.labels)).to(device)
        _, self._height, self._width, self._channels = arrays.images.shape
        rows = [
            [255 * mean for mean in output.mean], [1 / (255 * std) for std in output.std],
            list(augment.padding_values(self._channels)),
        ]  # fmt: skip
        self._scale = torch.tensor(rows, dtype=torch.promote_types(output.dtype, torch.float32)).to(device)
        self.order = torch.zeros(len(self._labels), dtype=torch.int64, device=device)
        self.keys = torch.zeros(4, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def image_bytes(self) -> int:
        """Of one finished image."""
        return int(self._height * self._width * self._channels * self._output.dtype.itemsize)

    def begin(self, epoch: int, samples: npt.NDArray[np.int64]) -> None:
        """Launches are over ``samples`` of ``epoch`` from here on; each sample at most once. The memory of the order stays."""
        keys = [draws.key_of(self._seed, epoch, stream) for stream in (draws.CROP, draws.FLIP, draws.CUTOUT)]
        if self._augment.flip == "alternating":
            keys[1] = draws.key_of(self._seed, 0, draws.FLIP)
        bits = np.array([*keys, epoch & 1], np.uint64).view(np.int64)
        self.keys.copy_(torch.from_numpy(bits))
        self.order[: len(samples)].copy_(torch.from_numpy(samples))

    def __call__(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n,C,H,W) and labels (n,) of the samples from ``start`` on in the order, in new memory."""
        images, labels = self.empty(count)
        self.position.fill_(start)
        self.launch(images, labels)
        return images, labels

    def empty(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for a launch: images (count, channels, height, width) in the output's dtype and layout; labels (count,)."""
        device = self._output.device
        layout = torch.channels_last if self._output.channels_last else torch.contiguous_format
        shape = (count, self._channels, self._height, self._width)
        images = torch.empty(shape, dtype=self._output.dtype, device=device, memory_format=layout)
        return images, torch.empty(count, dtype=torch.int64, device=device)

    def launch(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Fill memory from :meth:`empty` with the samples that begin at ``position`` in ``order``; safe in a CUDA graph.

        Args:
            images, labels: (n, channels, height, width) and (n,), on the device; n may be 0.
        """
        if not len(labels):
            return
        augment = self._augment
        values = self._height * self._width * self._channels
        block: Any = min(BLOCK, triton.next_power_of_2(values))
        device = self._output.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # Triton takes the current one
            _fill[len(labels), triton.cdiv(values, block)](
                self._images, self._labels, self.order, self.position, self.keys, self._scale, images, labels,
                HEIGHT=self._height, WIDTH=self._width, CHANNELS=self._channels, PADDING=augment.crop_padding,
                REFLECT=augment.padding_mode == "reflect", FLIP=_FLIPS[augment.flip], CUTOUT=augment.cutout,
                CHANNELS_LAST=self._output.channels_last, BLOCK=block,
            )  # fmt: skip
