"""The fused loop of the resident pipeline on a CPU: gather, pad, crop, flip, cut out and normalise in one pass.

One pass over one image at a time stays in the first-level cache; the chain of torch operations that does the same writes the
batch to memory five times.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import config as numba_config

Kernel = Callable[..., None]


def _fill(
    images: npt.NDArray[np.uint8],
    height: int,
    width: int,
    channels: int,
    chosen: npt.NDArray[np.int64],
    dy: npt.NDArray[np.int64],
    dx: npt.NDArray[np.int64],
    flip: npt.NDArray[np.bool_],
    cut_y: npt.NDArray[np.int64],
    cut_x: npt.NDArray[np.int64],
    padding: int,
    reflect: bool,
    cutout: int,
    table: npt.NDArray[np.float32],
    channels_first: bool,
    first: int,
    last: int,
    out: npt.NDArray[np.float32],
) -> None:
    """Write samples ``first`` to ``last - 1`` of a batch.

    Args:
        images: uint8 (N * height * width * channels,).
        chosen, dy, dx, flip, cut_y, cut_x: (n,), see ``draws.Draws``.
        table: float32 (channels * 256,), the normalised value of each raw pixel value.
        channels_first: lay out a sample as (C,H,W), else as (H,W,C).
        out: float32 (n * height * width * channels,).
    """
    # Flat arrays and unsigned indices: a slice costs a count of references, a signed index a test for counting from the end.
    # What must be black is overwritten afterwards, so that the inner loop has no branch.
    size = height * width * channels
    source = np.empty(width, np.uint64)  # where in its row the pixel lies that each column shows
    pixel_step = np.uint64(1 if channels_first else channels)
    columns = np.uint64(width)
    for sample in range(first, last):
        begin, end = 0, width  # columns that do not show padding
        for column in range(width):
            x = (width - 1 - column if flip[sample] else column) + dx[sample] - padding
            if reflect:
                x = -x if x < 0 else (2 * (width - 1) - x if x >= width else x)
            elif x < 0 or x >= width:
                if column == begin:
                    begin = column + 1
                elif end == width:
                    end = column
                x = 0
            source[column] = np.uint64(x * channels)
        for row in range(height):
            y = row + dy[sample] - padding
            if reflect:
                y = -y if y < 0 else (2 * (height - 1) - y if y >= height else y)
            inside = 0 <= y < height
            for channel in range(channels):
                offset = (channel * height + row) * width if channels_first else row * width * channels + channel
                target = np.uint64(sample * size + offset)
                lookup = np.uint64(channel * 256)
                if not inside:
                    for column in range(columns):
                        out[target + column * pixel_step] = table[lookup]
                    continue
                line = np.uint64((chosen[sample] * height + y) * width * channels + channel)
                for column in range(columns):
                    out[target + column * pixel_step] = table[lookup + images[line + source[column]]]
                for column in range(np.uint64(begin)):
                    out[target + column * pixel_step] = table[lookup]
                for column in range(np.uint64(end), columns):
                    out[target + column * pixel_step] = table[lookup]
        if cutout > 0:
            top, left = cut_y[sample] - cutout // 2, cut_x[sample] - cutout // 2
            for row in range(max(top, 0), min(top + cutout, height)):
                for column in range(max(left, 0), min(left + cutout, width)):
                    for channel in range(channels):
                        plane = channel * height * width + row * width + column
                        offset = plane if channels_first else (row * width + column) * channels + channel
                        out[np.uint64(sample * size + offset)] = table[np.uint64(channel * 256)]


def _private_cache() -> str | None:
    """A cache folder that only this user can write: compiled code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"hpc-cifar-numba-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if folder.is_dir() and not folder.is_symlink() and facts.st_uid == os.getuid() and not facts.st_mode & 0o077:
            return str(folder)
    return None


def _compile() -> Kernel:
    """Compile, or load from the cache, for read-only images; the interpreter lock is released while the kernel runs."""
    types = numba.types

    def array(kind: Any) -> Any:
        return types.Array(kind, 1, "C", readonly=True)

    whole = array(types.int64)
    out = types.Array(types.float32, 1, "C")
    signature = types.void(
        array(types.uint8), types.int64, types.int64, types.int64, whole, whole, whole, array(types.boolean), whole, whole,
        types.int64, types.boolean, types.int64, array(types.float32), types.boolean, types.int64, types.int64, out,
    )  # fmt: skip
    config: Any = numba_config
    options: dict[str, Any] = {"nogil": True, "boundscheck": False}
    try:
        return numba.njit(signature, cache=True, **options)(_fill)
    except RuntimeError:  # neither the package nor the home folder can be written, as in many containers
        folder = _private_cache()
        if folder is None:
            return numba.njit(signature, cache=False, **options)(_fill)
        before = config.CACHE_DIR
        config.CACHE_DIR = folder
        try:
            return numba.njit(signature, cache=True, **options)(_fill)
        finally:
            config.CACHE_DIR = before


fill: Kernel = _compile()
