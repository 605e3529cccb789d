"""FFCV's file of the training images, ``train.beton``, and facts about it beside it.

FFCV reads a truncated or altered file without a word and delivers wrong images, so the file is compared with the store before
it is read. It is written by this module and not by FFCV's own writer, which needs room in /dev/shm (without it the process is
killed) and waits for ever when one of its processes dies, as on a full disk.

The layout is that of FFCV's file format 2: a header, a description of the fields, a row for each sample, the pixels in pages,
and a table of where each image lies.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import files
from ..errors import DataError

NAME = "train.beton"
FACTS = f"{NAME}.json"
PAGE_BYTES = 8 * 2**20  # FFCV's default; no image lies on two pages
FORMAT = 2


def write(folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], digest: str) -> Path:
    """Write ``folder/train.beton`` and the facts about it, or nothing at all.

    Args:
        images: uint8 (N,H,W,3). labels: int64 (N,).
        digest: of the store that they come from.

    Raises:
        DataError: FFCV's version reads another format, or the images are not RGB.
        OSError: the disk is full or cannot be written.
    """
    import ffcv

    partial = folder / f".{NAME}.{os.getpid()}.tmp"
    try:
        with partial.open("xb") as stream:
            for place, part in _parts(images, labels):
                stream.seek(place)
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        facts = {
            "format": FORMAT, "bytes": partial.stat().st_size, "sha256": files.sha256_of(partial), "images": len(labels),
        }  # fmt: skip
        partial.chmod(0o644)
        (folder / FACTS).unlink(missing_ok=True)  # what is between the two steps counts as no file
        partial.rename(folder / NAME)
        files.write_json(folder / FACTS, {**facts, "store": digest, "ffcv": ffcv.__version__})
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return folder / NAME


def _parts(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Iterator[tuple[int, memoryview]]:
    """What the file of these images has, and where it lies; zeros are between. It follows from them alone.

    Raises:
        DataError: see :func:`write`.
    """
    import ffcv
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    if types.CURRENT_VERSION != FORMAT:
        raise DataError(f"{NAME}: ffcv {ffcv.__version__} reads format {types.CURRENT_VERSION}; this version writes {FORMAT}")
    count, height, width, channels = images.shape
    if channels != 3:
        raise DataError(f"{NAME}: FFCV holds RGB images; these have {channels} channel(s)")
    size = height * width * channels
    page = PAGE_BYTES
    while page < size:
        page *= 2
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    descriptions = np.zeros(len(fields), types.FieldDescType)
    ids = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
    for row, (name, field) in zip(descriptions, fields.items(), strict=True):
        row["type_id"] = ids[type(field)]
        row["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        row["arguments"][:] = field.to_binary()[0]
    samples = np.zeros(count, types.get_metadata_type(list(fields.values())))
    begin = -(-(types.HeaderType.itemsize + descriptions.nbytes + samples.nbytes) // page) * page
    a_page = page // size
    places = begin + np.arange(count) // a_page * page + np.arange(count) % a_page * size
    image, label = samples.dtype.names or ("", "")
    samples[image]["mode"], samples[image]["width"], samples[image]["height"] = IMAGE_MODES["raw"], width, height
    samples[image]["data_ptr"], samples[label] = places, labels
    table = np.zeros(count, types.ALLOC_TABLE_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), places, size
    header = np.zeros((), types.HeaderType)
    header["version"], header["num_fields"], header["page_size"], header["num_samples"] = FORMAT, len(fields), page, count
    header["alloc_table_ptr"] = begin + -(-count // a_page) * page
    yield 0, memoryview(header.tobytes() + descriptions.tobytes() + samples.tobytes())
    for first in range(0, count, a_page):
        pixels = np.ascontiguousarray(images[first : first + a_page])
        yield begin + first // a_page * page, memoryview(pixels.reshape(-1).data)
    yield int(header["alloc_table_ptr"]), memoryview(table.tobytes())


def find(folder: Path, digest: str) -> Path | None:
    """The file in ``folder`` if it was made from the store with this digest; its bytes are not looked at."""
    facts = _facts(folder)
    return folder / NAME if facts.get("store") == digest and (folder / NAME).is_file() else None


def verify(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], remedy: str) -> None:
    """Compare every byte with what the file of these images has. The facts beside it may have been exchanged with it.

    Args:
        images, labels: of the store, as for :func:`write`.
        remedy: the command that writes it anew.

    Raises:
        DataError: the file is missing, truncated or altered, or that of other images.
    """
    try:
        if not path.is_file():
            raise ValueError("is no plain file")
        size, end = path.stat().st_size, 0
        with path.open("rb") as stream:
            for place, part in _parts(images, labels):
                between = stream.read(place - end)
                if between.strip(b"\0") or stream.read(len(part)) != part:
                    raise ValueError(f"is not the file of this store: it differs after byte {end:,}")
                end = place + len(part)
        if size != end:
            raise ValueError(f"has {size:,} bytes instead of {end:,}: truncated or exchanged")
    except (OSError, ValueError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: {why}; run: {remedy}") from None


def verify_copy(path: Path) -> None:
    """Compare size and SHA-256 with the facts beside a copy, which came from the same place.

    Raises:
        DataError: the file is missing, truncated or altered.
    """
    facts = _facts(path.parent)
    try:
        if path.stat().st_size != facts.get("bytes") or files.sha256_of(path) != facts.get("sha256"):
            raise DataError(f"{path}: is not what was copied")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8")) if (folder / FACTS).is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
