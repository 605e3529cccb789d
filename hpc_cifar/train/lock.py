"""Two jobs on one run directory exclude each other."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any, TextIO

from .. import files
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
            self._stream = files.hold(self._path)
        except BlockingIOError as error:
            return RunBusy(
                f"{self._path.parent}: this run is being trained already, by {error.strerror}; wait for it or cancel it"
            )
        except OSError as error:
            return RunError(f"{self._path}: cannot be locked: {error.strerror or error}")
        return None

    def __exit__(self, *_: Any) -> None:
        if self._stream is not None:
            self._stream.close()
