"""A copy of the package in the run directory, so that a requeue never runs edited code."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from ..errors import RunError

LARGEST = 2 << 20  # bytes of a file of the package
PACKAGE = Path(__file__).resolve().parent.parent
_SKIPPED = shutil.ignore_patterns(".*", "*~", "#*#", "*.nbi", "*.nbc")
_BYTECODE = f".{sys.implementation.cache_tag}.pyc"


def take(code: Path, package: Path = PACKAGE) -> Path:
    """Copy ``package`` to ``code/hpc_cifar``; it appears whole or not at all, and an existing copy stays as it is.

    Works alike from an installed wheel and an editable checkout, since only the package itself is copied.
    """
    if (code / package.name / "__init__.py").is_file():
        return code
    building = code.with_name(f".{code.name}.{secrets.token_hex(4)}.new")
    try:
        building.mkdir(mode=0o700)
        shutil.copytree(package, building / package.name, ignore=_skipped, copy_function=_copy)
        for folder in (building, *(path for path in building.rglob("*") if path.is_dir())):
            folder.chmod(0o700)
        building.rename(code)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise RunError(f"{code}: the code cannot be copied there: {_words(error)}") from None
    return code


def share(code: Path, existing: Path) -> Path:
    """The same files as the snapshot ``existing``, as hard links where the file system has them: a hundred runs, one copy.

    Every run keeps its files whatever happens to the others; only an edit in place would be seen by all of them.
    """
    if (code / PACKAGE.name / "__init__.py").is_file():
        return code
    building = code.with_name(f".{code.name}.{secrets.token_hex(4)}.new")
    try:
        shutil.copytree(existing, building, copy_function=_link)
        building.rename(code)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise RunError(f"{code}: the code cannot be linked there: {_words(error)}") from None
    return code


def _words(error: OSError) -> str:
    """One line: ``shutil.Error`` has one for each file, which on a full disk are hundreds of the same."""
    if not isinstance(error, shutil.Error):
        return error.strerror or str(error)
    listed = error.args[0] if error.args else []
    reasons = [str(row[2]) if isinstance(row, tuple) and len(row) == 3 else str(row) for row in listed or [error]]
    first = re.sub(r"^\[Errno \d+\] ", "", reasons[0]).partition(": '")[0][:200]
    return first + (f" ({len(reasons)} files)" if len(reasons) > 1 else "")


def _skipped(folder: str, names: list[str]) -> set[str]:
    """All bytecode but what this Python has compiled already, which spares every rank half a second."""
    foreign = {name for name in names if name.endswith((".pyc", ".pyo")) and not name.endswith(_BYTECODE)}
    return foreign | _SKIPPED(folder, names) | _large(Path(folder), set(names) - foreign)


def _large(folder: Path, names: Iterable[str]) -> set[str]:
    """Files that no package has, such as data or weights that lie in a checkout; each run would have a copy. It is said."""
    found = set()
    for name in names:
        with contextlib.suppress(OSError):
            facts = (folder / name).lstat()
            if stat.S_ISREG(facts.st_mode) and facts.st_size > LARGEST:
                found.add(name)
                size = f"{facts.st_size / 2**20:.1f} MiB"
                print(f"hpc-cifar: {folder / name} ({size}) is no code: runs get no copy of it", file=sys.stderr)
            elif not stat.S_ISREG(facts.st_mode) and not (folder / name).is_dir() and not stat.S_ISLNK(facts.st_mode):
                found.add(name)  # a FIFO would be waited for
    return found


def _copy(source: str, target: str) -> str:
    """Contents and times, by which Python tells whether its bytecode is that of a file. No modes: a read-only site-packages
    must not make a run directory that nobody can delete.
    """
    while True:
        before = Path(source).stat()
        shutil.copyfile(source, target)
        if Path(source).stat().st_mtime_ns == before.st_mtime_ns:  # else an editor has saved it: old text with a new time
            Path(target).chmod(0o644)
            os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
            return target


def _link(source: str, target: str) -> str:
    with contextlib.suppress(OSError):  # no hard links here, or too many of one file
        os.link(source, target)
        return target
    return _copy(source, target)
