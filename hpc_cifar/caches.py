"""Folders for what is run or believed without a further look: compiled code, and which stores were verified.

numba, Triton and Inductor load machine code and pickles from their caches, so whoever can write there runs code as this user.
Each level of such a folder therefore belongs to the user or to root, and nobody else can write in it; the innermost one nobody
else can even enter, so that the modes of what a library makes in it do not matter. Where that does not hold, another folder is
taken.

<cache>/hpc-cifar/<name>/     0700; <cache> is what a variable of the library names, XDG_CACHE_HOME, ~/.cache, or
                              <tmp>/hpc-cifar-<uid>
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

OURS = "hpc-cifar"
WRITABLE = stat.S_IWGRP | stat.S_IWOTH  # the bits of an access list show in those of the group

_said: set[str] = set()
_looked_through: set[Path] = set()  # folders below which nothing is another user's; nobody else can enter them


class NotPrivate(Exception):
    """Why a folder must not be used, as words that follow its name."""


def cache_folder(name: str, root: str = "") -> Path | None:
    """A private folder that this process can write; None if there is none. That another one was refused is said once.

    Args:
        root: where the user wants it, such as the value of NUMBA_CACHE_DIR.
    """
    folder, refused = find(name, root)
    for why in refused:
        if why not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
            where = f"{folder} serves instead" if folder else "nothing is kept"
            print(f"warning: {why}, so others could have their code run by you; {where}", file=sys.stderr, flush=True)
        _said.add(why)
    return folder


def find(name: str, root: str = "") -> tuple[Path | None, list[str]]:
    """What :func:`cache_folder` returns, and a line about each folder that others could write."""
    refused: list[str] = []
    for place in (*([Path(root)] if root else []), *_places()):
        folder = place if place.parts[-2:] == (OURS, name) else place / OURS / name
        try:
            return private(folder), refused
        except NotPrivate as why:
            refused.append(str(why))
        except OSError:  # a read-only home, say
            continue
    return None, refused


def use(variable: str, name: str) -> None:
    """Have a library keep its code in a private folder: below the one that ``variable`` names, else in another."""
    folder = cache_folder(name, os.environ.get(variable, ""))
    if folder is None:  # an empty one of this process: never the library's own choice, which may lie in /tmp
        folder = Path(tempfile.mkdtemp(prefix=f"{OURS}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[variable] = str(folder)


def private(folder: Path) -> Path:
    """Make ``folder`` where it is missing, and return it without symbolic links.

    Raises:
        NotPrivate: somebody else owns it, a level above it or something in it, or can write there.
        OSError: it cannot be made or written.
    """
    folder = Path(os.path.realpath(folder.absolute()))
    levels = [*reversed(folder.parents), folder]
    for level in levels:
        _check_level(level, innermost=level == folder)
    if folder not in _looked_through:  # once a process: it may hold thousands of files
        for path in _below(folder):
            with contextlib.suppress(FileNotFoundError):  # a temporary file of another process
                if path.lstat().st_uid != os.getuid():
                    raise NotPrivate(f"{path} belongs to another user")
        _looked_through.add(folder)
    with tempfile.TemporaryFile(dir=folder):  # that it is there is no proof that this process can write
        return folder


def _check_level(level: Path, *, innermost: bool) -> None:
    if not os.path.lexists(level):
        with contextlib.suppress(FileExistsError):  # another process was quicker; it is looked at all the same
            level.mkdir(mode=0o700)
    _check(level, level.lstat(), innermost)


def _check(level: Path, facts: os.stat_result, innermost: bool) -> None:
    if not stat.S_ISDIR(facts.st_mode):
        raise NotADirectoryError(str(level))
    owners = {os.getuid()} if innermost else {os.getuid(), 0, *_root_elsewhere()}
    if facts.st_uid not in owners:
        raise NotPrivate(f"{level} belongs to another user")
    if innermost and facts.st_mode & 0o077:
        raise NotPrivate(f"{level} can be entered by others (mode {stat.S_IMODE(facts.st_mode):o}; remove it)")
    # with the sticky bit others can make entries, but neither remove nor rename the next level, which is looked at too
    if facts.st_mode & WRITABLE and not facts.st_mode & stat.S_ISVTX:
        raise NotPrivate(f"{level} can be written by others (mode {stat.S_IMODE(facts.st_mode):o})")


def _root_elsewhere() -> list[int]:
    """In a container without root, files of the host's root seem to belong to the overflow user."""
    try:
        if Path("/proc/self/uid_map").read_text(encoding="ascii").split() == ["0", "0", "4294967295"]:
            return []
        return [int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))]
    except (OSError, ValueError):
        return []


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *names))


def _places() -> Iterator[Path]:
    if given := os.environ.get("XDG_CACHE_HOME"):
        yield Path(given)
    with contextlib.suppress(RuntimeError):  # no home folder at all, as in some containers
        yield Path.home() / ".cache"
    yield Path(tempfile.gettempdir()) / f"{OURS}-{os.getuid()}"
