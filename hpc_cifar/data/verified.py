"""Which stores were verified on this host since it was started, so that one process reads every byte and the others need not.

A store that was read and found good is known by device, inode, size and times of its files. The record lies in a folder that
only this user can write; where there is none, everyone who asks reads the store.

<cache>/hpc-cifar/verified/<host>-<store>.json     boot, and what was seen of each file; <store> is that of the folder's inode
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import caches, files, processes

Seen = dict[str, list[int]]
WAIT_S = 60.0
PLACE_LENGTH = 16  # letters that stand for a store


def seen(folder: Path, names: Iterable[str]) -> Seen:
    """What tells whether a file is still the one that was read."""
    return {name: _facts((folder / name).stat()) for name in names}


def _facts(facts: os.stat_result) -> list[int]:
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def is_known(folder: Path, digest: str, now: Seen) -> bool:
    """Whether files that look like ``now`` were read since this host was started, and had what ``digest`` says."""
    path = _record(folder)
    return path is not None and files.read_json(path) == _entry(digest, now)


def note(folder: Path, digest: str, then: Seen) -> None:
    """They were read, and looked like ``then`` before and afterwards. A full disk costs the next one's time."""
    path = _record(folder)
    if path is not None:
        with contextlib.suppress(OSError):
            _forget_boots_before(path.parent)
            files.write_json(path, _entry(digest, then), durable=False)


def _forget_boots_before(private: Path) -> None:
    for path in private.glob(f"{glob.escape(os.uname().nodename)}-{'?' * PLACE_LENGTH}.json"):
        if files.read_object(path).get("boot") != processes.boot_id():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def by_one(folder: Path) -> Iterator[None]:
    """Within the block no other process of this user and host reads the store; without locks in the home each does.

    A process that was suspended within it keeps the others for :data:`WAIT_S`.
    """
    path = _record(folder)
    if path is None:
        yield
        return
    with files.alone(path.with_suffix(".lock"), WAIT_S):
        yield


def _record(folder: Path) -> Path | None:
    private = caches.cache_folder("verified")
    if private is None:
        return None
    try:
        facts = folder.stat()
    except OSError:  # whoever reads it says why that cannot be done
        return None
    place = hashlib.sha256(f"{facts.st_dev} {facts.st_ino}".encode()).hexdigest()[
        :PLACE_LENGTH
    ]  # a copy gets its name afterwards
    return private / f"{os.uname().nodename}-{place}.json"


def _entry(digest: str, now: Seen) -> dict[str, Any]:
    return {"boot": processes.boot_id(), "store": digest, "files": now}
