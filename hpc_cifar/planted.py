"""Single files in folders where others may write: profiles that they may have put there, locks that they may have linked."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TextIO

from .owner import OTHERS, name_of, uid


def problem(path: Path) -> str:
    """Why a file whose content decides what runs is not to be trusted; "" if only its owner, this user or root, can have put it
    there, or somebody else where nobody but them can write.
    """
    trusted = (uid(), 0)
    try:
        where = path.absolute()
        for one in (where, Path(os.path.realpath(where))):
            facts, folder = one.lstat(), one.parent.stat()
            if facts.st_mode & stat.S_IWOTH and not stat.S_ISLNK(facts.st_mode):
                return f"everybody can write it; look at it, then: chmod go-w {path}"
            if facts.st_uid not in trusted and facts.st_mode & stat.S_IWGRP and not stat.S_ISLNK(facts.st_mode):
                return f"it is of {name_of(facts.st_uid)}, and their group can write it; copy it to a folder of your own"
            if facts.st_uid not in trusted and folder.st_mode & OTHERS:
                return f"it is of {name_of(facts.st_uid)}, in a folder that others can write; copy it to a folder of your own"
            for child in one.parents:
                if child != child.parent and child.parent.stat().st_mode & stat.S_IWOTH and child.lstat().st_uid not in trusted:
                    said = f"{child} is of {name_of(child.lstat().st_uid)}, in a folder that everybody can write"
                    return f"{said}; copy it to a folder of your own"
    except OSError:  # whoever reads it says so
        pass
    return ""


def open_there(path: Path, *, make: bool = True) -> TextIO:
    """Open a lock file, or one that grows, to read and write; never what a link leads to, and nothing but a file of its own.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    flags = os.O_RDWR | (os.O_CREAT if make else 0) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a link, which is not followed; remove it", str(path)) from None
        raise
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no file of its own; remove it", str(path))
    return os.fdopen(descriptor, "r+", encoding="utf-8")
