"""Files of tensors that somebody else may have written, read in no more memory than they are long, or refused in one line.

torch reads a file of its own format, a zip archive of one pickle and the storages, or the older one of five pickles and the
storages. With ``weights_only`` it runs nothing; but it believes what the file says of sizes, and raises what comes.
"""

from __future__ import annotations

import io
import pickle
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from .. import hostile
from ..errors import first_line

_ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2, "ComplexFloat": 8}
ALLOCATION = "DefaultCPUAllocator: can't allocate memory"  # of torch's error on the host
_PICKLES = 5  # of the older format, before the storages


class Unreadable(Exception):
    """Why a file is not one of tensors; words that follow its name."""


def load(source: Path | bytes) -> Any:
    """What ``torch.load`` returns of a file or its bytes, on the CPU.

    Raises:
        OSError: it cannot be read at the moment.
        Unreadable: it is damaged, or made to take time or memory.
        MemoryError, RuntimeError: the memory is full, which says nothing of the file; see :func:`is_out_of_memory`.
    """
    if isinstance(source, Path):
        check_regular(source)
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
        try:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            is_zip = stream.read(2) == b"PK"
            stream.seek(0)
            (_check_zip if is_zip else _check_pickles)(stream, size)
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
        except OSError as error:
            if error.errno is None:  # not of the file system
                raise Unreadable(first_line(error)) from None
            raise
        except Exception as error:  # of a file that is not what it says, torch raises anything
            if is_out_of_memory(error):
                raise
            raise Unreadable(first_line(error) if str(error) else type(error).__name__) from None


def check_regular(path: Path) -> None:
    """Refuse what would be waited for, such as a FIFO.

    Raises:
        OSError: there is nothing.
        Unreadable: it is no file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise Unreadable("is not a regular file")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or ALLOCATION in str(error)


def _check_zip(stream: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size or any(member.compress_type for member in members):
            raise Unreadable("its parts are compressed or overlap, which torch does not do")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                _Claims(io.BytesIO(archive.read(member))).load()


def _check_pickles(stream: IO[bytes], size: int) -> None:
    claimed = 0
    for number in range(_PICKLES):
        claims = _Claims(stream)
        value = claims.load()
        if number == 0 and value != torch.serialization.MAGIC_NUMBER:
            raise Unreadable("it is no file of torch")
        claimed += sum(claims.storages.values())
    if claimed > size:
        raise Unreadable(f"it says that it holds {claimed:,} bytes of tensors, and is {size:,} bytes long")


class _Anything:
    """Stands for whatever a pickle names or makes."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> _Anything:
        return _Anything()

    def __setitem__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _Named(_Anything):
    def __init__(self, name: str) -> None:
        self.name = name


class _Claims(hostile.Unpickler):
    """Opens a pickle for what it says of storages, without any of the things that it names."""

    def __init__(self, stream: IO[bytes]) -> None:
        begin = stream.tell()
        hostile.look_through(stream)
        stream.seek(begin)
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[Any, int] = {}  # bytes, by key

    def find_class(self, module: str, name: str) -> Any:
        return _Named(name)

    def persistent_load(self, identifier: Any) -> Any:
        kind, storage, key, _, count = identifier[:5]
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it names a storage in another way than torch does")
        name = storage.name.removesuffix("Storage") if isinstance(storage, _Named) else ""
        self.storages[key] = max(self.storages.get(key, 0), count * _ITEM_BYTES.get(name, 1))
        return _Anything()
