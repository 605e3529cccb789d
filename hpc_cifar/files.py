"""Files that are whole or absent: atomic writes, JSON, digests and the site folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from . import planted
from .errors import UsageError
from .reading import Damaged as Damaged
from .reading import is_unsealed, sealed
from .reading import json_lines as json_lines
from .reading import load_json as load_json
from .reading import parse_json as parse_json
from .reading import read_bytes as read_bytes
from .reading import read_json as read_json
from .reading import read_json_lines as read_json_lines
from .reading import read_object as read_object

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
LEFT_BEHIND_S = 5.0  # what stands for a lock and stays so long is a killed process's


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
    stream = planted.open_there(path)
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


@contextlib.contextmanager
def alone(path: Path, wait_s: float) -> Iterator[bool | None]:
    """Keep other processes, on any host, out of such a block; it is for changes of a moment.

    The kernel, or the file server, frees the lock however its process ends. On a file system without locks a second file
    stands for it, which only one process can make; one that a killed process left is removed once it was seen to stay a while.

    Args:
        path: the lock file, which stays. It is never followed, should it be a link.
        wait_s: how long to wait for another process.

    Yields:
        True: they are kept out. False: another process had it all the time. None: there can be no lock here.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError:  # whatever is to be written there says why it cannot be
        yield None
        return
    mark = path.with_name(f"{path.name}.held")
    made = False
    try:
        deadline, seen = time.monotonic() + wait_s, (0, 0.0)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held: bool | None = True
            except BlockingIOError:
                held = False
            except OSError as error:
                made, seen = _make_mark(mark, seen) if error.errno in NO_LOCKS else (False, seen)
                held = made if error.errno in NO_LOCKS else None
            if held is not False or time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        yield held
    finally:
        if made:
            with contextlib.suppress(OSError):
                mark.unlink()
        os.close(descriptor)


def _make_mark(mark: Path, seen: tuple[int, float]) -> tuple[bool, tuple[int, float]]:
    """Whether the file was made; else which one is there, by inode, and since when it was seen (monotonic seconds)."""
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        return True, seen
    except FileExistsError:
        pass
    except OSError:
        return False, seen
    with contextlib.suppress(OSError):
        inode = os.lstat(mark).st_ino
        if inode != seen[0]:
            return False, (inode, time.monotonic())
        if time.monotonic() - seen[1] > LEFT_BEHIND_S:
            aside = mark.with_name(f"{mark.name}.{secrets.token_hex(4)}")
            mark.rename(aside)  # only one of those who saw it stay takes it away
            if os.lstat(aside).st_ino != inode:  # a new one: its process goes on
                os.link(aside, mark)
            aside.unlink()
    return False, seen


def write_text(path: Path, text: str, *, durable: bool = True, mode: int = 0o644) -> None:
    """Atomically write ``text`` as UTF-8."""
    with atomic_file(path, durable=durable, mode=mode) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Atomically write ``value`` as indented JSON (NaN is refused)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def write_sealed(path: Path, value: dict[str, Any], *, durable: bool = True) -> None:
    """As :func:`write_json`, with a checksum that reading compares: for records whose figures people are shown.

    A file that is there without one stays so: the code of a run that an older version began changes it too, and would keep
    the sum.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    write_text(path, (text if is_unsealed(path) else sealed(text)) + "\n", durable=durable)


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object as one line and flush it to disk; what a killed writer left of a line is ended first.

    Raises:
        OSError: it cannot be written, or is no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    with named_in_errors(path), os.fdopen(descriptor, "rb+", buffering=0):
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        torn = facts.st_size > 0 and os.pread(descriptor, 1, facts.st_size - 1) != b"\n"
        data = b"\n" * torn + json.dumps(value, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _site_folder(variable: str, fallback: Path) -> Path:
    value = os.environ.get(variable, "")
    return expanded(Path(value), f"{variable}={value}") if value else fallback.absolute()


def expanded(path: Path, said: str) -> Path:
    """The absolute path, with ``~`` and ``~user`` as the shell reads them.

    Args:
        said: what the user wrote, for the message.

    Raises:
        UsageError: there is no such user, or no home folder.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        who = path.parts[0][1:]
        why = f"there is no user {who!a} on this machine" if who else "this user has no home folder"
        raise UsageError(f"{said}: {why}; write the whole path") from None
    except OSError as error:
        raise UsageError(f"{said}: the working folder is gone ({error.strerror}); change to another one") from None


def data_root() -> Path:
    """Where prepared datasets lie: ``HPC_CIFAR_DATA``, else ``data`` in the working folder.

    Raises:
        UsageError: the variable names a user who is not there.
    """
    return _site_folder("HPC_CIFAR_DATA", Path("data"))


def runs_root() -> Path:
    """Where runs lie: ``HPC_CIFAR_RUNS``, else ``runs`` in the working folder.

    Raises:
        UsageError: the variable names a user who is not there.
    """
    return _site_folder("HPC_CIFAR_RUNS", Path("runs"))
