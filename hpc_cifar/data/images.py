"""Read ``train|test/<class>/*.jpg|png`` from a folder or tar archive, without unpacking it."""

from __future__ import annotations

import collections
import difflib
import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ..errors import DataError, first_line

EXTENSIONS = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "test")
LARGEST_SIDE = 1024  # pixels
LARGEST_FILE_BYTES = 8 * 2**20  # an uncompressed image of that size has 3 MiB
EXPANDED_BYTES, EXPANSION = (
    2**28,
    200,
)  # all images together may have so many bytes of pixels, and so many times those of their source
_CHUNK = 256  # images handed to a thread at once: one small JPEG is too little work
_CHUNK_BYTES = 2**24  # of files, and of pixels

Pixels = npt.NDArray[np.uint8]
Split = tuple[Pixels, npt.NDArray[np.int64]]


def place(name: str) -> tuple[str, str] | None:
    """Split and class of an image file, or None if ``name`` is none: ``[anything/]train|test/<class>/<file>.jpg``."""
    parts = name.split("/")
    if len(parts) < 3 or not parts[-1].lower().endswith(EXTENSIONS) or parts[-1].startswith("."):
        return None
    return (parts[-3], parts[-2]) if parts[-3] in SPLITS else None


def _decode(
    source: str, chunk: Sequence[tuple[str, bytes]], side: int | None, usual: tuple[int, ...] | None = None
) -> list[Pixels]:
    """The pixels of some images; of one that is not of the ``usual`` shape only the shape, in an array that takes no memory."""
    from PIL import Image

    decoded = []
    for name, data in chunk:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                mode, size = image.mode, image.size
                fits = mode == "RGB" and max(size) <= LARGEST_SIDE and (side is None or size == (side, side))
                shape = (size[1], size[0], 3)
                odd = usual is not None and shape != usual
                pixels = (np.broadcast_to(np.uint8(0), shape) if odd else np.asarray(image)) if fits else None
        except Image.DecompressionBombError:
            raise DataError(f"{source}: {name}: has more pixels than {LARGEST_SIDE} x {LARGEST_SIDE}") from None
        except Exception as error:  # a damaged image may raise anything in a decoder
            raise DataError(f"{source}: {name}: is no whole JPEG or PNG image ({first_line(error)})") from None
        if pixels is None:
            wanted = f"{side} x {side}" if side else f"at most {LARGEST_SIDE} x {LARGEST_SIDE}"
            raise DataError(f"{source}: {name}: is {size[0]} x {size[1]} pixels in mode {mode}; should be {wanted} in mode RGB")
        decoded.append(pixels)
    return decoded


def _class_list(source: str, found: Iterable[tuple[str, str]], classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in their order of labels; every wrong or missing class folder is an error."""
    present = sorted(set(found))
    expected = tuple(classes) if classes else tuple(sorted({name for _, name in present}))
    for split, name in present:
        if name not in expected:
            close = difflib.get_close_matches(name.lower(), expected, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "the classes are " + ", ".join(expected)
            raise DataError(f"{source}: {split}/{name}: is no class of this dataset; {hint}")
    for split, name in itertools.product(SPLITS, expected):
        if (split, name) not in present:
            raise DataError(f"{source}: {split}/{name}: has no images; every class needs some in train and in test")
    return expected


def _chunks(found: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """The first image alone, then as many as a thread may have."""
    chunk: list[tuple[str, bytes]] = []
    most, size = 1, 0
    for one in found:
        chunk.append(one)
        size += len(one[1])
        if len(chunk) >= most or size > _CHUNK_BYTES:
            yield chunk
            chunk, most, size = [], _CHUNK, 0
    if chunk:
        yield chunk


def read(
    source: str,
    found: Iterable[tuple[str, bytes]],
    classes: Sequence[str] | None,
    side: int | None,
    threads: int,
    most_bytes: int,
) -> tuple[Split, Split, tuple[str, ...]]:
    """Decode every image of ``found``, pairs of name and content.

    Args:
        source: name of the archive or folder, for messages.
        classes: names in the order of their labels, or None: those found, sorted.
        side: height and width that every image must have, or None: all equal.
        threads: decoders at work at once; Pillow decodes without the interpreter lock.
        most_bytes: of the pixels of all images.

    Returns:
        Images (N,H,W,3) and labels (N,) of train and of test, sorted by class and name, and the class names.

    Raises:
        DataError: an image is damaged or of another size or mode, a class folder is wrong,
            missing or empty, or a name is there twice.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the size is looked at before any pixel
    names: list[tuple[str, str, str]] = []
    running: collections.deque[Future[list[Pixels]]] = collections.deque()
    decoded: list[Pixels] = []
    usual: tuple[int, ...] | None = None
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for chunk in _chunks((name, data) for name, data in found if place(name)):
                names += [(*(place(name) or ("", "")), name.rpartition("/")[2]) for name, _ in chunk]
                if usual is None:  # the first image alone
                    decoded = _decode(source, chunk, side)
                    usual = decoded[0].shape
                    continue
                if len(names) * math.prod(usual) > most_bytes:
                    raise DataError(
                        f"{source}: its images expand to more than {most_bytes // 2**20:,} MiB of pixels, hundreds of times "
                        "its size: no dataset does that"
                    )
                running.append(pool.submit(_decode, source, chunk, side, usual))
                while len(running) > 4 * threads:  # bounds what waits in memory
                    decoded += running.popleft().result()
            while running:
                decoded += running.popleft().result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    order = _class_list(source, ((split, name) for split, name, _ in names), classes)
    shapes = collections.Counter(pixels.shape for pixels in decoded)
    if len(shapes) > 1:
        usual = shapes.most_common(1)[0][0]
        name, odd = next(("/".join(name), p.shape) for name, p in zip(names, decoded, strict=True) if p.shape != usual)
        raise DataError(
            f"{source}: {name}: is {odd[1]} x {odd[0]} pixels, most others are {usual[1]} x {usual[0]}; all should be equal"
        )
    twice = ["/".join(place) for place, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: {twice[0]}: is there more than once")
    splits = []
    for split in SPLITS:
        rows = sorted((order.index(name), path, row) for row, (part, name, path) in enumerate(names) if part == split)
        try:
            pixels = np.stack([decoded[row] for _, _, row in rows])
        except MemoryError:
            raise DataError(f"{source}: its images need more memory than there is") from None
        splits.append((pixels, np.array([label for label, _, _ in rows], np.int64)))
    return splits[0], splits[1], order
