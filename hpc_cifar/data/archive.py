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

from ..errors import DataError, first_line

LARGEST_MEMBER_BYTES = 192 * 2**20  # the training images of CIFAR-100 have 155 MB; anything far above is no dataset we read
LARGEST_HEADER_BYTES = 16 * 2**10  # of what is said about one member beside its plain header, such as a long name
MOST_OTHERS = 100_000  # members that are not read
MOST_HEADERS = 16  # of such before one member
DICTIONARY_BYTES = 512 * 2**20  # that xz may ask for; xz -9 takes 64 MiB
EXPANDED_BYTES, EXPANSION = 2**29, 250  # an archive may expand to so much, and so many times its size
_READ_ERRORS = (
    OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError,
)  # fmt: skip


Tell = Callable[[int, int], None]
Limit = Callable[[str], int]


class _Refused(Exception):
    """What no dataset has, and what would take time or memory without a bound."""


class _Header(tarfile.TarInfo):
    """tarfile reads what a header announces, however much that is."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        assert isinstance(archive, _Tar)
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _Refused("a sparse file; pack it without --sparse")
        if self.type not in (*tarfile.REGULAR_TYPES, *_OTHERS):
            archive.headers += 1
            archive.general += self.size if self.type == tarfile.XGLTYPE else 0
            if max(self.size, archive.general) > LARGEST_HEADER_BYTES or archive.headers > MOST_HEADERS:
                raise _Refused(f"a header of {self.size:,} bytes, number {archive.headers} of its member")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _no_sparse(self, *_: Any) -> None:
        raise _Refused("a sparse file; pack it without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_sparse


_OTHERS = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class _Tar(tarfile.TarFile):
    headers = 0  # extended ones since the last member
    general = 0  # bytes of those that stand for all members after them


class _Xz(io.RawIOBase):
    """lzma.open reads with whatever memory the file asks for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder: lzma.LZMADecompressor | None = None
        self._begun = False
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        while True:
            try:
                if self._decoder is None:  # files put together are read as one
                    data = self._rest or self._stream.read(2**16)
                    self._rest = data.lstrip(b"\0") if self._begun else data
                    if not data:
                        return b""
                    if not self._rest:
                        continue
                    self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, DICTIONARY_BYTES)
                    out = self._decoder.decompress(self._rest, size)
                    self._rest = b""
                elif self._decoder.needs_input:
                    data = self._stream.read(2**16)
                    if not data:
                        raise EOFError("compressed file ended before its end mark")
                    out = self._decoder.decompress(data, size)
                else:
                    out = self._decoder.decompress(b"", size)
            except lzma.LZMAError as error:
                if "emory" in str(error):
                    raise _Refused(f"xz asks for more than {DICTIONARY_BYTES // 2**20} MiB of memory") from None
                raise
            if self._decoder.eof:
                self._rest, self._decoder, self._begun = self._decoder.unused_data, None, True
            if out:
                return out


class _Watched(io.RawIOBase):
    """A stream that remembers how long it was and where its last byte that is not zero lies.

    Args:
        most: bytes that it may have.
    """

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._most = stream, most
        self.length = 0
        self.used = 0  # position after the last non-zero byte

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        filled = len(data.rstrip(b"\0"))
        if filled:
            self.used = self.length + filled
        self.length += len(data)
        if self.length > self._most:
            raise _Refused(
                f"expands to more than {self._most // 2**20:,} MiB, hundreds of times its size; unpack it and name the folder"
            )
        return data


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    magic = stream.read(6)
    stream.seek(0)
    opener: Any
    if magic.startswith(b"\x1f\x8b"):
        opener = gzip.open
    elif magic.startswith(b"\xfd7zXZ\0"):
        return _Xz(stream)  # type: ignore[return-value]
    elif magic.startswith(b"BZh"):
        opener = bz2.open
    else:
        return stream
    return opener(stream, "rb")  # type: ignore[no-any-return]


def _damaged(path: Path, after: str | None, why: object) -> DataError:
    where = f"after member {after[:200]}" if after else "at its beginning"
    return DataError(f"{path}: the archive is truncated or damaged {where} ({why}); get a fresh copy")


def _tar_files(path: Path, tell: Tell, limit: Limit) -> Iterator[tuple[str, bytes]]:
    last: str | None = None
    others = 0
    try:
        with path.open("rb") as stream, _decompressed(stream) as plain:
            size = path.stat().st_size
            watched = _Watched(plain, EXPANDED_BYTES + EXPANSION * size)
            with _Tar.open(fileobj=watched, mode="r|", tarinfo=_Header) as archive:
                assert isinstance(archive, _Tar)
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every one
                    archive.headers = 0
                    name = member.name.removeprefix("./")
                    shown = repr(member.name[:200])
                    if name.startswith("/") or ".." in name.split("/"):
                        raise DataError(f"{path}: member {shown} points outside the archive")
                    most = limit(name)
                    others += not most
                    if others > MOST_OTHERS:
                        raise _Refused(f"{MOST_OTHERS:,} members that are neither images nor batches")
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise DataError(f"{path}: member {shown} is a link or device; only plain files are read")
                    if member.size > (most or LARGEST_MEMBER_BYTES):
                        size_words = f"{member.size:,}" if member.size < 2**63 else "any number of"
                        raise DataError(f"{path}: member {shown} has {size_words} bytes, which is no image or batch")
                    content = archive.extractfile(member) if most else None
                    data = content.read() if content else b""
                    if most and len(data) != member.size:
                        raise _damaged(path, last, f"member {shown} has {len(data)} of {member.size} bytes")
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
    except _Refused as why:
        after = f", after member {last[:200]!r}" if last else ""
        raise DataError(f"{path}: holds what no dataset has: {why}{after}") from None
    except _READ_ERRORS as error:
        if last is None and isinstance(error, tarfile.ReadError):
            raise DataError(f"{path}: is no tar archive, or its beginning is damaged ({first_line(error)})") from None
        raise _damaged(path, last, first_line(error)) from None


def _folder_files(folder: Path, tell: Tell, limit: Limit) -> Iterator[tuple[str, bytes]]:
    paths = folder_paths(folder)
    for number, path in enumerate(paths):
        tell(number, len(paths))
        try:
            size, name = path.stat().st_size, path.relative_to(folder).as_posix()
            most = limit(name)
            if size > (most or LARGEST_MEMBER_BYTES):
                raise DataError(f"{path}: has {size:,} bytes, which is no image or batch")
            yield name, path.read_bytes() if most else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def folder_paths(folder: Path) -> list[Path]:
    """Every plain file below ``folder``, sorted; hidden files and folders are left out."""
    try:
        found = [path for path in folder.rglob("*") if path.is_file()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def bytes_of(source: Path) -> int:
    """Size of an archive, or of all files of a folder."""
    return sum(path.stat().st_size for path in (folder_paths(source) if source.is_dir() else [source]))


def files(
    source: Path, tell: Tell = lambda done, total: None, limit: Limit = lambda name: LARGEST_MEMBER_BYTES
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every plain file of a folder or (compressed) tar archive.

    Args:
        limit: of a name, how many bytes it may have; where it says 0 the content is left out.
        tell: called before every file with how much has been read of how much: bytes of an archive, files of a folder.

    Raises:
        DataError: it is missing, unreadable, truncated or damaged, or has members that are links or point elsewhere.
            Damage may only show after the last file: use nothing of it before the iterator has ended.
    """
    if source.is_dir():
        yield from _folder_files(source, tell, limit)
    elif source.is_file():
        yield from _tar_files(source, tell, limit)
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
