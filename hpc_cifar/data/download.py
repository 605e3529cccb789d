"""Download the official CIFAR-10 or CIFAR-100 archive: resumable, verified, and quick to say that there is no network."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import owner, planted
from ..errors import DataError
from ..files import fsync_folder, whole

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
HUNDRED_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
HUNDRED_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
TIMEOUT_S = 6.0  # of a connection and of a silent server; a machine without network must not wait longer
ATTEMPTS = 5  # in a row without a new byte
_BLOCK = 2**18


class Unreachable(DataError):
    """There is no network, or the server does not answer: another source may serve instead."""


def md5_of(path: Path) -> str:
    """Hex MD5 of a file: the digest that the dataset's authors publish."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(folder: Path, console: Console, *, url: str = URL, md5: str = MD5, timeout_s: float = TIMEOUT_S) -> Path:
    """The verified archive in ``folder``; nothing is fetched if it is there already.

    What arrives is kept in ``<name>.part``, so that a second call continues where the first one broke off.

    Raises:
        Unreachable: no network, or no answer.
        DataError: the server refuses, or what it sent is not the official archive (which is then removed).
        OSError: the disk is full or ``folder`` cannot be written.
    """
    name = urllib.parse.urlsplit(url).path.rpartition("/")[2] or "archive"
    target, part = folder / name, folder / f"{name}.part"
    owner.make(folder, owner.ROOT_MODE)
    if folder.is_symlink():
        raise DataError(f"{folder}: is a link, which a download does not follow; {_elsewhere()}")
    if target.is_file() and md5_of(target) == md5:
        return target
    _look_up(url, timeout_s)
    failures = 0
    finished = False
    while not finished:
        before = _size(part)
        reason: object = "the connection was closed early"
        try:
            finished = _fetch(url, part, console, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is longer than the file: it belongs to another one
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                raise DataError(f"{url}: the server answers {error.code} {error.reason}; {_elsewhere()}") from None
            reason = error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            if failures == 0 and before == _size(part) and isinstance(error, urllib.error.URLError):
                raise Unreachable(f"{url}: cannot be reached ({reason}); {_elsewhere()}") from None
        if finished:
            break
        failures = 0 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise Unreachable(f"{url}: failed {ATTEMPTS} times in a row ({reason}); run the command again to continue")
    found = md5_of(part)
    if found != md5:
        part.unlink(missing_ok=True)
        raise DataError(f"{url}: what arrived has md5 {found}, not {md5}; it was removed, run the command again")
    part.chmod(0o644)
    part.replace(target)
    fsync_folder(folder)
    return target


def _elsewhere() -> str:
    return "give a copy by --archive PATH or HPC_CIFAR_ARCHIVE"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _look_up(url: str, timeout_s: float) -> None:
    """Resolve the host, with a time limit, which the resolver itself does not have."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return  # then the proxy resolves it
    outcome: list[str | None] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(parts.hostname, parts.port or 443)
            outcome.append(None)
        except OSError as error:
            outcome.append(error.strerror or str(error))

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(timeout_s)
    why = outcome[0] if outcome else f"no answer in {timeout_s:g} s"
    if why:
        raise Unreachable(f"{url}: {parts.hostname} cannot be resolved ({why}); {_elsewhere()}")


def _fetch(url: str, part: Path, console: Console, timeout_s: float) -> bool:
    """Fetch what ``part`` lacks; True once it has as many bytes as the server announces."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "hpc-cifar"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        total, start = _extent(response, have)
        with planted.open_there(part) as opened:
            stream = opened.buffer
            stream.seek(start)
            stream.truncate()
            with _progress(console, part.name.removesuffix(".part"), start, total) as advance:
                while block := response.read(_BLOCK):
                    stream.write(block)
                    advance(len(block))
            stream.flush()
            os.fsync(stream.fileno())
    return total is None or _size(part) >= total  # http.client ends a short answer without an error


def _extent(response: Any, have: int) -> tuple[int | None, int]:
    """Bytes of the whole file, if known, and where the answer starts; a server may ignore the range and start anew."""
    if response.status == 206:
        match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
        if match and int(match[1]) == have:
            return (None if match[2] == "*" else int(match[2])), have
        raise http.client.HTTPException("the server sent another part than was asked for")
    length = response.headers.get("Content-Length", "")
    return whole(length), 0


@contextlib.contextmanager
def _progress(console: Console, name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line for each tenth in a log file."""
    if console.is_terminal:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total, completed=start)
            yield lambda count: bar.advance(task, count)
        return
    done = start
    shown = -1

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        tenth = 10 * done // total if total else done // 2**24
        if tenth > shown:
            shown = tenth
            share = f" of {total / 2**20:.0f} MiB ({100 * done // total} %)" if total else " MiB"
            console.print(f"{name}: {done / 2**20:.0f}{share}", markup=False, highlight=False, soft_wrap=True)

    yield advance
