"""Files that somebody wrote, read with care: JSON and JSON lines of regular files, of bounded size and depth.

What lies in a run directory may be damaged, of another version, or put there by somebody else. Nothing here waits for a FIFO,
follows a link, or ends with another exception than :class:`Damaged` and ``FileNotFoundError``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # what is answered of a file that is not there (any more)
MAX_JSON, MAX_LINE, MAX_LINES = 2**22, 2**20, 2**30  # bytes of a record, of a line of JSON, of a file of such lines
MAX_DEPTH = 64  # of JSON; records have four levels
SEAL = b',\n  "crc32": "'
PIECE = 2**20  # bytes of a file of lines that are read at once


class Damaged(ValueError):
    """A file that is there and does not hold what it should; the text says why, without the file's name."""


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise _unreadable(error, path) from None


def _unreadable(error: OSError, path: Path) -> FileNotFoundError | Damaged:
    """What is raised in the place of an error of the system."""
    if error.errno in GONE:
        return FileNotFoundError(errno.ENOENT, "no such file", str(path))
    kinds = {errno.ELOOP: "is a link, not a file of its own", errno.ENXIO: "is not a regular file"}
    return Damaged(kinds.get(error.errno or 0, f"cannot be read: {error.strerror or 'input/output error'}"))


def _size(descriptor: int, limit: int) -> int:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise Damaged("is a folder, not a file" if stat.S_ISDIR(facts.st_mode) else "is not a regular file")
    if facts.st_size > limit:
        raise Damaged(f"has {facts.st_size:,} bytes, more than the {limit:,} that are read")
    return facts.st_size


@contextlib.contextmanager
def opened(path: Path, limit: int) -> Iterator[int]:
    """The descriptor of a regular file, opened to be read. Nothing else is waited for or followed: no FIFO, device or link.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is no regular file, cannot be read, or has more than ``limit`` bytes.
    """
    descriptor = _open(path)
    try:
        _size(descriptor, limit)
        yield descriptor
    except OSError as error:
        raise _unreadable(error, path) from None
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError, Damaged: as :func:`opened`.
    """
    descriptor = _open(path)  # without the context manager, which takes as long as all the rest
    try:
        size = _size(descriptor, limit)
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
    except OSError as error:
        raise _unreadable(error, path) from None
    finally:
        os.close(descriptor)
    return data


def is_regular(path: Path) -> bool:
    """Whether the file is there and is no link, FIFO, device or folder."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Damaged(f"holds the number {text[:20]}, which is not finite")
    return value


def _refuse(text: str) -> float:
    raise Damaged(f"holds {text}, which is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)


def parse_json(data: bytes) -> Any:
    """The value that is written there: of bounded depth, with finite numbers and text that can be printed.

    Raises:
        Damaged: it is not such JSON.
    """
    try:
        value = _DECODER.decode(data.decode())
        # so deep only if there are so many brackets
        if len(data) > MAX_DEPTH and data.count(b"[") + data.count(b"{") > MAX_DEPTH and not _is_shallow(value):
            raise Damaged(f"is nested more than {MAX_DEPTH} levels deep")
    except RecursionError:
        raise Damaged(f"is nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeDecodeError:
        raise Damaged("is not UTF-8") from None
    except Damaged:
        raise
    except json.JSONDecodeError as error:
        raise Damaged(f"is not JSON: {error.msg} in line {error.lineno}" if data.strip() else "is empty") from None
    except ValueError:  # of a whole number of thousands of digits
        raise Damaged("holds a number of thousands of digits") from None
    if b"\\u" in data and (b"\\ud" in data or b"\\uD" in data):  # half of a pair stands for a byte of a name that was not UTF-8
        return _printable(value)
    return value


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return True
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
    return False


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return {_printable(key): _printable(item) for key, item in value.items()} if isinstance(value, dict) else value


def sealed(text: str) -> str:
    """A JSON object, as ``json.dumps`` indents it, with a checksum of its text as the last field.

    A digit that has become another one makes a record that is as good as before, and another figure.
    """
    if not text.endswith("\n}"):  # an empty one, or no object
        return text
    body = text.removesuffix("\n}")
    return f'{body}{SEAL.decode()}{zlib.crc32(body.encode()):08x}"\n}}'


def is_unsealed(path: Path) -> bool:
    """Whether there is such a file, and it carries no checksum."""
    try:
        data = read_bytes(path)
    except (OSError, Damaged):
        return False
    return data.lstrip().startswith(b"{") and SEAL not in data


def load_json(path: Path) -> Any:
    """The parsed file, without its seal.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it does not hold JSON, or was changed after it was sealed.
    """
    data = read_bytes(path)
    value = parse_json(data)
    if isinstance(value, dict) and (seal := value.pop("crc32", None)) is not None:
        body, mark, _ = data.rpartition(SEAL)
        if not mark or seal != f"{zlib.crc32(body):08x}":
            raise Damaged("was changed after it was written: its crc32 is another one")
    return value


def read_json(path: Path) -> Any | None:
    """The parsed file, or None if it is missing or damaged (for status files that may be half there)."""
    try:
        return load_json(path)
    except (OSError, Damaged):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if the file is missing, damaged or holds something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every whole JSON object of the file, and the number of lines that hold something else; (``[]``, 0) of a missing file.

    A last line without an end, which is being written, may be an object too; else it is not counted.

    Raises:
        Damaged: the file cannot be read at all.
    """
    rows: list[dict[str, Any]] = []
    damaged = 0
    for line, ended in _at_once(path) or lines(path):
        if (row := row_of(line)) is not None:
            rows.append(row)
        elif ended and (line is None or line.strip()):
            damaged += 1
    return rows, damaged


def row_of(line: bytes | None) -> dict[str, Any] | None:
    """The JSON object that a line holds; None of any other."""
    try:
        row = parse_json(line) if line is not None else None
    except Damaged:
        return None
    return row if isinstance(row, dict) else None


def _at_once(path: Path) -> list[tuple[bytes | None, bool]]:
    """As :func:`lines`, of a file that is no longer than a line may be; else nothing."""
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        return []
    try:
        size = _size(descriptor, MAX_LINES)
        data = os.read(descriptor, size) if size <= MAX_LINE else b""
    except OSError:
        return []
    finally:
        os.close(descriptor)
    *whole, rest = data.split(b"\n")
    return [*((line, True) for line in whole), (rest, False)] if len(data) == size else []


def lines(path: Path) -> Iterator[tuple[bytes | None, bool]]:
    """The lines of a file, None for one that is longer than any that was written; each with whether it has its end."""
    rest, too_long = b"", False
    try:
        with opened(path, MAX_LINES) as descriptor:
            while piece := os.read(descriptor, PIECE):
                first, *others = piece.split(b"\n")
                rest += first
                for line in others:
                    yield None if too_long or len(rest) > MAX_LINE else rest, True
                    rest, too_long = line, False
                if len(rest) > MAX_LINE:
                    rest, too_long = b"", True
    except FileNotFoundError:
        return
    yield None if too_long else rest, False


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of the file; a torn or damaged line is left out, a missing or damaged file is empty."""
    try:
        return json_lines(path)[0]
    except Damaged:
        return []
