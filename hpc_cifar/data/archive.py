"""Read the files of a folder or a tar archive one after the other, in memory, and notice when any of it is damaged.

Nothing is ever extracted to disk, so no member name can reach outside a folder. tarfile alone is not enough: it takes a damaged
header in the middle for the end of the archive, and never reads the checksum at the end of the compressed stream.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DataError

LARGEST_MEMBER_BYTES = 192 * 2**20  # the training images of CIFAR-100 have 155 MB; anything far above is no dataset we read
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError, OverflowError)


Tell = Callable[[int, int], None]


class _Watched(io.RawIOBase):
    """A stream that remembers how long it was and where its last byte that is not zero lies."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.length = 0
        self.used = 0  # position after the last non-zero byte

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        filled = len(data.rstrip(b"\0"))
        if filled:
            self.used = self.length + filled
        self.length += len(data)
        return data


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    magic = stream.read(6)
    stream.seek(0)
    opener: Any
    if magic.startswith(b"\x1f\x8b"):
        opener = gzip.open
    elif magic.startswith(b"\xfd7zXZ\0"):
        opener = lzma.open
    elif magic.startswith(b"BZh"):
        opener = bz2.open
    else:
        return stream
    return opener(stream, "rb")  # type: ignore[no-any-return]


def _damaged(path: Path, after: str | None, why: object) -> DataError:
    where = f"after member {after}" if after else "at its beginning"
    return DataError(f"{path}: the archive is truncated or damaged {where} ({why}); get a fresh copy")


def _tar_files(path: Path, tell: Tell) -> Iterator[tuple[str, bytes]]:
    last: str | None = None
    try:
        with path.open("rb") as stream, _decompressed(stream) as plain:
            size = path.stat().st_size
            watched = _Watched(plain)
            with tarfile.open(fileobj=watched, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if name.startswith("/") or ".." in name.split("/"):
                        raise DataError(f"{path}: member {member.name!r} points outside the archive")
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise DataError(f"{path}: member {member.name!r} is a link or device; only plain files are read")
                    if member.size > LARGEST_MEMBER_BYTES:
                        raise DataError(f"{path}: member {member.name!r} has {member.size:,} bytes, which is no image or batch")
                    content = archive.extractfile(member)
                    data = content.read() if content else b""
                    if len(data) != member.size:
                        raise _damaged(path, last, f"member {member.name} has {len(data)} of {member.size} bytes")
                    last = name
                    tell(stream.tell(), size)
                    yield name, data
                end = archive.offset  # where tarfile saw the end, or a header that it could not read
            while watched.read(2**20):  # to the end, where gzip and xz keep their checksum
                pass
            if watched.used > end:
                raise _damaged(path, last, "unreadable header")
            if watched.length < end + tarfile.BLOCKSIZE:
                raise _damaged(path, last, "no end-of-archive mark")
    except _READ_ERRORS as error:
        if last is None and isinstance(error, tarfile.ReadError):
            raise DataError(f"{path}: is no tar archive, or its beginning is damaged ({error})") from None
        raise _damaged(path, last, error) from None


def _folder_files(folder: Path, tell: Tell) -> Iterator[tuple[str, bytes]]:
    paths = folder_paths(folder)
    for number, path in enumerate(paths):
        tell(number, len(paths))
        try:
            size = path.stat().st_size
            if size > LARGEST_MEMBER_BYTES:
                raise DataError(f"{path}: has {size:,} bytes, which is no image or batch")
            yield path.relative_to(folder).as_posix(), path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def folder_paths(folder: Path) -> list[Path]:
    """Every plain file below ``folder``, sorted; hidden files and folders are left out."""
    try:
        found = [path for path in folder.rglob("*") if path.is_file()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def files(source: Path, tell: Tell = lambda done, total: None) -> Iterator[tuple[str, bytes]]:
    """Name and content of every plain file of a folder or (compressed) tar archive.

    Args:
        tell: called before every file with how much has been read of how much: bytes of an archive, files of a folder.

    Raises:
        DataError: it is missing, unreadable, truncated or damaged, or has members that are links or point elsewhere.
            Damage may only show after the last file: use nothing of it before the iterator has ended.
    """
    if source.is_dir():
        yield from _folder_files(source, tell)
    elif source.is_file():
        yield from _tar_files(source, tell)
    else:
        raise DataError(f"{source}: no such file or folder; --archive and HPC_CIFAR_ARCHIVE take an archive or a folder")


class ContentDigest:
    """SHA-256 over names and contents, the same for an archive and for the folder that it unpacks to."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, str]] = []

    def add(self, name: str, data: bytes) -> None:
        self._entries.append((name, hashlib.sha256(data).hexdigest()))

    def hexdigest(self) -> str:
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self._entries))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
