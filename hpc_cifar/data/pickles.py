"""Read the official CIFAR-10 and CIFAR-100 batches: Python 2 pickles, opened without letting a pickle run anything.

The unpickler knows five names, and each stands for a harmless object of ours: no class or function of numpy or any other
module can be reached, whatever the file asks for.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import hostile
from ..errors import DataError, first_line

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BYTE_TYPES = (b"u1", "u1", "uint8", b"uint8", "|u1")


class _DType:
    """Stands for numpy.dtype; only unsigned bytes are accepted."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in _BYTE_TYPES:
            shown = repr(code) if isinstance(code, str | bytes) else f"a {type(code).__name__}"
            raise pickle.UnpicklingError(f"an array of {shown[:40]} where unsigned bytes belong")

    def __setstate__(self, state: object) -> None:
        """Byte order and flags, which say nothing about single bytes."""


class _Array:
    """Stands for numpy.ndarray; becomes a read-only uint8 array."""

    def __init__(self, *_: object) -> None:
        self.value: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, _, fortran, raw = state
        self._fill(raw, shape, bool(fortran))

    def _fill(self, raw: Any, shape: Any, fortran: bool) -> None:
        if not isinstance(shape, tuple) or len(shape) > 4 or not all(type(size) is int for size in shape):
            raise pickle.UnpicklingError("an array without a shape")
        sizes: tuple[int, ...] = shape
        if not isinstance(raw, bytes | bytearray) or fortran or min(sizes, default=0) < 0 or math.prod(sizes) != len(raw):
            raise pickle.UnpicklingError("an array whose shape does not fit its bytes")
        self.value = np.frombuffer(raw, np.uint8).reshape(sizes)


def _from_buffer(raw: Any, dtype: object, shape: Any, memory_order: object = "C") -> _Array:
    array = _Array()
    array._fill(raw, shape, memory_order != "C")
    return array


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Unpickler(hostile.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)  # bytes that texts may be turned into, which may be named again and again

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs") from None

    def _encode(self, text: object, encoding: object = "latin1") -> bytes:
        """How Python 3 writes bytes into an old pickle."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("a text that stands for no bytes")
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it is turned into more bytes than it has")
        return text.encode("latin1")

    def persistent_load(self, identifier: object) -> Any:
        raise pickle.UnpicklingError("it asks for an object outside the file")


def load(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary of one batch file, with text keys.

    Raises:
        DataError: ``where`` is no such pickle, is damaged, or asks for anything that a batch does not need.
    """
    try:
        # A damaged pickle may raise anything at all: none of it is a bug of ours.
        hostile.look_through(io.BytesIO(data))
        value = _Unpickler(data).load()
    except Exception as error:
        raise DataError(f"{where}: is no CIFAR-10 batch, is damaged or is malicious ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: is not a CIFAR-10 batch: holds {type(value).__name__}, not a dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


def batch(
    data: bytes, where: str, field: str = "labels", classes: int = len(CLASSES)
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (n,32,32,3) and labels (n,) of one batch file.

    Args:
        field: ``labels``, or ``fine_labels`` of CIFAR-100.
        classes: how many there are.

    Raises:
        DataError: see :func:`load`; or the fields are not those of a CIFAR-10 batch.
    """
    fields = load(data, where)
    pixels = fields.get("data")
    if not isinstance(pixels, _Array) or pixels.value.ndim != 2 or pixels.value.shape[1] != 3072:
        raise DataError(f"{where}: field 'data' is no array of 3,072 bytes an image")
    labels = fields.get(field)
    if isinstance(labels, _Array):
        labels = labels.value.tolist()
    if not isinstance(labels, list):
        hint = "; this is CIFAR-100" if "fine_labels" in fields else "; this is CIFAR-10" if "labels" in fields else ""
        raise DataError(f"{where}: has no list {field!r}{hint}")
    if len(labels) != len(pixels.value):
        raise DataError(f"{where}: has {len(pixels.value):,} images but {len(labels):,} labels")
    for position, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            shown = label if isinstance(label, int) and abs(label) < 10**9 else f"of type {type(label).__name__}"
            raise DataError(f"{where}: label {shown} of image {position} is no class from 0 to {classes - 1}")
    images = pixels.value.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, dtype=np.int64)


def label_names(data: bytes, where: str, field: str = "label_names") -> tuple[str, ...]:
    """Class names in ``batches.meta``, or in the ``meta`` of CIFAR-100."""
    names = load(data, where).get(field)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) and len(name) <= 200 for name in names):
        raise DataError(f"{where}: has no list {field!r} of names")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)
