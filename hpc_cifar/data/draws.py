"""Order and augmentation draws: pure functions of (seed, epoch, sample index).

There is no generator and no state. Sample ``i`` draws the same crop in epoch ``e`` whatever the batch size, the number of
ranks, the pipeline or the place where a run was stopped. So every pipeline delivers the same pixels, and a run continues in
mid-epoch, or on fewer ranks, without a random state to save.

The mix is that of splitmix64: a key for (seed, epoch, stream) plus ``index`` times an odd constant, then an avalanche.
Both steps are bijections of 64 bits, so two samples never share a hash and an order never has a tie.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from ..config.experiment import Augment

Ints = npt.NDArray[np.int64]

# Streams keep draws of different purpose independent. Their numbers are part of the result of a run: never renumber them.
ORDER, CROP, FLIP, CUTOUT, SPLIT, ROTATE, SHIFT = range(1, 8)

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_WEYL = 0x9E37_79B9_7F4A_7C15
_FIRST = 0xBF58_476D_1CE4_E5B9
_SECOND = 0x94D0_49BB_1331_11EB


def _mix(value: int) -> int:
    """The avalanche of splitmix64 for one number."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def key_of(seed: int, epoch: int, stream: int) -> int:
    """64-bit key of one stream of draws; every bit of each argument changes about half of it."""
    key = 0
    for part in (seed, epoch, stream):
        key = _mix((key ^ (part & _MASK)) + _WEYL & _MASK)
    return key


def hashes(seed: int, epoch: int, stream: int, indices: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """One 64-bit hash for each sample index, uint64 of the shape of ``indices``."""
    value = np.array(indices, dtype=np.int64).view(np.uint64)  # a copy, which the steps below overwrite
    value *= np.uint64(_WEYL)
    value += np.uint64(key_of(seed, epoch, stream))
    shifted = np.empty_like(value)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        np.right_shift(value, np.uint64(shift), out=shifted)
        value ^= shifted
        if factor != 1:
            value *= np.uint64(factor)
    return value


def _below(field: npt.NDArray[np.uint64], bound: int) -> Ints:
    """Uniform 0..bound-1 from a 32-bit field by multiply and shift; the bias is below bound / 2**32."""
    return ((field * np.uint64(bound)) >> np.uint64(32)).view(np.int64)


def _two_below(value: npt.NDArray[np.uint64], first: int, second: int) -> tuple[Ints, Ints]:
    return _below(value >> np.uint64(32), first), _below(value & np.uint64(0xFFFF_FFFF), second)


def order(seed: int, epoch: int, indices: npt.ArrayLike, stream: int = ORDER) -> Ints:
    """``indices`` (n,) in the order of ``epoch``: int64 (n,), whatever the order in which they come.

    Args:
        stream: another order for another purpose, of the same seed and epoch.
    """
    samples = np.asarray(indices, dtype=np.int64)
    return samples[np.argsort(hashes(seed, epoch, stream, samples), kind="stable")]


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is done to each of n samples, in the order crop, flip, cut out.

    Attributes:
        dy, dx: int64 (n,) top left corner of the crop in the padded image, 0..2*crop_padding; crop_padding is no shift.
        flip: bool (n,) mirror left and right.
        cut_y, cut_x: int64 (n,) centre of the cut-out square in the finished image, from 0; the square covers
            ``centre - cutout // 2`` and the ``cutout - 1`` pixels after it, as far as they lie in the image.
    """

    dy: Ints
    dx: Ints
    flip: npt.NDArray[np.bool_]
    cut_y: Ints
    cut_x: Ints

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.dy[part], self.dx[part], self.flip[part], self.cut_y[part], self.cut_x[part])


def augmentation(
    seed: int, epoch: int, indices: npt.ArrayLike, augment: Augment, height: int, width: int | None = None
) -> Draws:
    """Draws of the samples ``indices`` (n,) in ``epoch``.

    Args:
        height, width: of the finished image in pixels; the width is the height if left out.
    """
    samples = np.asarray(indices, dtype=np.int64)
    nothing = np.zeros(samples.shape, dtype=np.int64)
    dy = dx = cut_y = cut_x = nothing
    flip = np.zeros(samples.shape, dtype=np.bool_)
    if augment.crop_padding:
        places = 2 * augment.crop_padding + 1
        dy, dx = _two_below(hashes(seed, epoch, CROP, samples), places, places)
    if augment.flip == "random":
        flip = (hashes(seed, epoch, FLIP, samples) >> np.uint64(63)).astype(np.bool_)
    elif augment.flip == "alternating":  # each image alternates; the epoch is left out of the hash, so only its parity counts
        flip = ((hashes(seed, 0, FLIP, samples) >> np.uint64(63)) ^ np.uint64(epoch & 1)).astype(np.bool_)
    if augment.cutout:
        cut_y, cut_x = _two_below(hashes(seed, epoch, CUTOUT, samples), height, width or height)
    return Draws(dy, dx, flip, cut_y, cut_x)


Reals = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Warps:
    """How each of n samples is rotated about its centre, and shifted after that.

    Attributes:
        angle: float32 (n,) radians, counter-clockwise.
        down, across: float32 (n,) fractions of the height and of the width.
    """

    angle: Reals
    down: Reals
    across: Reals


def warp(seed: int, epoch: int, indices: npt.ArrayLike, augment: Augment) -> Warps:
    """Rotations and shifts of the samples ``indices`` (n,) in ``epoch``, uniform from minus to plus what ``augment`` says."""
    samples = np.asarray(indices, dtype=np.int64)
    turn = (hashes(seed, epoch, ROTATE, samples) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    both = hashes(seed, epoch, SHIFT, samples)
    down, across = (
        (half.astype(np.float64) + 0.5) * 2.0**-32 for half in (both >> np.uint64(32), both & np.uint64(0xFFFF_FFFF))
    )
    scales = (np.deg2rad(augment.rotation_degrees), *augment.shifts)
    angle, down, across = (
        ((2 * share - 1) * scale).astype(np.float32) for share, scale in zip((turn, down, across), scales, strict=True)
    )
    return Warps(angle, down, across)
