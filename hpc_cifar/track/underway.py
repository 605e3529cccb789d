"""Whether the processes beside a training still upload, for whoever waits for the end of a run."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from .. import files, processes
from ..runs import Run
from .tracker import MODULES

MOST_S = 600.0  # that anybody waits, whatever is written there
SKEW_S = 300.0  # between the clocks of a site


def note(run: Run, tracker: str) -> Path:
    """Which process feeds that tracker."""
    return run.path / f".{tracker}.beside"


def begin(run: Run, tracker: str, pid: int, most_s: float) -> None:
    """Note which process it is, and how many seconds it may take once the training has ended."""
    with contextlib.suppress(OSError):  # on a full disk nobody waits for it
        files.write_json(note(run, tracker), {**processes.identity(pid), "most_s": most_s}, durable=False)


def end(run: Run, tracker: str) -> None:
    """It has ended; or, of an earlier segment, it was killed."""
    with contextlib.suppress(OSError):
        note(run, tracker).unlink(missing_ok=True)


def left_s(run: Run) -> float:
    """Seconds that the uploads of a training which has just ended may still take at most; 0 if none is under way."""
    return max(_left_s(run, tracker) for tracker in MODULES)


def _left_s(run: Run, tracker: str) -> float:
    found = files.read_object(note(run, tracker))
    most = found.get("most_s")
    if not isinstance(most, int | float) or not 0 < most <= MOST_S:
        return 0.0
    if found.get("host") == socket.gethostname() and not processes.is_alive(found):
        return 0.0
    try:
        age_s = time.time() - run.state_file.stat().st_mtime
    except OSError:
        return 0.0
    return float(most) if age_s < most + SKEW_S else 0.0  # else its node died, some time ago
