"""Two jobs on one run directory exclude each other."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any, TextIO

from ..errors import RunBusy, RunError
from .distributed import World


def is_held(folder: Path) -> bool:
    """Whether a process trains the run in this folder right now, as far as the file system can tell."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class RunLock:
    """Held by rank 0 for as long as the process lives; the kernel frees it however the process ends.

    Raises:
        RunBusy: on every rank, if another process holds it; the message names that process.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._path = folder / ".lock"
        self._world = world
        self._stream: TextIO | None = None

    def __enter__(self) -> RunLock:
        problem = self._world.share(self._take() if self._world.main else None)
        if problem is not None:
            raise problem
        return self

    def _take(self) -> RunError | None:
        try:
            self._stream = self._path.open("a+", encoding="utf-8")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert self._stream is not None
            self._stream.seek(0)
            holder = self._stream.read().strip() or "another process"
            return RunBusy(f"{self._path.parent}: this run is being trained already, by {holder}; wait for it or cancel it")
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return None  # a file system without locks, such as Lustre without -o flock: go on without one
            return RunError(f"{self._path}: cannot be locked: {error.strerror or error}")
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._stream.flush()
        return None

    def __exit__(self, *_: Any) -> None:
        if self._stream is not None:
            self._stream.close()
