"""Files that are whole or absent: atomic writes, JSON, digests and the site folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


def whole(text: str) -> int | None:
    """The number that plain digits are; None for all else, such as ``²``, which ``isdigit`` takes and ``int`` does not."""
    return int(text) if len(text) <= 18 and text.isascii() and text.isdecimal() else None


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse fsync on a folder; the rename itself is still atomic
        pass
    finally:
        os.close(descriptor)


def make_durable(paths: Iterable[Path]) -> None:
    """fsync many files and folders that are written already; at once, since a file system does that in a few commits."""

    def fsync(path: Path) -> None:
        if path.is_dir():
            fsync_folder(path)
            return
        with path.open("rb") as stream:
            os.fsync(stream.fileno())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fsync, paths))


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Have an OSError of the block say of which file it is; one of a write to an open file does not know."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True, mode: int = 0o644) -> Iterator[Any]:
    """Open a temporary binary file beside ``path``; rename it into place only if the block succeeds.

    Args:
        path: final name; its folder must exist.
        durable: fsync the file and its folder, so that it survives a power loss.
        mode: permission bits of the result, reduced by nothing.

    Raises:
        OSError: with the name of the file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with named_in_errors(path), os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            if durable:
                os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    if durable:
        fsync_folder(path.parent)


def read_ahead(patterns: Iterable[Path]) -> threading.Thread:
    """Ask for files to be read into the page cache while this process does something else, such as to import torch.

    What is not there, and a file system that does not do this, change nothing.

    Args:
        patterns: paths whose last part may have wildcards.

    Returns:
        The thread that asks; nobody need wait for it.
    """
    wanted = list(patterns)

    def ask() -> None:
        for pattern in wanted:
            with contextlib.suppress(OSError):
                for path in pattern.parent.glob(pattern.name):
                    with path.open("rb") as stream:
                        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread


def flock(stream: TextIO) -> bool:
    """Lock an open file as long as it is open; False on a file system without locks, such as Lustre without ``-o flock``.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def write_holder(stream: TextIO) -> None:
    """Say in a lock file that this process has it."""
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    stream.flush()


def hold(path: Path) -> TextIO:
    """Lock a file as long as the stream is open; it says which process holds it. A file system without locks keeps nobody out.

    Raises:
        BlockingIOError: another process has it; its ``strerror`` is that process in words.
        OSError: the file cannot be written or locked.
    """
    stream = path.open("a+", encoding="utf-8")
    try:
        flock(stream)
        write_holder(stream)
    except BlockingIOError as error:
        with stream:
            stream.seek(0)
            raise BlockingIOError(error.errno, stream.read().strip() or "another process") from None
    except OSError:
        stream.close()
        raise
    return stream


def write_text(path: Path, text: str, *, durable: bool = True, mode: int = 0o644) -> None:
    """Atomically write ``text`` as UTF-8."""
    with atomic_file(path, durable=durable, mode=mode) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Atomically write ``value`` as indented JSON (NaN is refused)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def read_json(path: Path) -> Any | None:
    """The parsed file, or None if it is missing or not JSON (for status files that may be half there)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object as one line and flush it to disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of the file; a torn or damaged line is left out, a missing file is empty."""
    rows: list[dict[str, Any]] = []
    try:
        data = path.read_bytes()
    except OSError:
        return rows
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # includes UnicodeDecodeError
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder(name: str, root: str = "") -> Path | None:
    """A folder for compiled code that this process can write; None if there is none. Code from it is loaded and run, so it lies
    where no other user writes: in ``root`` if one is named, else in the user's cache or in a private temporary folder.
    """
    for place in [Path(root)] if root else _caches():
        folder = place / "hpc-cifar" / name
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # what another process has made here is no proof that this one can write
                return folder
    return None


def _caches() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # no home folder at all, as in some containers
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    temporary = Path(tempfile.gettempdir()) / f"hpc-cifar-{os.getuid()}"
    with contextlib.suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        facts = temporary.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077:
            yield temporary


def _site_folder(variable: str, fallback: Path) -> Path:
    value = os.environ.get(variable, "")
    return Path(value).expanduser().absolute() if value else fallback.absolute()


def data_root() -> Path:
    """Where prepared datasets lie: ``HPC_CIFAR_DATA``, else ``data`` in the working folder."""
    return _site_folder("HPC_CIFAR_DATA", Path("data"))


def runs_root() -> Path:
    """Where runs lie: ``HPC_CIFAR_RUNS``, else ``runs`` in the working folder."""
    return _site_folder("HPC_CIFAR_RUNS", Path("runs"))
