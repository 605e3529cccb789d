"""The fused loop of the pipelines on a CPU: gather, pad, crop, flip, cut out and normalise in one pass.

One pass over one image at a time stays in the first-level cache; the chain of torch operations that does the same writes the
batch to memory five times.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import config as numba_config

from .. import caches, files

Kernel = Callable[..., None]


def _fill(  # compiled by numba: its loops are not Python when they run
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
    border: npt.NDArray[np.uint8],
    cutout: int,
    table: npt.NDArray[Any],
    channels_first: bool,
    first: int,
    last: int,
    out: npt.NDArray[Any],
) -> None:
    """Write samples ``first`` to ``last - 1`` of a batch.

    Args:
        images: uint8 (N * height * width * channels,).
        chosen, dy, dx, flip, cut_y, cut_x: (n,), see ``draws.Draws``.
        border: uint8 (channels,), the raw value of what lies outside the image, unless it is reflected.
        table: (channels * 256,), the normalised value of each raw pixel value; float32, or the bits of a 16-bit float.
        channels_first: lay out a sample as (C,H,W), else as (H,W,C).
        out: (n * height * width * channels,), of the type of ``table``.
    """
    # Flat arrays and unsigned indices: a slice costs a count of references, a signed index a test for counting from the end.
    # What shows no pixel of the image is overwritten afterwards, so that the inner loop has no branch.
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
                outside = table[lookup + border[channel]]
                if not inside:
                    for column in range(columns):
                        out[target + column * pixel_step] = outside
                    continue
                line = np.uint64((chosen[sample] * height + y) * width * channels + channel)
                for column in range(columns):
                    out[target + column * pixel_step] = table[lookup + images[line + source[column]]]
                for column in range(np.uint64(begin)):
                    out[target + column * pixel_step] = outside
                for column in range(np.uint64(end), columns):
                    out[target + column * pixel_step] = outside
        if cutout > 0:
            top, left = cut_y[sample] - cutout // 2, cut_x[sample] - cutout // 2
            for row in range(max(top, 0), min(top + cutout, height)):
                for column in range(max(left, 0), min(left + cutout, width)):
                    for channel in range(channels):
                        plane = channel * height * width + row * width + column
                        offset = plane if channels_first else (row * width + column) * channels + channel
                        out[np.uint64(sample * size + offset)] = table[np.uint64(channel * 256)]


def _at_a_fixed_path(function: Any) -> Kernel | None:
    """The function as if it came from a file named by its contents, which is made where it is missing; None if none can be.

    numba keeps what it compiled under the path of the source. Every run has its own snapshot of the code, so that each of its
    ranks would compile again, for more than a second, what the last run compiled.
    """
    text = Path(__file__).read_bytes()
    name = f"kernels-{hashlib.sha256(text).hexdigest()[:16]}"
    config: Any = numba_config
    folder = caches.cache_folder(name, config.CACHE_DIR)  # below the user's own NUMBA_CACHE_DIR, if there is one
    if folder is None:
        return None
    source = folder / "kernels.py"
    try:
        if not source.exists():
            files.write_text(source, text.decode(), durable=False)
    except OSError:
        return None
    code: Any = function.__code__
    return types.FunctionType(code.replace(co_filename=str(source)), globals(), code.co_name)


@contextlib.contextmanager
def _beside_the_source() -> Iterator[None]:
    """Have numba keep machine code in the private folder where the source lies, and not in one that it makes elsewhere."""
    config: Any = numba_config
    before, config.CACHE_DIR = config.CACHE_DIR, ""
    try:
        yield
    finally:
        config.CACHE_DIR = before


@contextlib.contextmanager
def _without_scipy() -> Iterator[None]:
    """numba asks for scipy's BLAS at its first function, for a third of a second; here nothing is multiplied. ``a @ b`` in a
    function of somebody else's asks again.
    """
    blas = "scipy.linalg.cython_blas"
    missing = blas not in sys.modules
    if missing:
        sys.modules[blas] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if missing:
            sys.modules.pop(blas, None)


@functools.cache
def fill_of(item: str) -> Kernel:
    """The loop for tables and batches of ``item``, "float32", "float64" or "uint16"; compiled, or loaded from the cache.

    It takes read-only images, and releases the interpreter lock while it runs.
    """

    def array(kind: Any) -> Any:
        return numba.types.Array(kind, 1, "C", readonly=True)

    integer, boolean = numba.types.int64, numba.types.boolean
    number: Any = getattr(numba.types, item)
    whole, raw = array(integer), array(numba.types.uint8)
    signature = numba.types.void(
        raw, integer, integer, integer, whole, whole, whole, array(boolean), whole, whole, integer, boolean, raw,
        integer, array(number), boolean, integer, integer, numba.types.Array(number, 1, "C"),
    )  # fmt: skip
    if (cached := _at_a_fixed_path(_fill)) is not None:
        # on a full disk: compiled for this process alone
        with _without_scipy(), _beside_the_source(), contextlib.suppress(OSError):
            kept: Kernel = numba.njit(signature, cache=True, nogil=True, boundscheck=False)(cached)
            return kept
    kernel: Kernel = numba.njit(signature, nogil=True, boundscheck=False)(_fill)
    return kernel
